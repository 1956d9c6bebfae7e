"""The Hugging Face directory that other engines load: its files, key by key, and what they are told of limits."""

from __future__ import annotations

import ast
import json
import runpy
import sys
import types

import pytest
from helpers.checkpoints import MOE, make_checkpoint
from typer.testing import CliRunner

from telechat_mindie.checkpoint.convert import MindSporeForm, OutputOptions, to_hugging_face, to_mindspore
from telechat_mindie.checkpoint.elsewhere.layout import CODE
from telechat_mindie.checkpoint.elsewhere.limits import limits
from telechat_mindie.checkpoint.source import open_checkpoint
from telechat_mindie.cli import app
from telechat_mindie.computation import plain_length
from telechat_mindie.config import TelechatConfig
from telechat_mindie.errors import CheckpointError, InputError, TokenizerError
from telechat_mindie.model_dir.build import build
from telechat_mindie.text.tokenizer import TelechatTokenizer

EXPLICIT = {
    "vocab_size": 512,
    "hidden_size": 64,
    "n_layer": 2,
    "n_head": 8,
    "num_key_value_heads": 4,
    "ffn_hidden_size": 96,
    "layer_norm_epsilon": 1e-5,
    "seq_length": 512,
    "training_seqlen": 512,
    "base_seqlen": 512,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
    "torch_dtype": "float16",
}


def convert(tmp_path, beside=None, **changes):
    """The folder that a checkpoint with `changes` in its config.json and these files `beside` it becomes."""
    make_checkpoint(tmp_path / "ckpt", "float16", **changes)
    for name, content in (beside or {}).items():
        (tmp_path / "ckpt" / name).write_text(json.dumps(content))
    to_hugging_face(open_checkpoint(tmp_path / "ckpt"), tmp_path / "hf", OutputOptions())
    return tmp_path / "hf"


def read(directory, name):
    return json.loads((directory / name).read_text())


@pytest.mark.parametrize("spelled", ["TelechatForCausalLM", "TeleChatForCausalLM", "Telechat2ForCausalLM"])
def test_config_says_everything_under_the_published_names(tmp_path, spelled):
    others = {"num_hidden_layers": 2, "n_layer": None, "num_key_value_heads": 4, "n_inner": 96}
    hf = convert(tmp_path, architectures=[spelled], _name_or_path="/data/ckpt", logn=True, **others)
    written = read(hf, "config.json")
    assert written["architectures"] == ["TeleChat2ForCausalLM"] and written["model_type"] == "telechat"
    assert {key: written[key] for key in EXPLICIT} == EXPLICIT
    assert written["logn"] is True
    assert not {"num_hidden_layers", "n_inner", "_name_or_path", "num_local_experts"} & written.keys()


