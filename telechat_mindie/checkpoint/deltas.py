"""What adapters add to a weight: scale * B A of low rank, computed a tile at a time where the weight is read."""

from __future__ import annotations

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

    def load(self, reader: TensorReader) -> tuple[np.ndarray, np.ndarray]:
        """A [r, in] and B [out, r], in float32."""
        a, stored = (reader.load(tensor).astype(np.float32) for tensor in (self.a, self.b))
        if self.turned:
            a, stored = a.T, stored.T
        b = np.empty((sum(map(len, self.rows)), stored.shape[1]), np.float32)
        first = self.first_row
        for rows in self.rows:
            b[rows.start : rows.stop] = stored[first : first + len(rows)]
            first += len(rows)
        return a, b


class LoadedDeltas:
    """The factors of one weight's deltas in memory, side by side: their product is the sum of the deltas."""

    def __init__(self, deltas: Sequence[Delta], reader: TensorReader) -> None:
        factors = [delta.load(reader) for delta in deltas]
        self._a = np.concatenate([a for a, _ in factors])
        scaled = [delta.scale * b.astype(np.float64) for delta, (_, b) in zip(deltas, factors, strict=True)]
        self._b = np.concatenate(scaled, axis=1)

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
