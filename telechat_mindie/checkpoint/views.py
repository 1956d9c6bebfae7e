"""Whole weights seen through the tensors that hold them, read a rectangle at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from telechat_mindie.checkpoint.formats.tensors import StoredTensor, TensorReader
from telechat_mindie.dtypes import WEIGHT_DTYPES
from telechat_mindie.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Tile:
    """A rectangle of a whole weight that one stored tensor holds, both seen as matrices.

    It covers `rows` x `columns` elements at (`row`, `column`) of the weight. In the stored matrix, which is `width`
    elements wide, it begins at `source_row` and the first column; with `transposed` it lies there as [columns, rows].
    """

    stored: StoredTensor
    row: int
    column: int
    rows: int
    columns: int
    width: int
    source_row: int = 0
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class SourceWeight:
    """A whole weight under its Hugging Face name, put together from tiles. A vector is a matrix of one column."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    tiles: tuple[Tile, ...]


def whole(name: str, stored: StoredTensor) -> SourceWeight:
    """A weight that one stored tensor holds entirely."""
    columns = stored.shape[1] if len(stored.shape) == 2 else 1
    return SourceWeight(
        name, float_dtype(name, stored), stored.shape, (Tile(stored, 0, 0, stored.shape[0], columns, columns),)
    )


def float_dtype(name: str, stored: StoredTensor) -> str:
    """The stored dtype. Raises CheckpointError where it is none that weights have."""
    if stored.dtype not in WEIGHT_DTYPES:
        raise CheckpointError(
            "has a dtype that weights do not have", where=name, expected=" or ".join(WEIGHT_DTYPES), found=stored.dtype
        )
    return stored.dtype


def read_block(
    reader: TensorReader, weight: SourceWeight, rows: tuple[int, int], columns: tuple[int, int], out: np.ndarray
) -> None:
    """Fill `out` [rows, columns], of the weight's stored dtype, with that rectangle of the weight."""
    for tile in weight.tiles:
        top, bottom = max(rows[0], tile.row), min(rows[1], tile.row + tile.rows)
        left, right = max(columns[0], tile.column), min(columns[1], tile.column + tile.columns)
        if top >= bottom or left >= right:
            continue
        target = out[top - rows[0] : bottom - rows[0], left - columns[0] : right - columns[0]]
        row, column = top - tile.row, left - tile.column
        if tile.transposed:
            source = np.empty(target.shape[::-1], out.dtype)
            _read_rectangle(reader, tile, tile.source_row + column, row, source)
            target[:] = source.T
        else:
            _read_rectangle(reader, tile, tile.source_row + row, column, target)


def _read_rectangle(reader: TensorReader, tile: Tile, row: int, column: int, out: np.ndarray) -> None:
    """Read out.shape elements at (row, column) of the stored matrix; `out` may be a view with any row stride."""
    item = out.dtype.itemsize
    if column == 0 and out.shape[1] == tile.width:
        rows = out if out.flags.c_contiguous else np.empty(out.shape, out.dtype)
        reader.read_into(tile.stored, row * tile.width * item, rows.reshape(-1).view(np.uint8).data)
        if rows is not out:
            out[:] = rows
        return
    line = np.empty(out.shape[1], out.dtype)
    for offset in range(out.shape[0]):
        reader.read_into(tile.stored, ((row + offset) * tile.width + column) * item, line.view(np.uint8).data)
        out[offset] = line
