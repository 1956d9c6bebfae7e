"""What a directory for MindIE's atb must be: each rule that atb_llm fails on, or gets wrong in silence."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.atb import (
    CONFIG,
    GENERATION,
    SHARD,
    faults,
    make_atb_directory,
    make_w8a8_directory,
    make_w8a8sc_directory,
    merged,
)
from safetensors.numpy import load_file, save_file

from telechat_mindie.checkpoint.mapping import weights
from telechat_mindie.checkpoint.msmodelslim import read_quantised
from telechat_mindie.checkpoint.source import open_checkpoint
from telechat_mindie.computation import plain_length
from telechat_mindie.config import TelechatConfig
from telechat_mindie.errors import CheckpointError, ConfigError, ModelDirError, TelechatMindieError
from telechat_mindie.findings import Finding
from telechat_mindie.model_dir.atb.layout import AtbDir, is_atb, rank_bytes
from telechat_mindie.model_dir.atb.rules import model_refusals
from telechat_mindie.model_dir.layout import ModelDir
from telechat_mindie.variants import VARIANTS

DESCRIPTION = "quant_model_description.json"
QUERY = "transformer.h.3.self_attention.query"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("atb") / "model"
    make_atb_directory(path)
    return path


def copy(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target / "model"))


def the_error(path: Path) -> Finding:
    """The one error, which `AtbDir.open` raises in one sentence with the way out."""
    (only,) = (item for item in faults(path) if item.severity == "error")
    with pytest.raises((ConfigError, ModelDirError), match=re.escape(only.message)):
        AtbDir.open(path)
    return only


def edit_json(path: Path, changes: dict[str, Any]) -> None:
    path.write_text(json.dumps(merged(json.loads(path.read_text()), changes)))


def edit_shard(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    for file in folder.glob("*.safetensors"):
        arrays = load_file(file)
        change(arrays)
        save_file(arrays, file)
        file.chmod(0o640)


def test_directories_as_they_should_be(plain: Path, quantised: Path, compressed: Path) -> None:
    for path in (plain, quantised, compressed):
        assert faults(path) == [], path
        assert AtbDir.open(path).config.num_layers == 30


@pytest.mark.parametrize(
    ("changes", "id", "says"),
    [
        ({"n_layer": 24}, "atb-layers", "24 layers: below 30"),
        ({"rope_theta": 1e6}, "atb-rope-theta", "1e\\+06: atb_llm computes with 10000"),
        ({"base_seqlen": 128}, "atb-ntk", "128, below training_seqlen 512: .* stretched at any length"),
        ({"torch_dtype": "bfloat16"}, "atb-dtype", "'bfloat16'"),
        ({"torch_dtype": None}, "atb-config-key", "another model's value"),
        ({"num_key_value_heads": None, "num_attention_heads": 4}, "atb-config-key", "in this spelling"),
        ({"model_type": "telechat2"}, "atb-model-type", "'telechat2'"),
        ({"auto_map": None}, "atb-auto-map", "missing"),
        ({"auto_map": {"AutoConfig": "configuration_telechat.TelechatConfig"}}, "atb-auto-map", "first TeleChat"),
        ({"auto_map": {"AutoConfig": "telechat2.C", "AutoTokenizer": ["a.B", None]}}, "atb-auto-map", "texts"),
        ({"apply_residual_connection_post_layernorm": True}, "config-json", "would change what the model computes"),
    ],
)
def test_configs_that_are_refused(tmp_path: Path, changes: dict[str, Any], id: str, says: str) -> None:
    make_atb_directory(tmp_path / "model")
    if "n_layer" in changes or "num_key_value_heads" in changes:
        shutil.rmtree(tmp_path / "model")
        make_atb_directory(tmp_path / "model", **changes)
    else:
        edit_json(tmp_path / "model" / "config.json", changes)
    problem = the_error(tmp_path / "model")
    assert problem.id == id
    assert re.search(says, problem.message)
    assert problem.advice.endswith(".") or "telechat-mindie build" in problem.advice


def test_experts_and_the_norm_of_embeddings_are_refused(tmp_path: Path) -> None:
    make_atb_directory(tmp_path / "moe", num_local_experts=2, num_experts_per_tok=1)
    assert the_error(tmp_path / "moe").id == "atb-moe"
    make_atb_directory(tmp_path / "norm", embed_layernorm=True)
    assert the_error(tmp_path / "norm").id == "atb-embed-layernorm"


@pytest.mark.parametrize(
    ("changes", "id"),
    [
        *(({key: None}, "atb-token-id") for key in ("user_token_id", "bot_token_id", "eos_token_id")),
        ({"eos_token_id": [2, 7]}, "atb-token-id"),
        ({"bot_token_id": 512}, "atb-token-id"),
        ({"max_new_tokens": None}, "atb-length"),
        ({"max_new_tokens": 510}, "atb-length"),
        ({"max_new_tokens": None, "max_length": 2}, "atb-length"),
        ({"max_new_tokens": "many"}, "atb-length"),
        ({"do_sample": 1}, "atb-generation"),
        ({"temperature": 2.5}, "atb-generation"),
        ({"repetition_penalty": 0}, "atb-generation"),
        ({"top_k": 513}, "atb-generation"),
    ],
)
def test_generation_configs_that_are_refused(plain: Path, tmp_path: Path, changes: dict[str, Any], id: str) -> None:
    path = copy(plain, tmp_path)
    edit_json(path / "generation_config.json", changes)
    assert {item.id for item in faults(path) if item.severity == "error"} == {id}


def test_generation_configs_that_are_taken(plain: Path, tmp_path: Path) -> None:
    path = copy(plain, tmp_path)
    edit_json(path / "generation_config.json", {"max_new_tokens": 509, "top_k": -1, "temperature": 0})
    assert faults(path) == []
    edit_json(path / "generation_config.json", {"max_new_tokens": None, "max_length": 3})
    assert faults(path) == []
    edit_json(path / "generation_config.json", {"system_token_id": None})
    (only,) = faults(path)
    assert (only.severity, only.id) == ("warning", "atb-token-id")
    (path / "generation_config.json").unlink()
    assert {item.id for item in faults(path)} == {"atb-token-id", "atb-length"}


def test_weights_that_are_refused(plain: Path, tmp_path: Path) -> None:
    path = copy(plain, tmp_path)
    edit_shard(path, lambda arrays: arrays.pop("lm_head.weight"))
    assert "lm_head.weight" in the_error(path).message
    shutil.copy(plain / SHARD, path / SHARD)
    edit_shard(path, lambda arrays: arrays.update({f"{QUERY}.weight": np.ones((3, 3), np.float16)}))
    assert the_error(path).id == "shape"
    shutil.copy(plain / SHARD, path / SHARD)
    edit_shard(path, lambda arrays: arrays.update({"lm_head.weight": np.ones((512, 32), np.float32)}))
    problem = the_error(path)
    assert problem.id == "atb-dtype" and "float32" in problem.message
    (path / SHARD).unlink()
    assert "safetensors" in the_error(path).message


def test_unknown_tensors_are_passed_over(plain: Path, quantised: Path, tmp_path: Path) -> None:
    for number, source in enumerate((plain, quantised)):
        path = copy(source, tmp_path / str(number))
        save_file({"rotary.odd": np.ones(1, np.float16)}, path / "odd.safetensors")
        (path / "odd.safetensors").chmod(0o640)
        (only,) = faults(path)
        assert (only.id, only.severity) == ("tensor-names", "warning")
        AtbDir.open(path)


def test_modes_paths_and_the_tokenizer(plain: Path, tmp_path: Path) -> None:
    path = copy(plain, tmp_path)
    (path / SHARD).chmod(0o644)
    assert {item.id for item in faults(path)} == {"file-mode"}
    (path / SHARD).chmod(0o640)
    odd = path.rename(tmp_path / "model v2")
    assert {item.id for item in faults(odd)} == {"path"}
    path = odd.rename(tmp_path / "model")
    (path / "tokenizer.json").unlink()
    assert [(item.id, item.severity) for item in faults(path)] == [("tokenizer", "warning")]
    (path / "tokenizer.model").unlink()
    assert [(item.id, item.severity) for item in faults(path)] == [("tokenizer", "error")]


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", DESCRIPTION, "manifest.json"])
@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"backend": "atb"}', '{"auto_map": [1], "tp": {}, "files": 3, "quantize": []}']
)
def test_whatever_is_damaged_becomes_a_finding(quantised: Path, tmp_path: Path, name: str, text: str) -> None:
    path = copy(quantised, tmp_path)
    (path / name).write_text(text)
    (path / name).chmod(0o640)
    assert any(item.severity == "error" for item in faults(path))
    with pytest.raises(TelechatMindieError):
        AtbDir.open(path)
    with pytest.raises(TelechatMindieError):
        ModelDir.open(path)


def test_which_directories_are_for_atb(plain: Path, quantised: Path, tmp_path: Path) -> None:
    """A checkpoint is one where MindIE has no other backend; with ms it is something to build from."""
    assert not is_atb(plain)
    assert not is_atb(plain, "2.3")
    assert is_atb(plain, "3.0")
    assert is_atb(quantised) and is_atb(quantised, "3.0.0.beta")
    assert not is_atb(tmp_path, "3.0") and not is_atb(tmp_path / "absent", "3.0")
    with pytest.raises(ModelDirError, match="is not a model directory"):
        ModelDir.open(plain)


# The card's share


@pytest.mark.parametrize("label", ["7b", "35b", "115b"])
def test_bytes_of_a_card(label: str) -> None:
    """Every legal tp: the embedding whole, query and key_value twice, the rest divided, norms and biases not."""
    config = VARIANTS[label]
    table = weights(config)
    sizes = {name: 2 * int(np.prod(weight.shape)) for name, weight in table.items()}
    assert sum(sizes.values()) == config.weight_bytes("float16")
    for tp in config.allowed_tp():
        whole = 2 * config.vocab_size * config.hidden_size
        small = 2 * (config.hidden_size * (4 * config.num_layers + 1))
        packed = 2 * config.num_layers * config.hidden_size * (config.hidden_size + 2 * config.kv_size)
        cut = config.weight_bytes("float16") - whole - small
        assert rank_bytes(sizes, config, tp) == whole + small + (cut + packed) // tp, tp
    assert max(config.allowed_tp()) <= config.num_kv_heads


def test_the_three_sizes_and_the_others() -> None:
    refused = {label: [refusal.id for refusal in model_refusals(config)] for label, config in VARIANTS.items()}
    assert refused == {"3b": ["atb-layers"], "7b": [], "35b": [], "115b": [], "39b-a12b": ["atb-moe"]}


def test_published_configs(shared: Callable[[str], Path]) -> None:
    published = json.loads(shared("published/configs.json").read_text())
    configs = {name: TelechatConfig.from_dict(data) for name, data in published.items()}
    refused = {name: [refusal.id for refusal in model_refusals(config)] for name, config in configs.items()}
    assert refused == {
        "TeleChat2-3B": ["atb-layers"],
        "TeleChat2-7B": [],
        "TeleChat2-7B-32K": ["atb-rope-theta"],
        "T1-35B": ["atb-rope-theta"],
        "TeleChat2-115B": [],
    }
    assert plain_length(configs["TeleChat2-7B"]) == 8192 < configs["TeleChat2-7B"].seq_length


# Quantised


def test_what_is_read_of_w8a8(quantised: Path) -> None:
    model = read_quantised(quantised)
    assert model.kind == "W8A8" and model.tp == 0
    assert model.layers(quantised=True) == [
        "mlp.gate_proj",
        "mlp.up_proj",
        "self_attention.dense",
        "self_attention.key_value",
        "self_attention.query",
    ]
    assert model.layers(quantised=False) == ["lm_head", "mlp.down_proj", "word_embeddings"]
    assert model.tensors[f"{QUERY}.deq_scale"].dtype == "int64"
    directory = AtbDir.open(quantised)
    assert directory.allowed_tp == (1, 2)
    one, two = directory.rank_bytes(1), directory.rank_bytes(2)
    layer = 2 * 32 * 4  # norms and biases
    layer += 32 * (4 + 8)  # dense's quant_bias and deq_scale
    layer += (2 + 2) * 7  # an input's scale and offset: dense, gate, up, and twice query and key_value
    whole = 2 * 512 * 32 + 2 * 32 + 30 * layer  # the embedding, ln_f
    assert two == whole + (one - whole) // 2


def test_w8a8_that_is_refused(quantised: Path, tmp_path: Path) -> None:
    def drop(arrays: dict[str, np.ndarray]) -> None:
        arrays.pop(f"{QUERY}.deq_scale", None)

    def as_of_bfloat16(arrays: dict[str, np.ndarray]) -> None:
        if f"{QUERY}.deq_scale" in arrays:
            arrays[f"{QUERY}.deq_scale"] = np.ones(32, np.float32)

    def short(arrays: dict[str, np.ndarray]) -> None:
        if f"{QUERY}.quant_bias" in arrays:
            arrays[f"{QUERY}.quant_bias"] = np.ones(31, np.int32)

    def another_scale(arrays: dict[str, np.ndarray]) -> None:
        if f"{QUERY}.input_scale" in arrays:
            arrays[f"{QUERY}.input_scale"] = np.full(1, 0.07, np.float16)

    def another_offset(arrays: dict[str, np.ndarray]) -> None:
        name = "transformer.h.29.mlp.up_proj.input_offset"
        if name in arrays:
            arrays[name] = np.full(1, 4, np.float16)

    def float_weight(arrays: dict[str, np.ndarray]) -> None:
        if f"{QUERY}.weight" in arrays:
            arrays[f"{QUERY}.weight"] = np.ones((32, 32), np.float16)

    for number, (change, id, says) in enumerate(
        [
            (drop, "quantised-missing", f"1 of {30 * 30 + 3} tensors are missing: {QUERY}.deq_scale"),
            (as_of_bfloat16, "quantised-dtype", f"{QUERY}.deq_scale is float32 and should be int64"),
            (short, "quantised-shape", f"{QUERY}.quant_bias is [31] and should be [32]"),
            (another_scale, "quantised-pair", f"{QUERY}.input_scale"),
            (another_offset, "quantised-pair", "transformer.h.29.mlp.gate_proj.input_offset"),
            (float_weight, "quantised-dtype", f"{QUERY}.weight is float16 and should be int8"),
        ]
    ):
        path = copy(quantised, tmp_path / str(number))
        edit_shard(path, change)
        problem = the_error(path)
        assert problem.id == id and says in problem.message, change.__name__


def test_w8a8_described_otherwise(quantised: Path, tmp_path: Path) -> None:
    path = copy(quantised, tmp_path)
    file = path / DESCRIPTION
    described = json.loads(file.read_text())

    def rewrite(changes: dict[str, Any]) -> None:
        file.write_text(json.dumps(merged(described, changes)))

    rewrite({f"{QUERY}.weight": None})
    assert any(item.id == "quantised-description" and QUERY in item.message for item in faults(path))
    for kind in ("W8A16", "W4A16", "W8A8_DYNAMIC", "W8A8S"):
        rewrite({"model_quant_type": kind})
        edit_json(path / "config.json", {"quantize": kind.lower()})
        problem = the_error(path)
        assert kind in problem.message and "convert_quant_weights.py" in problem.message
    rewrite({"model_quant_type": None})
    edit_json(path / "config.json", {"quantize": None})
    assert "does not say how" in the_error(path).message
    rewrite({})
    assert faults(path) == []  # MindIE takes the kind from the description, too
    edit_json(path / "config.json", {"quantize": "W8A8"})
    assert "letter by letter" in the_error(path).message
    edit_json(path / "config.json", {"quantize": "w8a8"})
    file.rename(path / "quant_model_description_w8a8.json")
    assert faults(path) == []


def test_a_float_query_beside_a_quantised_key_value(tmp_path: Path) -> None:
    arrays = make_w8a8_directory(tmp_path / "model", description={f"{QUERY}.weight": "FLOAT"})
    assert arrays
    path = tmp_path / "model"

    def as_float(stored: dict[str, np.ndarray]) -> None:
        if f"{QUERY}.weight" in stored:
            stored[f"{QUERY}.weight"] = np.ones((32, 32), np.float16)
            for name in ("input_scale", "input_offset", "quant_bias", "deq_scale"):
                stored.pop(f"{QUERY}.{name}", None)

    edit_shard(path, as_float)
    edit_shard(
        path,
        lambda stored: [
            stored.pop(name) for name in list(stored) if name.startswith(f"{QUERY}.") and "weight" not in name
        ],
    )
    problem = the_error(path)
    assert problem.id == "quantised-pair" and "cannot pack" in problem.message


def test_anti_outlier_norms_and_norm_biases_are_known(quantised: Path, tmp_path: Path) -> None:
    path = copy(quantised, tmp_path)
    norm = "transformer.h.0.input_layernorm"
    extra = {f"{norm}.{name}": np.ones(32, np.float16) for name in ("bias", "module.weight", "module.bias")}
    save_file(extra, path / "norms.safetensors")
    (path / "norms.safetensors").chmod(0o640)
    assert faults(path) == []


def test_what_atb_would_take_for_plain_numbers(tmp_path: Path) -> None:
    """The embedding and lm_head are never dequantised, and keys and values stay float16."""
    make_w8a8_directory(tmp_path / "head", description={"lm_head.weight": "W8A8"})
    assert any(item.id == "quantised-layers" and "lm_head.weight" in item.message for item in faults(tmp_path / "head"))
    make_w8a8_directory(tmp_path / "cache", description={"kv_quant_type": "C8"})
    assert "kv_quant_type 'C8'" in the_error(tmp_path / "cache").message
    make_w8a8_directory(tmp_path / "config", quantization_config={"fa_quant_type": "FAQuant", "group_size": 0})
    assert "fa_quant_type 'FAQuant'" in the_error(tmp_path / "config").message


def test_norms_that_are_described_must_be_there(tmp_path: Path) -> None:
    name = "transformer.h.0.input_layernorm.module.weight"
    make_w8a8_directory(tmp_path / "model", description={name: "FLOAT"})
    assert name in the_error(tmp_path / "model").message


def test_what_is_read_of_w8a8sc(compressed: Path, tmp_path: Path) -> None:
    directory = AtbDir.open(compressed)
    assert directory.quantised is not None and directory.quantised.kind == "W8A8SC"
    assert directory.tp == 2 and directory.allowed_tp == (2,)
    assert directory.rank_bytes(2) == sum(tensor.nbytes for tensor in directory.tensors.values()) // 2
    path = copy(compressed, tmp_path / "one")
    shutil.rmtree(path / "part1-of-2")
    assert "expected part0-of-2 to part1-of-2" in the_error(path).message
    (path / "part0-of-2" / DESCRIPTION).rename(path / DESCRIPTION)
    shutil.rmtree(path / "part0-of-2")
    assert "found none" in the_error(path).message
    path = copy(compressed, tmp_path / "two")
    edit_shard(path / "part1-of-2", lambda arrays: arrays.pop("transformer.h.7.mlp.gate_up_proj.index"))
    problem = the_error(path)
    assert (
        problem.id == "quantised-missing"
        and "part1-of-2" in problem.message
        and "gate_up_proj.index" in problem.message
    )


def test_the_compressors_names_below_38_layers(tmp_path: Path) -> None:
    """The compressor writes the names of the running model, which the loader looks for from 38 layers on."""
    make_w8a8sc_directory(tmp_path / "seven", prefix="model.")
    assert "begin with model., and MindIE looks for transformer." in the_error(tmp_path / "seven").message
    make_w8a8sc_directory(tmp_path / "large", prefix="model.", n_layer=38)
    assert faults(tmp_path / "large") == []


def test_ms_refuses_what_is_quantised(quantised: Path) -> None:
    """And names the way."""
    with pytest.raises((CheckpointError, ConfigError), match=r"W8A8.*--backend atb"):
        open_checkpoint(quantised)


def test_the_constants_of_the_helpers_are_those_of_the_rules() -> None:
    from telechat_mindie.model_dir.atb.generation import TOKEN_IDS
    from telechat_mindie.model_dir.atb.rules import REQUIRED_KEYS

    assert {key: GENERATION[key] for key in TOKEN_IDS} == TOKEN_IDS
    assert set(REQUIRED_KEYS) <= CONFIG.keys()
