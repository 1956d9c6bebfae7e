"""LoRA adapters that mindformers trains: tensors `mindpet_delta_lora_a` and `_b`, alone or beside the model."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from telechat_mindie.checkpoint.adapters.factors import Factors, check_fit, factor_pairs, positive_number
from telechat_mindie.checkpoint.deltas import Delta
from telechat_mindie.checkpoint.mapping import mindformers_targets
from telechat_mindie.checkpoint.mindformers import rank_folders, read_weights, weight_files
from telechat_mindie.config import TelechatConfig
from telechat_mindie.errors import CheckpointError, ConfigError, InputError, name_some
from telechat_mindie.foreign import NOT_A_MODEL
from telechat_mindie.reading import read_text

_NAME = re.compile(r"(.+)\.mindpet_delta_lora_([abAB])")


def model_tensors(stored: Factors) -> Factors:
    """The tensors of a checkpoint without an adapter's factors."""
    return {name: tensor for name, tensor in stored.items() if not _NAME.fullmatch(name)}


def read_mindformers(
    path: Path, config: TelechatConfig, scale: float | None, checkpoint: Path
) -> tuple[Path, dict[str, Delta]]:
    """The file of weights, and what it adds to each weight by Hugging Face name.

    Args:
        scale: None where the yaml beside the file says it.
        checkpoint: where the model is; the file may hold both.

    Raises:
        InputError: the scale is not known.
        ConfigError, CheckpointError: the files are damaged or hostile, or do not fit the model.
    """
    file = _single_file(path)
    stored = read_weights(file, file.parent)
    pairs = factor_pairs(stored, _NAME, file)
    if not pairs:
        raise CheckpointError(
            "holds no LoRA adapter",
            where=path,
            expected="peft's folder with adapter_config.json, or tensors named mindpet_delta_lora_a and _b",
        )
    others = model_tensors(stored)
    if others and path.resolve() != checkpoint.resolve():
        raise CheckpointError(
            f"holds {len(others)} tensors beside the adapter: {name_some(others)}",
            where=file,
            advice="Where they are the model that was trained, name this as --checkpoint too.",
        )
    rank = None
    if scale is None:
        rank, alpha = _rank_and_alpha(path if path.is_dir() else path.parent)
        scale = alpha / rank
    targets = {
        target.name.removesuffix(".weight"): target
        for packed in (True, False)
        for target in mindformers_targets(config, qkv_concat=packed, transposed_experts=False)
        if target.name.endswith(".weight")
    }
    deltas: dict[str, Delta] = {}
    for module, factors in pairs.items():
        where = f"{file}: {module}"
        if module not in targets:
            raise CheckpointError("adapts a weight that the model does not have", where=where, advice=NOT_A_MODEL)
        target = targets[module]
        whole = Delta(scale, factors["A"], factors["B"], ())
        check_fit(whole, target.shape, where)
        if rank not in (None, whole.rank):
            raise ConfigError("rank is not the yaml's", where=where, expected=f"{rank:g}", found=whole.rank)
        rows: dict[str, list[range]] = {}  # of each weight, in the order in which they lie in B
        for part in target.parts:
            rows.setdefault(part.source, []).extend(part.pick_rows(range(part.shape[0])))
        first_row = 0
        for name, ranges in rows.items():
            if name in deltas:
                raise CheckpointError("is adapted twice, packed and not", where=f"{file}: {name}")
            deltas[name] = replace(whole, rows=tuple(ranges), first_row=first_row)
            first_row += sum(map(len, ranges))
    return file, deltas


def _single_file(path: Path) -> Path:
    """The one weight file of a path: itself, or the folder's or its rank_0's."""
    if path.is_file():
        return path
    folders = rank_folders(path)
    if len(folders) > 1:
        raise CheckpointError(
            "is an adapter in the parts of several ranks",
            where=path,
            found=f"{len(folders)} rank folders",
            advice="Merge them first with mindformers' transform_checkpoint.py.",
        )
    files = weight_files(folders[0] if folders else path)
    if len(files) > 1:
        raise CheckpointError(
            f"holds several checkpoints: {name_some(file.name for file in files)}",
            where=path,
            advice="Name one file as --adapter.",
        )
    return files[0]


def _rank_and_alpha(folder: Path) -> tuple[float, float]:
    """What mindformers trained with: lora_rank and lora_alpha of model.model_config.pet_config in the folder's yaml.

    Raises:
        InputError: no yaml there says them, or two say different things.
        ConfigError: one of them is no positive number.
    """
    found = set()
    for path in sorted(folder.glob("*.y*ml")):
        settings = _read_pet_config(path)
        if "lora_alpha" in settings:
            rank, alpha = (positive_number(settings.get(key), f"{path}: {key}") for key in ("lora_rank", "lora_alpha"))
            found.add((rank, alpha))
    if len(found) != 1:
        raise InputError(
            "the scale of the adapter is not known, for a mindformers checkpoint does not hold it",
            where=folder,
            expected="one yaml with model.model_config.pet_config, which has lora_rank and lora_alpha",
            found=len(found),
            advice="Put the finetuning yaml there, or name --adapter PATH=SCALE with the scale lora_alpha / lora_rank.",
        )
    return found.pop()


def _read_pet_config(path: Path) -> dict[str, str]:
    """A yaml's pet_config as texts, those of what is no scalar a word for it.

    mindformers' yamls have aliases, so nodes are read, not values.
    """
    import yaml

    text = read_text(path, 1 << 18)
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"is not plain YAML: {error}", where=path) from None
    for wanted in ("model", "model_config", "pet_config"):
        entries = node.value if isinstance(node, yaml.MappingNode) else []
        node = next((value for key, value in entries if key.value == wanted), None)
    entries = node.value if isinstance(node, yaml.MappingNode) else []
    return {
        str(key.value): value.value if isinstance(value, yaml.ScalarNode) else f"a {value.id}" for key, value in entries
    }