def test_the_code_that_auto_map_names_is_there(tmp_path):
    hf = convert(tmp_path)
    for target in read(hf, "config.json")["auto_map"].values():
        module, name = target.split(".")
        assert "telechat2" in module  # by which atb_llm knows the second generation
        tree = ast.parse((hf / f"{module}.py").read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    assert {path.name for path in hf.glob("*.py")} == set(CODE)


def test_the_configuration_takes_every_key_that_is_written(tmp_path):
    """Its arguments have no default that a written key would not reach."""
    hf = convert(tmp_path, **MOE)
    tree = ast.parse((hf / "configuration_telechat2.py").read_text())
    init = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    arguments = {argument.arg for argument in init.args.args} - {"self"}
    assert EXPLICIT.keys() - {"torch_dtype"} | MOE.keys() <= arguments


class PretrainedConfig:
    """What the configuration asks of transformers' own."""

    def __init__(self, **others):
        vars(self).update(others)

    def to_dict(self):
        return {**vars(self), "model_type": self.model_type, "transformers_version": "5.19.0"}


@pytest.mark.parametrize("changes", [{"seq_length": 2048}, {"base_seqlen": 128}, MOE])
def test_what_transformers_saves_is_the_same_model(tmp_path, monkeypatch, changes):
    hf = convert(tmp_path, **changes)
    transformers = types.ModuleType("transformers")
    monkeypatch.setattr(transformers, "PretrainedConfig", PretrainedConfig, raising=False)
    monkeypatch.setitem(sys.modules, "transformers", transformers)
    made = runpy.run_path(str(hf / "configuration_telechat2.py"))["TeleChat2Config"](**read(hf, "config.json"))
    source = TelechatConfig.from_directory(tmp_path / "ckpt")
    # vLLM's limit, which a config.json may not say beside seq_length
    assert made.max_position_embeddings == min(source.seq_length, source.training_seqlen, source.base_seqlen)
    assert TelechatConfig.from_dict(made.to_dict()) == source


def test_experts_are_named_as_the_code_reads_them(tmp_path):
    changes = {"num_experts": 4, "moe_topk": 2, "moe_intermediate_size": 32}
    written = read(convert(tmp_path, **changes), "config.json")
    assert (written["num_local_experts"], written["num_experts_per_tok"], written["ffn_hidden_size"]) == (4, 2, 32)
    assert not changes.keys() & written.keys()


def test_a_checkpoint_without_config_gets_one(tmp_path):
    make_checkpoint(tmp_path / "ckpt", "float16", hidden_size=256, n_head=2, num_key_value_heads=1)
    to_mindspore(open_checkpoint(tmp_path / "ckpt"), tmp_path / "whole.ckpt", MindSporeForm(container="ckpt"))
    to_hugging_face(open_checkpoint(tmp_path / "whole.ckpt"), tmp_path / "hf", OutputOptions())
    written = read(tmp_path / "hf", "config.json")
    assert written["architectures"] == ["TeleChat2ForCausalLM"] and written["hidden_size"] == 256
    assert not (tmp_path / "hf" / "tokenizer.json").exists()  # there was no tokenizer.model
    assert read(tmp_path / "hf", "generation_config.json")["user_token_id"] == 4


def test_generation_config_has_the_ids_of_a_turn_and_a_length(tmp_path):
    written = read(convert(tmp_path), "generation_config.json")
    ids = {name: written[f"{name}_token_id"] for name in ("bos", "eos", "pad", "user", "bot", "system")}
    assert ids == {"bos": 1, "eos": 2, "pad": 3, "user": 4, "bot": 5, "system": 6}
    assert written["max_new_tokens"] > 0
    beside = {"max_length": 99, "eos_token_id": [2, 5], "top_p": None, "temperature": 0.3}
    written = read(convert(tmp_path / "own", {"generation_config.json": beside}), "generation_config.json")
    assert written["max_length"] == 99 and "max_new_tokens" not in written and "top_p" not in written
    assert written["eos_token_id"] == [2, 5] and written["temperature"] == 0.3


def test_tokenizer_config_names_no_token_that_the_embedding_lacks(tmp_path):
    single = {"__type": "AddedToken", "content": "<_end>", "single_word": True}
    tokens = {"2": {"content": "<_end>", "special": True}, "9": {"content": "<tool_call>"}, "600": {"content": "<x>"}}
    beside = {
        "tokenizer_class": "Telechat2Tokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_telechat2.Telechat2Tokenizer", None]},
        "use_fast": False,
        "unk_token": single,
        "eos_token": single,
        "added_tokens_decoder": tokens,
        "additional_special_tokens": ["<_user>", {"content": "<tool_call>"}, "<x>"],
    }
    hf = convert(tmp_path, {"tokenizer_config.json": beside})
    written = read(hf, "tokenizer_config.json")
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast" and written["eos_token"] == "<_end>"
    assert not {"auto_map", "use_fast", "unk_token"} & written.keys()
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    assert written["added_tokens_decoder"] == {
        "2": {"content": "<_end>", "special": True} | flags,
        "9": {"content": "<tool_call>", "special": False} | flags,
    }
    assert written["additional_special_tokens"] == ["<_user>", "<tool_call>"]
    listed = {token["content"]: token["id"] for token in read(hf, "tokenizer.json")["added_tokens"]}
    assert listed == {
        "<_start>": 1,
        "<_end>": 2,
        "<_pad>": 3,
        "<_user>": 4,
        "<_bot>": 5,
        "<_system>": 6,
        "<tool_call>": 9,
    }
    before, after = (TelechatTokenizer.from_pretrained(folder) for folder in (tmp_path / "ckpt", hf))
    text = "<_user> soy<tool_call> a<_end>"
    assert before.encode(text) == after.encode(text) and before.all_special_ids == after.all_special_ids


