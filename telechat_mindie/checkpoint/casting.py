"""Weights checked for sane numbers and cast between the three weight dtypes, block by block, into given buffers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FLOAT16_OVERFLOW = 65520.0
"""The smallest magnitude that rounds to infinity in float16 (65504 is the largest finite value)."""

_INFINITY_BITS = {"float16": 0x7C00, "bfloat16": 0x7F80}


@dataclass(slots=True)
class Findings:
    """Numbers that a weight should not hold, counted in its source elements."""

    nan: int = 0
    infinite: int = 0
    overflow: int = 0  # finite, but not in float16

    def __bool__(self) -> bool:
        return bool(self.nan or self.infinite or self.overflow)

    def __iadd__(self, other: Findings) -> Findings:
        self.nan += other.nan
        self.infinite += other.infinite
        self.overflow += other.overflow
        return self


def inspect(block: np.ndarray, target_dtype: str, scratch: np.ndarray | None = None) -> Findings:
    """Count NaN, infinity and values that overflow in `target_dtype`. The common case, none, is two fast passes.

    Args:
        scratch: bytes to compute in, at least as many as the block's; without it they are allocated at each call.
    """
    source_dtype = block.dtype.name
    if source_dtype in _INFINITY_BITS:
        out = None if scratch is None else scratch[: block.nbytes].view(np.uint16).reshape(block.shape)
        magnitude = int(np.bitwise_and(block.view(np.uint16), 0x7FFF, out=out).max(initial=0))
        limit = _INFINITY_BITS[source_dtype]
        if target_dtype == "float16" and source_dtype == "bfloat16":
            limit = 0x4780  # 65536.0, the first bfloat16 above FLOAT16_OVERFLOW
        if magnitude < limit:
            return Findings()
    else:
        limit32 = FLOAT16_OVERFLOW if target_dtype == "float16" else np.inf
        if -limit32 < block.min(initial=0) and block.max(initial=0) < limit32:  # False for NaN too
            return Findings()
    wide = block.astype(np.float32)
    nan = int(np.isnan(wide).sum())
    infinite = int(np.isinf(wide).sum())
    overflow = 0
    if target_dtype == "float16":
        overflow = int((np.abs(wide) >= FLOAT16_OVERFLOW).sum()) - infinite
    return Findings(nan, infinite, overflow)


def cast_into(source: np.ndarray, target: np.ndarray) -> None:
    """Copy `source` into `target` of the same shape, rounding to nearest even where the dtype is narrower."""
    if source.dtype == target.dtype or np.float32 in (source.dtype, target.dtype):
        with np.errstate(over="ignore", invalid="ignore"):
            np.copyto(target, source, casting="unsafe")
        return
    # float16 <-> bfloat16: neither holds the other, float32 holds both.
    wide = source.astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        np.copyto(target, wide, casting="unsafe")
