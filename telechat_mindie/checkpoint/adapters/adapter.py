"""LoRA adapters, read with suspicion: each becomes one `Delta` for each weight that it changes.

What would change the model in any other way than W + scale * B A is refused by its name, never ignored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from telechat_mindie.checkpoint.adapters.factors import Factors, positive_number
from telechat_mindie.checkpoint.adapters.mindpet import model_tensors, read_mindformers
from telechat_mindie.checkpoint.adapters.peft import CONFIG, read_peft
from telechat_mindie.checkpoint.deltas import Delta
from telechat_mindie.checkpoint.formats.tensors import TensorReader, open_regular
from telechat_mindie.config import TelechatConfig
from telechat_mindie.errors import CheckpointError, InputError
from telechat_mindie.foreign import ADAPTER_FILES, IS_ADAPTER, NOT_A_MODEL

MODEL_FILES = ("*.safetensors", "pytorch_model*.bin", "*.ckpt", "*.index.json", "rank_*")


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
    if not any((folder / name).exists() for name in (CONFIG, *ADAPTER_FILES)):
        return False
    return all(path.name in ADAPTER_FILES for pattern in MODEL_FILES for path in folder.glob(pattern))


def without_factors(stored: Factors, path: Path, adapters: Iterable[str | Path]) -> Factors:
    """The tensors of a mindformers checkpoint without those of an adapter that was trained in it.

    Raises:
        CheckpointError: it has such tensors, and nothing else, or `path` is not among the adapters to be merged.
    """
    model = model_tensors(stored)
    if len(model) < len(stored):
        if not model:
            raise CheckpointError(IS_ADAPTER, where=path, advice=NOT_A_MODEL)
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
    if any((path / name).exists() for name in (CONFIG, *ADAPTER_FILES)):
        if scale is not None:
            raise InputError("says its own scale", where=path / CONFIG, advice=f"Leave ={scale:g} out.")
        kind, file, deltas = "peft LoRA", *read_peft(path, config)
    else:
        kind, file, deltas = "mindformers LoRA", *read_mindformers(path, config, scale, checkpoint)
    with TensorReader() as reader:
        for name, delta in deltas.items():
            if not all(np.isfinite(factor).all() for factor in delta.load(reader)):
                raise CheckpointError("NaN or infinite values in the adapter", where=f"{file}: {name}")
    return Adapter(path.resolve().name, kind, _sha256(file), deltas)


def _parse(given: str | Path) -> tuple[Path, float | None]:
    path, _, number = str(given).rpartition("=")
    if not path or Path(given).exists():
        return Path(given), None
    return Path(path), positive_number(number, f"--adapter {given}")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(open_regular(path), "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
