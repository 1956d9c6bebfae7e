"""A checkpoint directory as a lazy `name -> tensor` view: Hugging Face names, whatever the files are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from telechat_mindie.checkpoint.mapping import check_names, weights
from telechat_mindie.checkpoint.safetensors_format import read_safetensors
from telechat_mindie.checkpoint.tensors import DTYPES, FLOAT_DTYPES, StoredTensor, TensorReader
from telechat_mindie.checkpoint.torch_format import read_torch_bin
from telechat_mindie.config import TelechatConfig
from telechat_mindie.errors import CheckpointError, name_some
from telechat_mindie.files import existing_directory, read_json


@dataclass(frozen=True, slots=True)
class Tile:
    """A rectangle of a whole weight that one stored tensor holds, both seen as matrices [rows, columns].

    It covers `rows` x `columns` elements at (`row`, `column`) of the weight, from (`source_row`, `source_column`) of
    the stored tensor; with `transposed` the stored rectangle is [columns, rows].
    """

    stored: StoredTensor
    row: int
    column: int
    rows: int
    columns: int
    source_row: int = 0
    source_column: int = 0
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class SourceWeight:
    """A whole weight under its Hugging Face name, put together from tiles. A vector is a matrix of one column."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    tiles: tuple[Tile, ...]

    @property
    def columns(self) -> int:
        return self.shape[1] if len(self.shape) == 2 else 1


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose every weight is accounted for. `kind` says what the files are, for messages and manifests."""

    directory: Path
    kind: str
    config: TelechatConfig
    weights: Mapping[str, SourceWeight]

    @property
    def dtype(self) -> str:
        """The dtype that most of the weights' bytes have."""
        sizes: dict[str, int] = {}
        for weight in self.weights.values():
            sizes[weight.dtype] = sizes.get(weight.dtype, 0) + sum(tile.rows * tile.columns for tile in weight.tiles)
        return max(sizes, key=lambda dtype: sizes[dtype])

    @property
    def source_bytes(self) -> int:
        return sum(
            tile.rows * tile.columns * DTYPES[weight.dtype].itemsize
            for weight in self.weights.values()
            for tile in weight.tiles
        )


def open_checkpoint(directory: Path) -> Checkpoint:
    """Recognise and index the checkpoint in `directory`; only headers are read.

    Raises:
        ConfigError: config.json is missing or not TeleChat2's.
        CheckpointError: no weights, a damaged or hostile file, or names, shapes or dtypes that do not fit the config.
    """
    existing_directory(directory, "checkpoint")
    config = TelechatConfig.from_directory(directory)
    kind, stored = _read_hugging_face(directory)
    check_names(stored, config, directory)
    found: dict[str, SourceWeight] = {}
    for weight in weights(config).values():
        tied = config.tie_word_embeddings and weight.name == "lm_head.weight" and weight.name not in stored
        tensor = stored["transformer.word_embeddings.weight" if tied else weight.name]
        if tensor.shape != weight.shape:
            raise CheckpointError(
                "has the wrong shape", where=weight.name, expected=list(weight.shape), found=list(tensor.shape)
            )
        found[weight.name] = whole(weight.name, tensor)
    return Checkpoint(directory, kind, config, found)


def whole(name: str, stored: StoredTensor) -> SourceWeight:
    """A weight that one stored tensor holds entirely."""
    if stored.dtype not in FLOAT_DTYPES:
        raise CheckpointError(
            "has a dtype that weights do not have", where=name, expected=" or ".join(FLOAT_DTYPES), found=stored.dtype
        )
    rows, columns = stored.shape[0], stored.shape[1] if len(stored.shape) == 2 else 1
    return SourceWeight(name, stored.dtype, stored.shape, (Tile(stored, 0, 0, rows, columns),))


def _read_hugging_face(directory: Path) -> tuple[str, dict[str, StoredTensor]]:
    for kind, index, pattern, read in (
        ("Hugging Face safetensors", "model.safetensors.index.json", "*.safetensors", read_safetensors),
        ("Hugging Face torch archive", "pytorch_model.bin.index.json", "pytorch_model*.bin", read_torch_bin),
    ):
        weight_map = None
        if (directory / index).exists():
            weight_map = _read_index(directory / index)
            files = sorted(set(weight_map.values()))
        else:
            files = sorted(path.name for path in directory.glob(pattern))
        if not files:
            continue
        stored: dict[str, StoredTensor] = {}
        for file in files:
            tensors = read(directory / file, directory)
            twice = stored.keys() & tensors.keys()
            if twice:
                raise CheckpointError(f"holds weights that another file holds too: {name_some(twice)}", where=file)
            stored |= tensors
        if weight_map is not None:
            _check_index(weight_map, stored, directory / index)
        return kind, stored
    raise CheckpointError(
        "holds no weights that are recognised",
        where=directory,
        expected="model*.safetensors, or pytorch_model*.bin",
    )


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("has no weight_map", where=path)
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file or "/" in file or "\\" in file or "\0" in file or file in (".", ".."):
            raise CheckpointError("names a file outside its folder", where=path, found=f"{name!r} -> {file!r}")
        if len(file) > 255:
            raise CheckpointError("names a file with an over-long name", where=path, found=f"{file[:40]}...")
    return weight_map


def _check_index(weight_map: Mapping[str, str], stored: Mapping[str, StoredTensor], path: Path) -> None:
    absent = [name for name in weight_map if name not in stored]
    if absent:
        raise CheckpointError(f"weights of the index are in none of its files: {name_some(absent)}", where=path)
    unlisted = stored.keys() - weight_map.keys()
    if unlisted:
        raise CheckpointError(f"weights of the files are not in the index: {name_some(unlisted)}", where=path)
    for name, file in weight_map.items():
        actual = stored[name].extents[0].file.name if stored[name].extents else file
        if actual != file:
            raise CheckpointError("lies in another file than the index says", where=name, expected=file, found=actual)


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
            _read_rectangle(reader, tile, tile.source_row + column, tile.source_column + row, source)
            target[:] = source.T
        else:
            _read_rectangle(reader, tile, tile.source_row + row, tile.source_column + column, target)


def _read_rectangle(reader: TensorReader, tile: Tile, row: int, column: int, out: np.ndarray) -> None:
    """Read out.shape elements at (row, column) of the stored matrix; `out` may be a view with any row stride."""
    stored = tile.stored
    item = out.dtype.itemsize
    width = stored_columns(stored)
    if column == 0 and out.shape[1] == width:
        whole_rows = out if out.flags.c_contiguous else np.empty(out.shape, out.dtype)
        reader.read_into(stored, row * width * item, memoryview(whole_rows.reshape(-1).view(np.uint8)))
        if whole_rows is not out:
            out[:] = whole_rows
        return
    line = np.empty(out.shape[1], out.dtype)
    for offset in range(out.shape[0]):
        reader.read_into(stored, ((row + offset) * width + column) * item, memoryview(line.view(np.uint8)))
        out[offset] = line


def stored_columns(stored: StoredTensor) -> int:
    """Columns of a stored tensor seen as a matrix: its last axis, or 1 for a vector."""
    return stored.shape[-1] if len(stored.shape) > 1 else 1
