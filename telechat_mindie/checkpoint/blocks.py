"""A plan cut into blocks that fit a buffer, and the blocks read from the source."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from telechat_mindie.checkpoint.formats.tensors import TensorReader
from telechat_mindie.checkpoint.mapping import Target
from telechat_mindie.checkpoint.plan import Plan, Step, steps
from telechat_mindie.checkpoint.source import Checkpoint
from telechat_mindie.checkpoint.views import read_block
from telechat_mindie.dtypes import DTYPES

BLOCK_BYTES = 4 << 20
"""Small enough that a block is still in the processor's cache when it is checked, cast, hashed and written."""

TURN_BYTES = 128 << 20
"""The largest matrix that is held whole to be transposed; an expert of the 39B-A12B has 48 MiB."""


@dataclass(frozen=True)
class Block:
    """Part of a step. `rows` and `columns` are of the source weight; with `transposed` its array is [columns, rows]."""

    step: Step
    dtype: str
    rows: tuple[int, int]
    columns: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.rows[1] - self.rows[0], self.columns[1] - self.columns[0]
        return (columns, rows) if self.step.transposed else (rows, columns)

    def takers(self, array: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """(rank, the part of the block's array that is appended to that rank's file)."""
        for rank, (begin, end) in self.step.takers:
            left, right = max(begin, self.columns[0]) - self.columns[0], min(end, self.columns[1]) - self.columns[0]
            if left < right:
                yield rank, array[left:right] if self.step.transposed else array[:, left:right]


def blocks(target: Target, plan: Plan, checkpoint: Checkpoint) -> Iterator[Block]:
    """A target's bytes in the order of its file: whole source rows at a time, or source columns where transposed."""
    for step in steps(target, plan.config, plan.tp):
        dtype = checkpoint.weights[step.source].dtype
        item = max(DTYPES[dtype].itemsize, DTYPES[plan.dtype].itemsize)
        rows, columns = step.rows, (0, step.columns)
        cut = columns if step.transposed else rows
        across = rows[1] - rows[0] if step.transposed else step.columns
        stride = max(1, BLOCK_BYTES // (across * item))
        for begin in range(*cut, stride):
            piece = (begin, min(begin + stride, cut[1]))
            yield Block(step, dtype, rows, piece) if step.transposed else Block(step, dtype, piece, columns)


class BlockReader:
    """Reads blocks into given buffers, one after the other, in the order of the plan."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._reader = TensorReader()
        self._turning: tuple[Step, np.ndarray] | None = None

    def close(self) -> None:
        self._reader.__exit__()

    def read(self, block: Block, buffer: np.ndarray) -> np.ndarray:
        """The block's array, of the source's dtype, in `buffer` (bytes)."""
        array = view(buffer, DTYPES[block.dtype].numpy, block.shape)
        if block.step.transposed:
            array[:] = self._matrix(block).T
        else:
            self._read(block, block.columns, array)
        return array

    def _read(self, block: Block, columns: tuple[int, int], out: np.ndarray) -> None:
        read_block(self._reader, self._checkpoint.weights[block.step.source], block.rows, columns, out)

    def _matrix(self, block: Block) -> np.ndarray:
        """[rows, columns] of a block that is to be turned: cut from its step's matrix, which is read once.

        A matrix over TURN_BYTES is read a block at a time instead, row by row, which is slower but bounded.
        """
        dtype = DTYPES[block.dtype].numpy
        shape = (block.rows[1] - block.rows[0], block.step.columns)
        if shape[0] * shape[1] * dtype.itemsize > TURN_BYTES:
            part = np.empty((shape[0], block.columns[1] - block.columns[0]), dtype)
            self._read(block, block.columns, part)
            return part
        if self._turning is None or self._turning[0] is not block.step:
            matrix = self._turning[1] if self._turning else None
            if matrix is None or matrix.dtype != dtype or matrix.shape != shape:
                matrix = self._turning = None  # release the old one before the new one is taken
                matrix = np.empty(shape, dtype)
            self._read(block, (0, block.step.columns), matrix)
            self._turning = (block.step, matrix)
        return self._turning[1][:, slice(*block.columns)]


def view(buffer: np.ndarray, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """The front of a byte buffer as an array; a single row wider than the buffer gets memory of its own."""
    nbytes = int(np.prod(shape)) * dtype.itemsize
    if nbytes > buffer.nbytes:
        return np.empty(shape, dtype)
    return buffer[:nbytes].view(dtype).reshape(shape)
