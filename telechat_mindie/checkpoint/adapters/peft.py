"""LoRA adapters that peft saves: a folder with adapter_config.json and adapter_model.safetensors or .bin."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from telechat_mindie.checkpoint.adapters.factors import check_fit, factor_pairs, positive_number
from telechat_mindie.checkpoint.deltas import Delta
from telechat_mindie.checkpoint.formats.bounds import quoted
from telechat_mindie.checkpoint.formats.safetensors import read_safetensors
from telechat_mindie.checkpoint.formats.torch import read_torch_bin
from telechat_mindie.checkpoint.mapping import EMBEDDINGS, published_names, weights
from telechat_mindie.config import TelechatConfig
from telechat_mindie.errors import CheckpointError, ConfigError, name_some
from telechat_mindie.foreign import ADAPTER_FILES, NOT_A_MODEL
from telechat_mindie.reading import read_json

CONFIG = "adapter_config.json"
READERS = dict(zip(ADAPTER_FILES, (read_safetensors, read_torch_bin), strict=True))
"""By file name, in the order in which peft prefers them."""

_NAME = re.compile(r"(.+)\.lora_(?:([AB])(?:\.\w+)?\.weight|(embedding_[AB])(?:\.\w+)?)")

_SETTINGS = (
    "peft_type r lora_alpha use_rslora rank_pattern alpha_pattern bias init_lora_weights "
    # How it was trained, or which modules it has, which the tensors' names say too:
    "auto_mapping base_model_name_or_path revision task_type inference_mode peft_version lora_dropout target_modules "
    "exclude_modules layers_to_transform layers_pattern megatron_config megatron_core eva_config runtime_config "
    "qalora_group_size"
)
"""Keys of adapter_config.json that are read here, or need not be; any other may be there as long as it is off."""

_BASE_UNCHANGED = (True, False, None, "gaussian", "eva", "orthogonal")
"""init_lora_weights that leave W alone; pissa, olora, corda, loftq and others begin by changing it."""


def read_peft(folder: Path, config: TelechatConfig) -> tuple[Path, dict[str, Delta]]:
    """The file of weights, and what it adds to each weight by Hugging Face name.

    Raises:
        ConfigError, CheckpointError: a file is damaged or hostile, does not fit the model, or says more than LoRA.
    """
    settings = read_json(folder / CONFIG)
    _check_settings(settings, folder / CONFIG)
    file = next((folder / name for name in ADAPTER_FILES if (folder / name).exists()), None)
    if file is None:
        raise CheckpointError("holds no weights of the adapter", where=folder, expected=" or ".join(ADAPTER_FILES))
    stored = READERS[file.name](file, folder)
    if others := [name for name in stored if not _NAME.fullmatch(name)]:
        raise CheckpointError(
            f"holds {len(others)} tensors that are no LoRA factors: {name_some(others)}",
            where=file,
            advice="Copies of the embeddings can be left out: save_pretrained(..., save_embedding_layers=False).",
        )
    known = weights(config)
    pairs = {f"{module}.weight": factors for module, factors in factor_pairs(stored, _NAME, file).items()}
    deltas: dict[str, Delta] = {}
    for name, given in published_names(pairs, file).items():
        module, factors = given.removesuffix(".weight"), pairs[given]
        where = f"{file}: {module}"
        turned = "embedding_A" in factors  # an embedding's, of which peft stores A as [r, vocabulary], B as [hidden, r]
        if name not in known or turned != (name == EMBEDDINGS):
            raise CheckpointError("adapts a weight that the model does not have", where=where, advice=NOT_A_MODEL)
        a, b = (factors["embedding_B"], factors["embedding_A"]) if turned else (factors["A"], factors["B"])
        delta = Delta(1.0, a, b, (range(known[name].shape[0]),), turned=turned)
        check_fit(delta, known[name].shape, where)
        path = module.rpartition("base_model.model.")[2]
        deltas[name] = replace(delta, scale=_scale(settings, path, delta.rank, folder / CONFIG))
    if not deltas:
        raise CheckpointError("holds no tensors", where=file)
    return file, deltas


def _check_settings(settings: Mapping[str, Any], where: Path) -> None:
    """Refuse every adapter_config.json that asks for more than W + scale * B A."""
    if settings.get("peft_type") != "LORA":
        found = quoted(settings.get("peft_type"))
        raise ConfigError("is no LoRA adapter", where=f"{where}: peft_type", expected="LORA", found=found)
    refused = {key: value for key, value in settings.items() if value and key not in _SETTINGS.split()}
    if (bias := settings.get("bias", "none")) != "none":
        refused["bias"] = bias
    if (start := settings.get("init_lora_weights", True)) not in _BASE_UNCHANGED:
        refused["init_lora_weights"] = start
    for key, value in refused.items():
        raise ConfigError(
            "asks for what is not merged here",
            where=f"{where}: {quoted(key)}",
            found=quoted(value),
            advice="Merge it with peft: model.merge_and_unload(), then save_pretrained().",
        )


def _scale(settings: Mapping[str, Any], module: str, rank: int, where: Path) -> float:
    """peft's scaling of one module: alpha / r, with rslora alpha / sqrt(r) (peft/tuners/lora/layer.py, update_layer).

    alpha_pattern's keys are regular expressions there, matched with a module's path as `(.*\\.)?(KEY)$`. Those that are
    the end of a path, or behind `^` all of it, are compared as texts, which is practice, and any other is refused.

    Args:
        module: its path in the model that was trained.
        rank: of the weights; what rank_pattern says of the module need not be found, for peft loads no other.
    """
    ranks, alphas = (settings.get(key) or {} for key in ("rank_pattern", "alpha_pattern"))
    if not isinstance(ranks, dict) or not isinstance(alphas, dict):
        raise ConfigError("rank_pattern and alpha_pattern are not both tables", where=where)
    declared = [settings.get("r"), *ranks.values()]
    if rank not in declared:
        expected = " or ".join(map(quoted, declared))
        raise ConfigError(f"rank of {module} is another in the weights", where=where, expected=expected, found=rank)
    alpha = settings.get("lora_alpha")
    for key, value in alphas.items():
        if not re.fullmatch(r"\^?[\w.]+", key):
            raise ConfigError("is a pattern that is not understood", where=f"{where}: alpha_pattern", found=quoted(key))
        if module == key[1:] if key.startswith("^") else f".{module}".endswith(f".{key}"):
            alpha = value
            break
    divisor = math.sqrt(rank) if settings.get("use_rslora") else rank
    return positive_number(alpha, f"{where}: lora_alpha") / divisor
