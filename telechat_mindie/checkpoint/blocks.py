"""A target cut into blocks: rectangles of weights that are read once each, and what of them goes to which rank."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from telechat_mindie.checkpoint.mapping import Target
from telechat_mindie.checkpoint.sharding import split
from telechat_mindie.checkpoint.tiles import as_matrix, overlap


@dataclass(frozen=True, slots=True)
class Block:
    """`rows` x `columns` of the weight `source`; with `transposed` its array is [columns, rows].

    Each (rank, columns) of `shares` names the columns of the weight that are appended to that rank's file.
    """

    source: str
    rows: range
    columns: range
    shares: tuple[tuple[int, range], ...]
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = len(self.rows), len(self.columns)
        return (columns, rows) if self.transposed else (rows, columns)

    def split(self, array: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """(rank, the part of the block's array that is appended to that rank's file)."""
        for rank, columns in self.shares:
            if taken := overlap(columns, self.columns):
                part = slice(taken.start - self.columns.start, taken.stop - self.columns.start)
                yield rank, array[part] if self.transposed else array[:, part]

    def cut(self, elements: int) -> Iterator[Block]:
        """The block in pieces of at most `elements`, or of one line of its array where that has more."""
        lines = self.columns if self.transposed else self.rows
        stride = max(1, elements // self.shape[1])
        for begin in range(0, len(lines), stride):
            piece = lines[begin : begin + stride]
            yield replace(self, columns=piece) if self.transposed else replace(self, rows=piece)


def blocks(target: Target, tp: int) -> Iterator[Block]:
    """A target in the largest blocks there are, in the order in which their bytes lie in every rank's file."""
    for part in target.parts:
        shape = as_matrix(part.shape)
        by_rows: dict[range, list[tuple[int, range]]] = {}  # ranks that hold the same rows read them once
        for rank in range(tp):
            rows, columns = split(shape, target.role.per_expert, rank, tp)
            by_rows.setdefault(rows, []).append((rank, columns))
        for rows, shares in by_rows.items():
            for picked in part.pick_rows(rows):
                yield Block(part.source, picked, range(shape[1]), tuple(shares), target.transposed)
