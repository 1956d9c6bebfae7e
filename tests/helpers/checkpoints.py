"""Synthetic TeleChat2 checkpoints in the Hugging Face format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from helpers.tiny_tokenizer import train_tiny_tokenizer
from telechat_mindie.checkpoint.mapping import weights
from telechat_mindie.config import TelechatConfig
from telechat_mindie.dtypes import DTYPES

CONFIG: dict[str, Any] = {
    "architectures": ["TelechatForCausalLM"],
    "model_type": "telechat",
    "vocab_size": 512,
    "hidden_size": 64,
    "n_layer": 2,
    "n_head": 8,
    "num_key_value_heads": 4,
    "ffn_hidden_size": 96,
    "layer_norm_epsilon": 1e-5,
    "training_seqlen": 512,
    "base_seqlen": 512,
    "seq_length": 512,
}
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}


def make_weights(config: TelechatConfig, dtype: str, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    found = {}
    for weight in weights(config).values():
        values = rng.standard_normal(weight.shape, dtype=np.float32) * 0.1
        found[weight.name] = (values + (len(weight.shape) == 1)).astype(DTYPES[dtype].numpy)
    return found


def make_checkpoint(directory: Path, dtype: str = "float32", shards: int = 2, **changes: Any) -> dict[str, np.ndarray]:
    """Write a checkpoint and give its weights by Hugging Face name. `changes` go into config.json; None drops a key."""
    directory.mkdir(parents=True, exist_ok=True)
    data = {key: value for key, value in (CONFIG | changes).items() if value is not None}
    (directory / "config.json").write_text(json.dumps(data))
    arrays = make_weights(TelechatConfig.from_dict(data), dtype)
    names = list(arrays)
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        chosen = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        save_file({name: arrays[name] for name in chosen}, directory / file)
        weight_map |= dict.fromkeys(chosen, file)
    total = sum(array.nbytes for array in arrays.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    train_tiny_tokenizer(directory)
    return arrays
