"""The factors A and B of a LoRA adapter: found by name in pairs, and held against the weight that they change."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from telechat_mindie.checkpoint.deltas import Delta, loading_bytes
from telechat_mindie.checkpoint.formats.bounds import quoted
from telechat_mindie.checkpoint.formats.tensors import StoredTensor
from telechat_mindie.checkpoint.tiles import float_dtype
from telechat_mindie.errors import CheckpointError, ConfigError, name_some

MAX_FACTOR_BYTES = 256 << 20
"""Of all A and B of one weight while they are loaded: rank 64 of the 115B's largest linear layer takes 34 MB."""

Factors = dict[str, StoredTensor]


def factor_pairs(stored: Mapping[str, StoredTensor], pattern: re.Pattern[str], where: Path) -> dict[str, Factors]:
    """The factors by module: "A" and "B", or "embedding_A" and "embedding_B" of an embedding.

    Raises:
        CheckpointError: a module has one of the two alone, or one of them twice.
    """
    pairs: dict[str, Factors] = {}
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


def check_fit(delta: Delta, shape: tuple[int, ...], where: str) -> None:
    """Refuse factors that do not fit a target of this shape."""
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
    for tensor in (delta.a, delta.b):
        float_dtype(where, tensor)


def check_memory(deltas: Sequence[Delta], where: str) -> None:
    """Refuse the deltas of one weight where they are too large to be held side by side."""
    if loading_bytes(deltas) > MAX_FACTOR_BYTES:
        rank = sum(delta.rank for delta in deltas)
        raise CheckpointError(f"rank {rank} is too large to merge in bounded memory", where=where)


def positive_number(value: object, where: object) -> float:
    """A positive number, or the text of one."""
    try:
        number = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not 0 < number < math.inf:
        raise ConfigError("is no positive number", where=where, found=quoted(value))
    return number
