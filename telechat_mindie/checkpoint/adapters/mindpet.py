"""LoRA adapters that mindformers trains: tensors `mindpet_delta_lora_a` and `_b`, alone or beside the model."""

from __future__ import annotations

import re
from pathlib import Path

from telechat_mindie.checkpoint.adapters.factors import Factors, check_fit, factor_pairs, positive_number
from telechat_mindie.checkpoint.deltas import Delta
from telechat_mindie.checkpoint.mapping import MINDFORMERS_DROPPED, mindformers_targets
from telechat_mindie.checkpoint.mindformers import rank_folders, read_file, weight_files
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
    stored = {name: t for name, t in read_file(file, file.parent).items() if not MINDFORMERS_DROPPED.search(name)}
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
    settings = {} if scale is not None else _pet_config(path if path.is_dir() else path.parent)
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
        check_fit(Delta(1.0, factors["A"], factors["B"], ()), target.shape, where)
        if settings and positive_number(settings.get("lora_rank"), "lora_rank") != factors["A"].shape[0]:
            found = factors["A"].shape[0]
            raise ConfigError("rank is not the yaml's", where=where, expected=settings["lora_rank"], found=found)
        rows: dict[str, list[range]] = {}  # of each weight, in the order in which they lie in B
        for part in target.parts:
            rows.setdefault(part.source, []).extend(part.pick_rows(range(part.shape[0])))
        first_row = 0
        for name, ranges in rows.items():
            if name in deltas:
                raise CheckpointError("is adapted twice, packed and not", where=f"{file}: {name}")
            factor = scale or positive_number(settings.get("lora_alpha"), "lora_alpha") / factors["A"].shape[0]
            deltas[name] = Delta(factor, factors["A"], factors["B"], tuple(ranges), first_row)
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


def _pet_config(folder: Path) -> dict[str, str]:
    """model.model_config.pet_config of the folder's yaml: the rank and alpha that mindformers trained with.

    Raises:
        InputError: no yaml there says it, or two say different things.
    """
    found: list[dict[str, str]] = []
    for path in sorted(folder.glob("*.y*ml")):
        settings = _read_pet_config(path)
        if "lora_alpha" in settings and settings not in found:
            found.append(settings)
    if len(found) != 1:
        raise InputError(
            "the scale of the adapter is not known, for a mindformers checkpoint does not hold it",
            where=folder,
            expected="one yaml with model.model_config.pet_config, which has lora_rank and lora_alpha",
            found=len(found),
            advice="Put the finetuning yaml there, or name --adapter PATH=SCALE with the scale lora_alpha / lora_rank.",
        )
    return found[0]


def _read_pet_config(path: Path) -> dict[str, str]:
    """The scalars of a yaml's pet_config as texts. mindformers' yamls have aliases, so nodes are read, not values."""
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
    return {str(key.value): str(value.value) for key, value in entries}
