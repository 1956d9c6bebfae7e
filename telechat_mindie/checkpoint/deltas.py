"""What adapters add to a weight: scale * B A of low rank, computed a tile at a time where the weight is read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from telechat_mindie.checkpoint.formats.tensors import StoredTensor, TensorReader

TILE_ROWS, TILE_COLUMNS = 16, 256
"""The grid that a product is computed on. It lies on the weight and not on the block that is read, and a BLAS gives
the same sums for the same tile, so that the bytes do not depend on the number of ranks or on how targets are packed."""


@dataclass(frozen=True, slots=True)
class Delta:
    """scale * B A, which one adapter adds to one weight [out, in].

    Attributes:
        a: A, [r, in].
        b: B, [out, r], whose rows from `first_row` on are for the weight's `rows`, in this order: a packed B has those
            of several weights.
        turned: both are stored the other way round, as [in, r] and [r, out].
    """

    scale: float
    a: StoredTensor
    b: StoredTensor
    rows: tuple[range, ...]
    first_row: int = 0
    turned: bool = False

    @property
    def rank(self) -> int:
        return self.a.shape[1 if self.turned else 0]

    def load(self, reader: TensorReader, a: np.ndarray, b: np.ndarray) -> None:
        """Fill `a` [r, in] with A and `b` [out, r] with scale * B, one after the other."""
        a[:] = self._matrix(reader, self.a)
        stored, first = self._matrix(reader, self.b), self.first_row
        for rows in self.rows:
            b[rows.start : rows.stop] = stored[first : first + len(rows)]
            first += len(rows)
        b *= self.scale

    def _matrix(self, reader: TensorReader, factor: StoredTensor) -> np.ndarray:
        return reader.load(factor).T if self.turned else reader.load(factor)


def factor_shapes(deltas: Sequence[Delta]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Of all A of one weight below each other, and of all its B side by side."""
    rank, first = sum(delta.rank for delta in deltas), deltas[0]
    return (rank, first.a.shape[0 if first.turned else 1]), (sum(map(len, first.rows)), rank)


def loading_bytes(deltas: Sequence[Delta]) -> int:
    """The most memory that `LoadedDeltas` takes: both factors of all, and one as it is stored beside them."""
    a, b = (math.prod(shape) for shape in factor_shapes(deltas))
    return 4 * a + 8 * b + max(factor.nbytes for delta in deltas for factor in (delta.a, delta.b))


class LoadedDeltas:
    """The factors of one weight's deltas in memory, side by side: their product is the sum of the deltas."""

    def __init__(self, deltas: Sequence[Delta], reader: TensorReader) -> None:
        a_shape, b_shape = factor_shapes(deltas)
        self._a, self._b = np.empty(a_shape, np.float32), np.empty(b_shape, np.float64)
        first = 0
        for delta in deltas:
            ranks = slice(first, first + delta.rank)
            delta.load(reader, self._a[ranks], self._b[:, ranks])
            first += delta.rank

    def add_to(self, block: np.ndarray, rows: range, columns: range) -> None:
        """Add to a float32 block that holds these rows and columns of the weight.

        Sums are float64, so each element is W + scale * B A rounded to float32 once.
        """
        with np.errstate(over="ignore", invalid="ignore"):  # what comes of it is counted as an odd value
            for row in range(rows.start - rows.start % TILE_ROWS, rows.stop, TILE_ROWS):
                for column in range(columns.start - columns.start % TILE_COLUMNS, columns.stop, TILE_COLUMNS):
                    tile = self._b[row : row + TILE_ROWS] @ self._a[:, column : column + TILE_COLUMNS]
                    top, left = max(row, rows.start), max(column, columns.start)
                    bottom, right = min(row + TILE_ROWS, rows.stop), min(column + TILE_COLUMNS, columns.stop)
                    part = block[top - rows.start : bottom - rows.start, left - columns.start : right - columns.start]
                    part += tile[top - row : bottom - row, left - column : right - column]
