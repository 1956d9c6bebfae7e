"""LoRA adapters, read with suspicion: each becomes one `Delta` for each weight that it changes.

What would change the model in any other way than W + scale * B A is refused by its name, never ignored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from telechat_mindie.checkpoint.adapters.factors import Factors, check_memory, positive_number
from telechat_mindie.checkpoint.adapters.mindpet import model_tensors, read_mindformers
from telechat_mindie.checkpoint.adapters.peft import CONFIG, read_peft
from telechat_mindie.checkpoint.deltas import Delta
from telechat_mindie.checkpoint.formats.tensors import TensorReader
from telechat_mindie.checkpoint.mapping import EMBEDDINGS, HEAD
from telechat_mindie.config import TelechatConfig
from telechat_mindie.errors import CheckpointError, InputError
from telechat_mindie.foreign import ADAPTER_FILES, IS_ADAPTER, NOT_A_MODEL
from telechat_mindie.reading import existing_path


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter that fits a model: what it adds to each weight, by Hugging Face name.

    `sha256` is of its factors alone, whatever else their file holds: in the order of their names, of each the name and
    then the bytes.
    """

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


def parse_adapter(given: str | Path) -> tuple[Path, float | None]:
    """The path and scale of an adapter that is named by its path, or as PATH=SCALE where its files do not say it.

    Raises:
        ConfigError: the scale is no positive number.
    """
    path, _, number = str(given).rpartition("=")
    if not path or Path(given).exists():
        return Path(given), None
    return Path(path), positive_number(number, f"--adapter {given}")


def without_factors(stored: Factors, path: Path, adapters: Container[Path]) -> Factors:
    """The tensors of a mindformers checkpoint without those of an adapter that was trained in it.

    Args:
        adapters: paths of those to be merged, resolved.

    Raises:
        CheckpointError: it has such tensors, and nothing else, or `path` is not among the adapters to be merged.
    """
    model = model_tensors(stored)
    if len(model) < len(stored):
        if not model:
            raise CheckpointError(IS_ADAPTER, where=path, advice=NOT_A_MODEL)
        if path.resolve() not in adapters:
            raise CheckpointError(
                "holds a LoRA adapter beside the model", where=path, advice="Name it as --adapter too, to merge it."
            )
    return model


def read_adapter(path: Path, scale: float | None, config: TelechatConfig, checkpoint: Path) -> Adapter:
    """The adapter at `path`; its factors are read once, to be hashed and checked.

    Args:
        scale: None where the files say it.
        config: of the model.
        checkpoint: where the model is; a mindformers checkpoint may hold both.

    Raises:
        InputError: nothing is there, or a scale is given where none is wanted, or none where one is.
        ConfigError, CheckpointError: the files are damaged or hostile, do not fit the model, or say more than LoRA.
    """
    existing_path(path, "adapter")
    if any((path / name).exists() for name in (CONFIG, *ADAPTER_FILES)):
        if scale is not None:
            raise InputError("says its own scale", where=path / CONFIG, advice=f"Leave ={scale:g} out.")
        kind, file, deltas = "peft LoRA", *read_peft(path, config)
    else:
        kind, file, deltas = "mindformers LoRA", *read_mindformers(path, config, scale, checkpoint)
    for name, delta in deltas.items():
        if config.tie_word_embeddings and name in (EMBEDDINGS, HEAD):
            raise CheckpointError("adapts one of two weights that are tied", where=f"{file}: {name}")
        check_memory([delta], f"{file}: {name}")
    return Adapter(path.resolve().name, kind, _sha256(file, deltas.values()), deltas)


def _sha256(file: Path, deltas: Iterable[Delta]) -> str:
    factors = {factor.name: factor for delta in deltas for factor in (delta.a, delta.b)}
    digest = hashlib.sha256()
    with TensorReader() as reader:
        for name, factor in sorted(factors.items()):
            array = reader.load(factor)
            if not np.isfinite(array).all():
                raise CheckpointError("NaN or infinite values in the adapter", where=f"{file}: {name}")
            digest.update(name.encode())
            digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