def test_the_chat_template_comes_along_or_is_ours(tmp_path):
    assert "<_bot>" in read(convert(tmp_path), "tokenizer_config.json")["chat_template"]
    beside = {"tokenizer_config.json": {"chat_template": "{{ messages }}"}}
    assert read(convert(tmp_path / "own", beside), "tokenizer_config.json")["chat_template"] == "{{ messages }}"
    beside = {"chat_template.json": {"chat_template": "{{ messages }}"}}
    hf = convert(tmp_path / "file", beside)
    assert "chat_template" not in read(hf, "tokenizer_config.json") and read(hf, "chat_template.json")


def test_from_a_model_directory_too(tmp_path):
    make_checkpoint(tmp_path / "ckpt", "float16")
    build(tmp_path / "model", tmp_path / "ckpt")
    to_hugging_face(open_checkpoint(tmp_path / "model"), tmp_path / "hf", OutputOptions())
    to_hugging_face(open_checkpoint(tmp_path / "ckpt"), tmp_path / "direct", OutputOptions())
    assert read(tmp_path / "hf", "config.json") == read(tmp_path / "direct", "config.json")
    assert read(tmp_path / "hf", "tokenizer.json") == read(tmp_path / "direct", "tokenizer.json")


def test_a_damaged_tokenizer_stops_it_before_a_weight_is_written(tmp_path):
    make_checkpoint(tmp_path / "ckpt", "float16")
    (tmp_path / "ckpt" / "tokenizer.model").write_bytes(b"\n\x05damage")
    with pytest.raises((TokenizerError, CheckpointError), match=r"tokenizer\.model"):
        to_hugging_face(open_checkpoint(tmp_path / "ckpt"), tmp_path / "hf", OutputOptions())
    assert not (tmp_path / "hf").exists()


def test_transformers_opens_the_shards(tmp_path):
    """Up to transformers 4 it asks for a header that names the framework (modeling_utils.py, load_state_dict)."""
    (shard,) = convert(tmp_path).glob("*.safetensors")
    data = shard.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header["__metadata__"] == {"format": "pt"}


def config(**changes):
    sizes = {"vocab_size": 512, "hidden_size": 64, "num_layers": 2, "num_heads": 8, "ffn_size": 96}
    return TelechatConfig(**(sizes | changes))


@pytest.mark.parametrize(
    ("changes", "plain", "hf", "llama"),
    [
        ({}, 8192, [], []),
        ({"seq_length": 32768}, 8192, ["up to 8192 of 32768"], ["up to 8192 of 32768"]),
        ({"seq_length": 32768, "training_seqlen": 32768, "base_seqlen": 32768}, 32768, [], []),
        ({"training_seqlen": 8192, "base_seqlen": 2048}, 0, ["stretched at any length"], []),
        ({"rope_theta": 1e6}, 8192, ["atb ignores rope_theta, which is 1e+06"], []),
        ({"num_experts": 4, "experts_per_token": 2}, 8192, ["vLLM, vllm-ascend and atb have none"], []),
    ],
)
def test_what_is_left_out_is_said(changes, plain, hf, llama):
    model = config(**changes)
    assert plain_length(model) == plain
    for form, expected in (("hf", hf), ("llama", llama), ("ckpt", [])):
        said = list(limits(form, model))
        assert len(said) == len(expected) and all(part in text for part, text in zip(expected, said, strict=True))


def test_the_command_says_it(tmp_path):
    make_checkpoint(tmp_path / "ckpt", "float16", **MOE)

    def run(form, *options):
        command = ["convert", str(tmp_path / "ckpt"), str(tmp_path / form), "--to", form, *options]
        return CliRunner().invoke(app, command)

    done = run("hf")
    assert done.exit_code == 0 and done.stderr.count("vLLM") == 1
    assert isinstance(done := run("llama").exception, InputError) and "is no Llama" in str(done)
    assert isinstance(done := run("llama", "--tp", "2").exception, InputError) and "MindSpore files" in str(done)
