"""Arrays by name in a safetensors file, of which no more than one is held at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from telechat_mindie.checkpoint.formats.containers import SAFETENSORS
from telechat_mindie.checkpoint.formats.safetensors import read_safetensors
from telechat_mindie.checkpoint.formats.tensors import TensorReader
from telechat_mindie.checkpoint.writer import FileRecord, HashedFile


class StoredArrays(Mapping[str, np.ndarray]):
    """Name -> array, read when it is asked for.

    Raises:
        CheckpointError: the file is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self._stored = read_safetensors(path)

    def __getitem__(self, name: str) -> np.ndarray:
        with TensorReader() as reader:
            return reader.load(self._stored[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def write_arrays(folder: Path, file: str, arrays: Mapping[str, np.ndarray]) -> FileRecord:
    """Write arrays to `file` below `folder`, hashed and synced.

    Raises:
        OutputError: the file cannot be written.
    """
    entries = [(name, array.dtype.name, array.shape) for name, array in arrays.items()]
    output = HashedFile(folder, file, SAFETENSORS.frames(entries))
    try:
        for array in arrays.values():
            pieces = output.frame(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            output.hash(pieces)
            output.write(pieces)
        return output.finish()
    finally:
        output.close()
