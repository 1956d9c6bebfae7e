"""Weights checked for sane numbers and cast between the three weight dtypes, block by block, into given buffers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FLOAT16_OVERFLOW = 65520.0
"""The smallest magnitude that rounds to infinity in float16 (65504 is the largest finite value)."""


@dataclass(slots=True)
class OddValues:
    """Numbers that a weight should not hold, counted in its source elements."""

    nan: int = 0
    infinite: int = 0
    overflow: int = 0  # finite, but not in float16

    def __bool__(self) -> bool:
        return bool(self.nan or self.infinite or self.overflow)

    def __iadd__(self, other: OddValues) -> OddValues:
        self.nan += other.nan
        self.infinite += other.infinite
        self.overflow += other.overflow
        return self


def count_odd_values(block: np.ndarray, target_dtype: str, scratch: np.ndarray) -> OddValues:
    """Count NaN, infinity and values that overflow in `target_dtype`. The common case, none, is two fast passes.

    Args:
        scratch: bytes to compute in; memory is allocated where a block has more.
    """
    limit = FLOAT16_OVERFLOW if target_dtype == "float16" else np.inf
    if block.itemsize == 2:
        # Without its sign, a 16-bit float's bits are ordered as its value; NaN comes after infinity.
        out = scratch[: block.nbytes].view(np.uint16).reshape(block.shape) if block.nbytes <= scratch.nbytes else None
        magnitude = np.bitwise_and(block.view(np.uint16), 0x7FFF, out=out).max(initial=0)
        with np.errstate(over="ignore"):
            if magnitude < np.array(limit).astype(block.dtype).view(np.uint16):
                return OddValues()
    elif -limit < block.min(initial=0) and block.max(initial=0) < limit:  # False for NaN too
        return OddValues()
    wide = block.astype(np.float32)
    infinite = int(np.isinf(wide).sum())
    overflow = int((np.abs(wide) >= limit).sum()) - infinite  # none where the limit is infinity itself
    return OddValues(int(np.isnan(wide).sum()), infinite, overflow)


def cast_into(source: np.ndarray, target: np.ndarray) -> None:
    """Copy `source` into `target` of the same shape, rounding to nearest even where the dtype is narrower."""
    if source.dtype != target.dtype and np.float32 not in (source.dtype, target.dtype):
        source = source.astype(np.float32)  # float16 <-> bfloat16: neither holds the other, float32 holds both
    with np.errstate(over="ignore", invalid="ignore"):
        np.copyto(target, source, casting="unsafe")
