"""LoRA adapters: what peft saves (a folder), or the `mindpet_delta_lora_*` tensors of a mindformers checkpoint.

An adapter is read with the same suspicion as a checkpoint, and becomes one `Delta` for each weight that it changes.
What would change the model in any other way than W + scale * B A is refused by its name, never ignored.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from telechat_mindie.checkpoint.deltas import Delta
from telechat_mindie.checkpoint.formats.bounds import quoted
from telechat_mindie.checkpoint.formats.safetensors import read_safetensors
from telechat_mindie.checkpoint.formats.tensors import StoredTensor, TensorReader, open_regular
from telechat_mindie.checkpoint.formats.torch import read_torch_bin
from telechat_mindie.checkpoint.mapping import MINDFORMERS_DROPPED, mindformers_targets, weights
from telechat_mindie.checkpoint.mindformers import rank_folders, read_file, weight_files
from telechat_mindie.checkpoint.tiles import float_dtype
from telechat_mindie.config import TelechatConfig
from telechat_mindie.errors import CheckpointError, ConfigError, InputError, name_some
from telechat_mindie.reading import read_json, read_text

CONFIG = "adapter_config.json"
FILES = {"adapter_model.safetensors": read_safetensors, "adapter_model.bin": read_torch_bin}  # as peft prefers them
MODEL_FILES = ("*.safetensors", "pytorch_model*.bin", "*.ckpt", "*.index.json", "rank_*")
NOT_A_MODEL = "Name the model that it was trained on as --checkpoint, and the adapter as --adapter."

MAX_FACTOR_BYTES = 256 << 20
"""Of one weight's A and B in memory: rank 64 of the 115B's largest takes 23 MB."""

_PEFT = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_(?:([AB])(?:\.\w+)?\.weight|(embedding_[AB])(?:\.\w+)?)")
_MINDFORMERS = re.compile(r"(.+)\.mindpet_delta_lora_([abAB])")

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

_Factors = dict[str, StoredTensor]
_ScaleOf = dict[str, float]


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter that fits a model: what it adds to each weight, by Hugging Face name."""

    name: str
    kind: str
    sha256: str
    deltas: Mapping[str, Delta]

    def describe(self) -> dict[str, object]:
        """What a manifest says of it; the scale is a list where the weights have several."""
        scales = sorted({delta.scale for delta in self.deltas.values()})
        scale = scales[0] if len(scales) == 1 else scales
        facts = {"name": self.name, "kind": self.kind, "sha256": self.sha256}
        return facts | {"scale": scale, "weights": len(self.deltas)}


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a peft adapter and no model beside it."""
    if not any((folder / name).exists() for name in (CONFIG, *FILES)):
        return False
    return all(path.name in FILES for pattern in MODEL_FILES for path in folder.glob(pattern))


def without_factors(stored: _Factors, path: Path, adapters: Iterable[str | Path]) -> _Factors:
    """The tensors of a mindformers checkpoint without those of an adapter that was trained in it.

    Raises:
        CheckpointError: it has such tensors, and nothing else, or `path` is not among the adapters to be merged.
    """
    model = {name: tensor for name, tensor in stored.items() if not _MINDFORMERS.fullmatch(name)}
    if len(model) < len(stored):
        if not model:
            raise CheckpointError("is a LoRA adapter, not a model", where=path, advice=NOT_A_MODEL)
        if not any(_parse(given)[0].resolve() == path.resolve() for given in adapters):
            raise CheckpointError(
                "holds a LoRA adapter beside the model", where=path, advice="Name it as --adapter too, to merge it."
            )
    return model


def read_adapter(given: str | Path, config: TelechatConfig, checkpoint: Path) -> Adapter:
    """The adapter that `given` names: a path, or PATH=SCALE where the files do not say the scale.

    Args:
        config: of the model.
        checkpoint: where the model is; a mindformers checkpoint may hold both.

    Raises:
        InputError: nothing is there, or a scale is given where none is wanted, or none where one is.
        ConfigError, CheckpointError: the files are damaged or hostile, do not fit the model, or say more than LoRA.
    """
    path, scale = _parse(given)
    if not path.exists():
        raise InputError("adapter is not there", where=path)
    if any((path / name).exists() for name in (CONFIG, *FILES)):
        if scale is not None:
            raise InputError("says its own scale", where=path / CONFIG, advice=f"Leave ={scale:g} out.")
        kind, file, deltas = "peft LoRA", *_read_peft(path, config)
    else:
        kind, file, deltas = "mindformers LoRA", *_read_mindformers(path, config, scale, checkpoint)
    with TensorReader() as reader:
        for name, delta in deltas.items():
            if not all(np.isfinite(factor).all() for factor in delta.load(reader)):
                raise CheckpointError("NaN or infinite values in the adapter", where=f"{file}: {name}")
    return Adapter(path.resolve().name, kind, _sha256(file), deltas)


def _parse(given: str | Path) -> tuple[Path, float | None]:
    path, _, number = str(given).rpartition("=")
    if not path or Path(given).exists():
        return Path(given), None
    return Path(path), _positive(number, f"--adapter {given}")


def _positive(value: object, where: object) -> float:
    """A positive number, or the text of one."""
    try:
        number = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not 0 < number < math.inf:
        raise ConfigError("is no positive number", where=where, found=quoted(value))
    return number


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(open_regular(path), "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _pairs(stored: Mapping[str, StoredTensor], pattern: re.Pattern[str], where: Path) -> dict[str, _Factors]:
    """The factors by module: "A" and "B", or "embedding_A" and "embedding_B" of an embedding.

    Raises:
        CheckpointError: a module has one of the two alone, or one of them twice.
    """
    pairs: dict[str, _Factors] = {}
    for name, tensor in stored.items():
        if match := pattern.fullmatch(name):
            module, *sides = match.groups()
            side = next(filter(None, sides))
            side = side.upper() if len(side) == 1 else side
            if side in pairs.setdefault(module, {}):
                raise CheckpointError(f"holds lora_{side} of two adapters", where=f"{where}: {module}")
            pairs[module][side] = tensor
    for module, factors in pairs.items():
        if factors.keys() not in ({"A", "B"}, {"embedding_A", "embedding_B"}):
            raise CheckpointError(
                f"holds {name_some(factors)} of an adapter's A and B",
                where=f"{where}: {module}",
                advice="The file is incomplete; save or download it again.",
            )
    return pairs


def _check_fit(delta: Delta, shape: tuple[int, ...], where: str) -> None:
    """Refuse factors that do not fit a target of this shape, or are too large to hold."""
    a, b = ((tensor.shape[::-1] if delta.turned else tensor.shape) for tensor in (delta.a, delta.b))
    if len(shape) != 2:
        raise CheckpointError("adapts what is no single matrix", where=where, found=list(shape))
    if len(a) != 2 or len(b) != 2 or (a[1], b[0]) != (shape[1], shape[0]) or a[0] != b[1] or not a[0]:
        raise CheckpointError(
            "adapter does not fit the weight",
            where=where,
            expected=f"A of r x {shape[1]} and B of {shape[0]} x r",
            found=f"{' x '.join(map(str, a))} and {' x '.join(map(str, b))}",
            advice="It was trained on another model.",
        )
    if a[0] * (4 * shape[1] + 8 * shape[0]) > MAX_FACTOR_BYTES:
        raise CheckpointError(f"rank {a[0]} is too large to merge in bounded memory", where=where)
    for tensor in (delta.a, delta.b):
        float_dtype(where, tensor)


def _read_peft(folder: Path, config: TelechatConfig) -> tuple[Path, dict[str, Delta]]:
    settings = read_json(folder / CONFIG)
    _check_settings(settings, folder / CONFIG)
    file = next((folder / name for name in FILES if (folder / name).exists()), None)
    if file is None:
        raise CheckpointError("holds no weights of the adapter", where=folder, expected=" or ".join(FILES))
    stored = FILES[file.name](file, folder)
    if others := [name for name in stored if not _PEFT.fullmatch(name)]:
        raise CheckpointError(
            f"holds {len(others)} tensors that are no LoRA factors: {name_some(others)}",
            where=file,
            advice="Copies of the embeddings can be left out: save_pretrained(..., save_embedding_layers=False).",
        )
    known = weights(config)
    deltas: dict[str, Delta] = {}
    for module, factors in _pairs(stored, _PEFT, file).items():
        names = [f"{prefix}{module}.weight" for prefix in ("", "transformer.")]
        name = next((name for name in names if name in known), "")
        where = f"{file}: {module}"
        embedding = "embedding_A" in factors
        if not name or name in deltas or embedding != (name == "transformer.word_embeddings.weight"):
            raise CheckpointError("adapts a weight that the model does not have", where=where, advice=NOT_A_MODEL)
        if config.tie_word_embeddings and name in ("lm_head.weight", "transformer.word_embeddings.weight"):
            raise CheckpointError("adapts one of two weights that are tied", where=where)
        scale, rows = 1.0, (range(known[name].shape[0]),)
        if embedding:  # of which peft stores A as [r, vocabulary] and B as [hidden, r]
            delta = Delta(scale, factors["embedding_B"], factors["embedding_A"], rows, turned=True)
        else:
            delta = Delta(scale, factors["A"], factors["B"], rows)
        _check_fit(delta, known[name].shape, where)
        rank = factors["embedding_A" if embedding else "A"].shape[0]
        deltas[name] = Delta(_scale(settings, module, rank, folder / CONFIG), delta.a, delta.b, rows, 0, embedding)
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

    alpha_pattern's keys are regular expressions there; a path or its end, which is what they are in practice, is
    compared as a text, and any other is refused.
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
        if f".{module}".endswith("." + key.removeprefix("^")):
            alpha = value
            break
    divisor = math.sqrt(rank) if settings.get("use_rslora") else rank
    return _positive(alpha, f"{where}: lora_alpha") / divisor


def _read_mindformers(
    path: Path, config: TelechatConfig, scale: float | None, checkpoint: Path
) -> tuple[Path, dict[str, Delta]]:
    file = _single_file(path)
    stored = {name: t for name, t in read_file(file, file.parent).items() if not MINDFORMERS_DROPPED.search(name)}
    pairs = _pairs(stored, _MINDFORMERS, file)
    if not pairs:
        raise CheckpointError(
            "holds no LoRA adapter",
            where=path,
            expected=f"peft's folder with {CONFIG}, or tensors named mindpet_delta_lora_a and _b",
        )
    others = [name for name in stored if not _MINDFORMERS.fullmatch(name)]
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
        _check_fit(Delta(1.0, factors["A"], factors["B"], ()), target.shape, where)
        if settings and _positive(settings.get("lora_rank"), "lora_rank") != factors["A"].shape[0]:
            found = factors["A"].shape[0]
            raise ConfigError("rank is not the yaml's", where=where, expected=settings["lora_rank"], found=found)
        rows: dict[str, list[range]] = {}  # of each weight, in the order in which they lie in B
        for part in target.parts:
            rows.setdefault(part.source, []).extend(part.pick_rows(range(part.shape[0])))
        first_row = 0
        for name, ranges in rows.items():
            if name in deltas:
                raise CheckpointError("is adapted twice, packed and not", where=f"{file}: {name}")
            factor = scale or _positive(settings.get("lora_alpha"), "lora_alpha") / factors["A"].shape[0]
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
