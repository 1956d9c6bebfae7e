"""Weights as a source gives them: rectangles, each of which one stored tensor holds."""

from __future__ import annotations

from dataclasses import dataclass

from telechat_mindie.checkpoint.deltas import Delta
from telechat_mindie.checkpoint.formats.tensors import StoredTensor
from telechat_mindie.dtypes import WEIGHT_DTYPES
from telechat_mindie.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Tile:
    """`rows` x `columns` of a weight, and where they lie in the stored tensor, seen as a matrix too.

    The stored matrix is `width` elements wide; the tile begins at `stored_row` and the first column of it. With
    `transposed` it lies there as [columns, rows].
    """

    stored: StoredTensor
    rows: range
    columns: range
    width: int
    stored_row: int = 0
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class TiledWeight:
    """A whole weight put together from tiles, and what adapters add to it. A vector is a matrix of one column."""

    dtype: str
    shape: tuple[int, int]
    tiles: tuple[Tile, ...]
    deltas: tuple[Delta, ...] = ()

    @property
    def read_dtype(self) -> str:
        """The dtype that blocks of it are read in."""
        return "float32" if self.deltas else self.dtype

    @property
    def elements(self) -> int:
        return self.shape[0] * self.shape[1]


def as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """The rows and columns of a weight of this shape."""
    return (shape[0], shape[1]) if len(shape) == 2 else (shape[0], 1)


def single_tile(name: str, stored: StoredTensor) -> TiledWeight:
    """A weight that one stored tensor holds entirely."""
    rows, columns = as_matrix(stored.shape)
    tile = Tile(stored, range(rows), range(columns), columns)
    return TiledWeight(float_dtype(name, stored), (rows, columns), (tile,))


def float_dtype(name: str, stored: StoredTensor) -> str:
    """The stored dtype. Raises CheckpointError where it is none that weights have."""
    if stored.dtype not in WEIGHT_DTYPES:
        raise CheckpointError(
            "has a dtype that weights do not have", where=name, expected=" or ".join(WEIGHT_DTYPES), found=stored.dtype
        )
    return stored.dtype


def overlap(one: range, other: range) -> range:
    """What two ranges have in common; empty, so false, where that is nothing."""
    return range(max(one.start, other.start), min(one.stop, other.stop))
