"""Directories as MindIE's atb loads them, in float16 and quantised, with layers of a few elements."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from helpers.tiny_tokenizer import train_tiny_tokenizer
from telechat_mindie.checkpoint.mapping import weights
from telechat_mindie.config import TelechatConfig
from telechat_mindie.findings import Finding
from telechat_mindie.model_dir.atb.inspect import inspect_atb
from telechat_mindie.model_dir.modes import User
from telechat_mindie.staging import DIR_MODE, FILE_MODE

CONFIG: dict[str, Any] = {
    "architectures": ["TeleChat2ForCausalLM"],
    "model_type": "telechat",
    "auto_map": {"AutoConfig": "configuration_telechat2.TelechatConfig"},
    "torch_dtype": "float16",
    "vocab_size": 512,
    "hidden_size": 32,
    "n_layer": 30,
    "n_head": 4,
    "num_key_value_heads": 2,
    "ffn_hidden_size": 48,
    "layer_norm_epsilon": 1e-5,
    "training_seqlen": 512,
    "base_seqlen": 512,
    "seq_length": 512,
}
GENERATION: dict[str, Any] = {
    "user_token_id": 4,
    "bot_token_id": 5,
    "eos_token_id": 2,
    "system_token_id": 6,
    "max_new_tokens": 128,
    "do_sample": False,
}
SHARD = "model-00001-of-00001.safetensors"
QUANTISED = ("self_attention.query", "self_attention.key_value", "self_attention.dense", "mlp.gate_proj", "mlp.up_proj")
"""What msmodelslim quantises by MindIE's recipe; down_proj and lm_head stay float."""


def make_atb_directory(
    directory: Path, *, generation: dict[str, Any] | None = None, dtype: str = "float16", **changes: Any
) -> dict[str, np.ndarray]:
    """Write a directory and give its weights. `changes` go into config.json; None drops a key."""
    config = merged(CONFIG, changes)
    arrays = {
        weight.name: np.ones(weight.shape, dtype)
        for weight in weights(TelechatConfig.from_dict(config | {"auto_map": None})).values()
    }
    _write(directory, config, generation, {SHARD: arrays})
    return arrays


def make_w8a8_directory(
    directory: Path,
    *,
    generation: dict[str, Any] | None = None,
    description: dict[str, Any] | None = None,
    **changes: Any,
) -> dict[str, np.ndarray]:
    """The same as msmodelslim leaves it, with `description` added to that of the weights."""
    config = merged(CONFIG, {"quantize": "w8a8"} | changes)
    plain = {key: value for key, value in config.items() if key not in ("quantize", "quantization_config", "auto_map")}
    rng = np.random.default_rng(8)
    arrays, described = {}, {"model_quant_type": "W8A8", "version": "1.0.0"}
    for weight in weights(TelechatConfig.from_dict(plain)).values():
        stem = weight.name.removesuffix(".weight")
        if not weight.name.endswith(".weight") or not stem.endswith(QUANTISED):
            arrays[weight.name] = rng.standard_normal(weight.shape).astype(np.float16)
            described[weight.name] = "FLOAT"
            continue
        outputs = weight.shape[0]
        arrays |= {
            weight.name: rng.integers(-128, 128, weight.shape, np.int8),
            f"{stem}.input_scale": np.full(1, 0.0625, np.float16),
            f"{stem}.input_offset": np.full(1, -3, np.float16),
            f"{stem}.quant_bias": rng.integers(-1000, 1000, outputs, np.int32),
            f"{stem}.deq_scale": rng.integers(0, 1 << 30, outputs, np.int64),
        }
        described |= dict.fromkeys((name for name in arrays if name.startswith(f"{stem}.")), "W8A8")
    half = len(arrays) // 2
    names = list(arrays)
    shards = {
        "quant_model_weight_w8a8-00001-of-00002.safetensors": {name: arrays[name] for name in names[:half]},
        "quant_model_weight_w8a8-00002-of-00002.safetensors": {name: arrays[name] for name in names[half:]},
    }
    _write(directory, config, generation, shards)
    (directory / "quant_model_description.json").write_text(json.dumps(merged(described, description or {})))
    _close(directory)
    return arrays


def make_w8a8sc_directory(directory: Path, tp: int = 2, prefix: str = "transformer.", **changes: Any) -> None:
    """What MindIE's sparse_compressor leaves: a folder a rank, with compressed weights."""
    config = merged(CONFIG, {"quantize": "w8a8sc"} | changes)
    _write(directory, config, None, {})
    vector, matrix = np.ones(4, np.float16), np.ones((4, 4), np.float16)
    for rank in range(tp):
        arrays = {f"{prefix}word_embeddings.weight": matrix, f"{prefix}ln_f.weight": vector, "lm_head.weight": matrix}
        described = {"model_quant_type": "W8A8SC"} | dict.fromkeys(arrays, "FLOAT")
        for layer in range(config["n_layer"]):
            stem = f"{prefix}h.{layer}."
            for name in ("input_layernorm.weight", "post_attention_layernorm.weight", "self_attention.dense.bias"):
                arrays[stem + name] = vector
            arrays |= {f"{stem}mlp.down_proj.weight": matrix, f"{stem}mlp.down_proj.bias": vector}
            for linear in (
                "self_attention.w_pack",
                "self_attention.w_pack_ori",
                "self_attention.dense",
                "mlp.gate_up_proj",
            ):
                arrays |= {
                    f"{stem}{linear}.weight": np.ones(9, np.int8),
                    f"{stem}{linear}.index": np.ones(3, np.int8),
                    f"{stem}{linear}.input_scale": np.ones(1, np.float16),
                    f"{stem}{linear}.input_offset": np.ones(1, np.float16),
                    f"{stem}{linear}.quant_bias": np.ones(4, np.int32),
                    f"{stem}{linear}.deq_scale": np.ones(4, np.int64),
                }
                described[f"{stem}{linear}.weight"] = "W8A8SC"
        folder = directory / f"part{rank}-of-{tp}"
        folder.mkdir()
        save_file(arrays, folder / "quant_model_weight_w8a8sc.safetensors")
        (folder / "quant_model_description.json").write_text(json.dumps(described))
    _close(directory)


def faults(path: Path, *, full: bool = False) -> list[Finding]:
    """What `inspect_atb` finds wrong, seen by this user."""
    return [item for item in inspect_atb(path, User(os.geteuid()), full=full).findings if item.severity != "ok"]


def merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in (values | changes).items() if value is not None}


def _write(
    directory: Path, config: dict[str, Any], generation: dict[str, Any] | None, shards: dict[str, dict[str, np.ndarray]]
) -> None:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text(json.dumps(merged(GENERATION, generation or {})))
    for name, arrays in shards.items():
        save_file(arrays, directory / name)
    train_tiny_tokenizer(directory)
    (directory / "tokenizer.json").write_text("{}")
    _close(directory)


def _close(directory: Path) -> None:
    for path in (directory, *directory.rglob("*")):
        path.chmod(DIR_MODE if path.is_dir() else FILE_MODE)
