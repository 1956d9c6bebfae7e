"""Blocks read from the tiles that hold them, one after the other, into given buffers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from telechat_mindie.checkpoint.blocks import Block, blocks
from telechat_mindie.checkpoint.deltas import LoadedDeltas
from telechat_mindie.checkpoint.formats.tensors import TensorReader
from telechat_mindie.checkpoint.mapping import Target
from telechat_mindie.checkpoint.plan import ConversionPlan
from telechat_mindie.checkpoint.tiles import Tile, TiledWeight, overlap
from telechat_mindie.dtypes import DTYPES

BLOCK_BYTES = 4 << 20
"""Small enough that a block is still in the processor's cache when it is checked, cast, hashed and written."""

TURN_BYTES = 128 << 20
"""The largest matrix that is held whole to be transposed; an expert of the 39B-A12B has 48 MiB."""


class BlockReader:
    """Reads the blocks of `weights`, in the order of the plan; to be closed."""

    def __init__(self, weights: Mapping[str, TiledWeight]) -> None:
        self._weights = weights
        self._reader = TensorReader()
        self._turned: tuple[tuple[str, range], np.ndarray] | None = None  # source and rows, and their matrix
        self._deltas: tuple[str, LoadedDeltas] | None = None  # of the source that was read last

    def close(self) -> None:
        self._reader.__exit__()

    def blocks(self, target: Target, plan: ConversionPlan) -> Iterator[Block]:
        """The target in blocks of at most BLOCK_BYTES, or of a single line that is longer."""
        for block in blocks(target, plan.tp):
            dtypes = (self._weights[block.source].read_dtype, target.dtype or plan.dtype)
            yield from block.cut(BLOCK_BYTES // max(DTYPES[dtype].itemsize for dtype in dtypes))

    def read(self, block: Block, buffer: np.ndarray) -> np.ndarray:
        """The block's array, of the source's `read_dtype`, in `buffer` (bytes)."""
        weight = self._weights[block.source]
        array = view(buffer, DTYPES[weight.read_dtype].numpy, block.shape)
        if block.transposed:
            array[:] = self._rectangle(block).T
        elif weight.read_dtype == weight.dtype:
            self._fill(block.source, block.rows, block.columns, array)
        else:
            stored = np.empty(block.shape, DTYPES[weight.dtype].numpy)
            self._fill(block.source, block.rows, block.columns, stored)
            array[:] = stored
        if weight.deltas:
            if self._deltas is None or self._deltas[0] != block.source:
                self._deltas = None  # release those of the weight before
                self._deltas = (block.source, LoadedDeltas(weight.deltas, self._reader))
            self._deltas[1].add_to(array.T if block.transposed else array, block.rows, block.columns)
        return array

    def _rectangle(self, block: Block) -> np.ndarray:
        """[rows, columns] of a block that is to be turned: cut from its rows' whole matrix, which is read once.

        A matrix over TURN_BYTES is read a block at a time instead, row by row, which is slower but bounded.
        """
        weight = self._weights[block.source]
        dtype, shape = DTYPES[weight.dtype].numpy, (len(block.rows), weight.shape[1])
        if shape[0] * shape[1] * dtype.itemsize > TURN_BYTES:
            part = np.empty((len(block.rows), len(block.columns)), dtype)
            self._fill(block.source, block.rows, block.columns, part)
            return part
        key = (block.source, block.rows)
        if self._turned is None or self._turned[0] != key:
            matrix = self._turned[1] if self._turned else None
            if matrix is None or (matrix.dtype, matrix.shape) != (dtype, shape):
                matrix = self._turned = None  # release the old one before the new one is taken
                matrix = np.empty(shape, dtype)
            self._fill(block.source, block.rows, range(shape[1]), matrix)
            self._turned = (key, matrix)
        return self._turned[1][:, block.columns.start : block.columns.stop]

    def _fill(self, source: str, rows: range, columns: range, out: np.ndarray) -> None:
        """Fill `out` [rows, columns], of the weight's stored dtype, with that rectangle of the weight."""
        for tile in self._weights[source].tiles:
            shared_rows, shared_columns = overlap(rows, tile.rows), overlap(columns, tile.columns)
            if not shared_rows or not shared_columns:
                continue
            target = out[
                shared_rows.start - rows.start : shared_rows.stop - rows.start,
                shared_columns.start - columns.start : shared_columns.stop - columns.start,
            ]
            row, column = shared_rows.start - tile.rows.start, shared_columns.start - tile.columns.start
            if tile.transposed:
                turned = np.empty(target.shape[::-1], out.dtype)
                self._read(tile, tile.stored_row + column, row, turned)
                target[:] = turned.T
            else:
                self._read(tile, tile.stored_row + row, column, target)

    def _read(self, tile: Tile, row: int, column: int, out: np.ndarray) -> None:
        """Read out.shape elements at (row, column) of the stored matrix; `out` may be a view with any row stride."""
        item = out.dtype.itemsize
        if out.shape[1] == tile.width:
            lines = out if out.flags.c_contiguous else np.empty(out.shape, out.dtype)
            self._reader.read_into(tile.stored, row * tile.width * item, lines.reshape(-1).view(np.uint8).data)
            if lines is not out:
                out[:] = lines
            return
        line = np.empty(out.shape[1], out.dtype)
        for offset in range(out.shape[0]):
            self._reader.read_into(tile.stored, ((row + offset) * tile.width + column) * item, line.view(np.uint8).data)
            out[offset] = line


def view(buffer: np.ndarray, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """The front of a byte buffer as an array; a single row wider than the buffer gets memory of its own."""
    nbytes = int(np.prod(shape)) * dtype.itemsize
    if nbytes > buffer.nbytes:
        return np.empty(shape, dtype)
    return buffer[:nbytes].view(dtype).reshape(shape)
