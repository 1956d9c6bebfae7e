"""A TeleChat2 as a plain Llama and back: the same bits, and what is refused."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from helpers.checkpoints import MOE, make_checkpoint
from safetensors.numpy import load_file, save_file

from telechat_mindie.checkpoint import llama
from telechat_mindie.checkpoint.convert import (
    MindSporeForm,
    OutputOptions,
    to_hugging_face,
    to_llama,
    to_mindspore,
)
from telechat_mindie.checkpoint.source import open_checkpoint
from telechat_mindie.config import TelechatConfig
from telechat_mindie.errors import CheckpointError, ConfigError, InputError
from telechat_mindie.model_dir.build import build

SHARD = "model-00001-of-00001.safetensors"


@pytest.fixture(scope="module", params=["mha", "gqa"])
def forms(request, tmp_path_factory):
    """(folder with ckpt and llama, the weights by published name)."""
    root = tmp_path_factory.mktemp(request.param)
    kv_heads = {"mha": 8, "gqa": 4}[request.param]
    changes = {"num_key_value_heads": kv_heads, "rope_theta": 1000000, "logn": True, "seq_length": 1024}
    weights = make_checkpoint(root / "ckpt", "bfloat16", **changes)
    to_llama(open_checkpoint(root / "ckpt"), root / "llama", OutputOptions())
    return root, weights


def bits(directory):
    import ml_dtypes  # noqa: F401 - makes numpy know bfloat16

    arrays = {}
    for file in directory.glob("*.safetensors"):
        arrays |= load_file(file)
    return {name: (array.dtype.name, array.shape, array.tobytes()) for name, array in arrays.items()}


def change(root, tmp_path, **tensors):
    """A copy of the Llama form with other tensors; None leaves one out."""
    copy = tmp_path / "changed"
    shutil.copytree(root / "llama", copy)
    arrays = load_file(copy / SHARD)
    for name, array in tensors.items():
        name = name.replace("__", ".")
        arrays.pop(name, None)
        if array is not None:
            arrays[name] = array
    save_file(arrays, copy / SHARD)
    (copy / "model.safetensors.index.json").unlink()
    return copy


def test_keys_and_values_apart_and_zero_biases(forms):
    root, weights = forms
    found = load_file(root / "llama" / SHARD)
    config = TelechatConfig.from_directory(root / "ckpt")
    kv, dim = config.num_kv_heads, config.head_dim
    pair = weights["transformer.h.1.self_attention.key_value.weight"].reshape(kv, 2, dim, 64)
    assert np.array_equal(found["model.layers.1.self_attn.k_proj.weight"], pair[:, 0].reshape(-1, 64))
    assert np.array_equal(found["model.layers.1.self_attn.v_proj.weight"], pair[:, 1].reshape(-1, 64))
    dense = "transformer.h.1.self_attention.dense.bias"
    assert np.array_equal(found["model.layers.1.self_attn.o_proj.bias"], weights[dense])
    zeros = {name: array.shape for name, array in found.items() if name.endswith("bias") and not np.any(array)}
    width = kv * dim
    sizes = {"self_attn.q": 64, "self_attn.k": width, "self_attn.v": width, "mlp.gate": 96, "mlp.up": 96}
    expected = {(f"model.layers.{layer}.{name}_proj.bias", size) for layer in (0, 1) for name, size in sizes.items()}
    assert {(name, shape[0]) for name, shape in zeros.items()} == expected
    # 12 weights and biases of ours a layer, one of them in two, and 5 biases more.
    assert len(found) == 3 + 2 * (10 + 1 + 5)
    assert {array.dtype.name for array in found.values()} == {"bfloat16"}


def test_config_and_files_of_a_plain_llama(forms):
    root, _ = forms
    written = json.loads((root / "llama" / "config.json").read_text())
    assert written["architectures"] == ["LlamaForCausalLM"] and written["model_type"] == "llama"
    assert written["attention_bias"] is written["mlp_bias"] is True
    assert (written["num_hidden_layers"], written["intermediate_size"], written["rms_norm_eps"]) == (2, 96, 1e-5)
    # Beyond the trained 512 of its 1024 tokens the model stretches, and a Llama does not.
    assert (written["max_position_embeddings"], written["rope_theta"]) == (512, 1000000)
    assert not list((root / "llama").glob("*.py")) and "auto_map" not in written
    assert (root / "llama" / "tokenizer.json").exists()


def test_a_base_that_is_stretched_from_the_first_token_on(tmp_path):
    """training_seqlen 4 x base_seqlen: alpha is 7 up to the trained length (model/rope.py)."""
    make_checkpoint(tmp_path / "ckpt", "float16", base_seqlen=128)
    to_llama(open_checkpoint(tmp_path / "ckpt"), tmp_path / "llama", OutputOptions())
    assert json.loads((tmp_path / "llama" / "config.json").read_text())["rope_theta"] == 10000 * 7 ** (8 / 6)
    config = open_checkpoint(tmp_path / "llama").config
    assert (config.rope_theta, config.base_seqlen) == (10000, 128)


def test_back_to_hugging_face_bit_equal(forms, tmp_path):
    root, _ = forms
    to_hugging_face(open_checkpoint(root / "ckpt"), tmp_path / "direct", OutputOptions())
    back = open_checkpoint(root / "llama")
    assert back.kind.startswith("Llama form") and back.config == open_checkpoint(root / "ckpt").config
    to_hugging_face(back, tmp_path / "back", OutputOptions())
    assert bits(tmp_path / "back") == bits(tmp_path / "direct")
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer.model"):
        one, other = (tmp_path / folder / name for folder in ("back", "direct"))
        if name.endswith(".json"):
            assert json.loads(one.read_text()) == json.loads(other.read_text()), name
        else:
            assert one.read_bytes() == other.read_bytes()


def test_back_to_mindspore_and_into_a_model_directory(forms, tmp_path):
    root, _ = forms
    files = []
    for source in ("ckpt", "llama"):
        files.append(tmp_path / f"{source}.ckpt")
        to_mindspore(open_checkpoint(root / source), files[-1], MindSporeForm(container="ckpt"))
        build(tmp_path / source, root / source)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert bits(tmp_path / "llama" / "rank_0") == bits(tmp_path / "ckpt" / "rank_0")
    config = json.loads((tmp_path / "llama" / "config.json").read_text())
    assert config["architectures"] == ["TelechatForCausalLM"] and config["logn"] is True


def test_a_cast_on_the_way(forms, tmp_path):
    root, weights = forms
    to_llama(open_checkpoint(root / "ckpt"), tmp_path / "llama", OutputOptions(dtype="float32"))
    found = load_file(tmp_path / "llama" / SHARD)
    assert {array.dtype.name for array in found.values()} == {"float32"}
    name = "transformer.h.0.mlp.down_proj.bias"
    assert np.array_equal(found["model.layers.0.mlp.down_proj.bias"], weights[name].astype(np.float32))


def test_zero_biases_that_a_tool_left_out(forms, tmp_path):
    root, _ = forms
    copy = change(root, tmp_path, model__layers__0__self_attn__q_proj__bias=None)
    to_hugging_face(open_checkpoint(copy), tmp_path / "hf", OutputOptions())
    to_hugging_face(open_checkpoint(root / "ckpt"), tmp_path / "direct", OutputOptions())
    assert bits(tmp_path / "hf") == bits(tmp_path / "direct")


def test_tied_embeddings_without_a_head(tmp_path):
    """As transformers writes a tied model, whose head is no weight of its own."""
    weights = make_checkpoint(tmp_path / "ckpt", "float16", tie_word_embeddings=True)
    to_llama(open_checkpoint(tmp_path / "ckpt"), tmp_path / "llama", OutputOptions())
    copy = change(tmp_path, tmp_path, lm_head__weight=None)
    assert json.loads((copy / "config.json").read_text())["tie_word_embeddings"] is True
    to_hugging_face(open_checkpoint(copy), tmp_path / "hf", OutputOptions())
    (shard,) = (tmp_path / "hf").glob("*.safetensors")
    assert load_file(shard)["lm_head.weight"].tobytes() == weights["transformer.word_embeddings.weight"].tobytes()


def test_learned_biases_have_no_way_back(forms, tmp_path):
    root, _ = forms
    bias = load_file(root / "llama" / SHARD)["model.layers.1.mlp.up_proj.bias"]
    bias[3] = 0.5
    copy = change(root, tmp_path, model__layers__1__mlp__up_proj__bias=bias)
    with pytest.raises(CheckpointError, match=r"biases that a TeleChat2 has no place for: model\.layers\.1\.mlp\.up"):
        open_checkpoint(copy)


@pytest.mark.parametrize("name", ["model__layers__1__mlp__down_proj__bias", "model__norm__weight"])
def test_a_weight_that_is_missing(forms, tmp_path, name):
    with pytest.raises(CheckpointError, match="1 of 35 weights are missing"):
        open_checkpoint(change(forms[0], tmp_path, **{name: None}))


def test_other_llamas(forms, tmp_path):
    root, _ = forms
    copy = change(root, tmp_path)
    written = json.loads((copy / "config.json").read_text())
    section = written.pop("telechat2")
    (copy / "config.json").write_text(json.dumps(written))
    with pytest.raises(ConfigError, match="is not a TeleChat2 model"):
        open_checkpoint(copy)
    # With the TeleChat2's own config.json it has a way back; a Llama without its biases is another model.
    assert open_checkpoint(copy, root / "ckpt").weights
    (copy / "config.json").write_text(json.dumps(written | {"telechat2": section}))
    arrays = {name: array for name, array in load_file(copy / SHARD).items() if not name.endswith(".bias")}
    save_file(arrays, copy / SHARD)
    with pytest.raises(CheckpointError, match="has the layers of another family"):
        open_checkpoint(copy)
    quantised = written | {"telechat2": section, "quantization_config": {"quant_method": "awq"}}
    (copy / "config.json").write_text(json.dumps(quantised))
    with pytest.raises(ConfigError, match="is quantised by AWQ"):
        open_checkpoint(copy)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (MOE, InputError, "a mixture of experts is no Llama"),
        ({"embed_layernorm": True}, InputError, "a norm of its embeddings is no Llama"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, ConfigError, "would change what the model computes"),
    ],
)
def test_models_that_no_llama_computes(tmp_path, changes, error, message):
    make_checkpoint(tmp_path / "ckpt", "float16", **changes)
    with pytest.raises(error, match=message):
        to_llama(open_checkpoint(tmp_path / "ckpt"), tmp_path / "llama", OutputOptions())
    assert not (tmp_path / "llama").exists()


def test_every_weight_has_one_name(forms):
    config = TelechatConfig.from_directory(forms[0] / "ckpt")
    names = [target.name for target in llama.llama_targets(config)]
    assert len(set(names)) == len(names) == len(forms[1]) + config.num_layers
    assert all(name.startswith(("model.layers.", "model.embed_tokens.", "model.norm.", "lm_head.")) for name in names)
