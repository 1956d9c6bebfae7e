"""Tensors copied to files as they are, whatever their dtype and meaning: no mapping, no cast, no check of numbers."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from telechat_mindie.checkpoint.formats.containers import Container, Frame
from telechat_mindie.checkpoint.formats.tensors import StoredTensor, TensorReader, open_regular
from telechat_mindie.checkpoint.writer import FileRecord, HashedFile
from telechat_mindie.dtypes import DTYPES

BLOCK_BYTES = 8 << 20
"""Bytes that are read at once: enough for a stretch of each of the pieces that a block lies in."""

DEPTH = 2
"""Blocks read ahead of the one that is written."""

Progress = Callable[[int], None]


class Copier:
    """Writes files below a folder, one after the other; use it as a context manager. Memory: DEPTH + 1 blocks and the
    pieces of one; a file is synced while the next is written."""

    def __init__(self, root: Path, progress: Progress | None = None) -> None:
        self._root = root
        self._progress = progress or (lambda _: None)
        self._reader = TensorReader()
        self._read_pool, self._sync_pool = ThreadPoolExecutor(1, "read"), ThreadPoolExecutor(1, "sync")
        self._syncing: tuple[HashedFile, Future[FileRecord]] | None = None

    def __enter__(self) -> Copier:
        return self

    def __exit__(self, *_: object) -> None:
        for pool in (self._read_pool, self._sync_pool):
            pool.shutdown(cancel_futures=True)
        if self._syncing:
            self._syncing[0].close()
        self._reader.__exit__()

    def write(
        self,
        path: str,
        tensors: Sequence[StoredTensor],
        container: Container,
        turned: Callable[[StoredTensor], bool] = lambda _: False,
    ) -> None:
        """Write one file of these tensors.

        Args:
            turned: which tensors [n, a, b] are stored as [n, b, a].

        Raises:
            CheckpointError: a source is damaged, or copies differ.
            OutputError: the file cannot be written.
        """
        entries = []
        for tensor in tensors:
            shape = (tensor.shape[0], tensor.shape[2], tensor.shape[1]) if turned(tensor) else tensor.shape
            entries.append((tensor.name, tensor.dtype, shape))
        file = HashedFile(self._root, path, container.frames(entries))
        try:
            ahead: deque[Future[np.ndarray]] = deque()
            for tensor in tensors:
                for begin, count in _blocks(tensor, turned(tensor)):
                    ahead.append(self._read_pool.submit(self._read, tensor, begin, count, turned(tensor)))
                    if len(ahead) > DEPTH:
                        self._append(file, ahead.popleft().result())
            while ahead:
                self._append(file, ahead.popleft().result())
            file.write(file.frame(memoryview(b"")))  # tensors without elements, if nothing else came
        except BaseException:
            self._read_pool.shutdown(cancel_futures=True)
            file.close()
            raise
        self.finish()
        self._syncing = file, self._sync_pool.submit(file.finish)

    def finish(self) -> None:
        """Wait until everything that was written is on the disk."""
        if self._syncing:
            self._syncing[1].result()
            self._syncing = None

    def _append(self, file: HashedFile, data: np.ndarray) -> None:
        file.write(file.frame(data.data))
        self._progress(data.nbytes)

    def _read(self, tensor: StoredTensor, begin: int, count: int, turned: bool) -> np.ndarray:
        data = np.empty(count, np.uint8)
        self._reader.read_into(tensor, begin, data.data)
        if not turned:
            return data
        # As integers of the dtype's width: what the numbers are does not matter here.
        matrix = data.view(f"u{DTYPES[tensor.dtype].itemsize}").reshape(tensor.shape[1:])
        return np.ascontiguousarray(matrix.T).reshape(-1).view(np.uint8)


def copy_file(source: Path, root: Path, name: str, progress: Progress) -> FileRecord:
    """Copy the file `name` of the folder `source` below `root`, byte by byte, hashed and synced on the way.

    Raises:
        CheckpointError: it is no file, or a link out of `source`.
        OutputError: the copy cannot be written.
    """
    descriptor = open_regular(source / name, source)
    with open(descriptor, "rb", buffering=0) as file:
        size = os.fstat(descriptor).st_size
        copy = HashedFile(root, name, [Frame(b"", size)])
        try:
            buffer = bytearray(BLOCK_BYTES)
            while count := file.readinto(buffer):
                pieces = copy.frame(memoryview(buffer)[:count])
                copy.hash(pieces)
                copy.write(pieces)
                progress(count)
            copy.write(copy.frame(memoryview(b"")))  # an empty file
            return copy.finish()
        finally:
            copy.close()


def _blocks(tensor: StoredTensor, turned: bool) -> Iterator[tuple[int, int]]:
    """(first byte, bytes) of what is read at once: a matrix where it is to be turned."""
    step = tensor.nbytes // tensor.shape[0] if turned and tensor.nbytes else BLOCK_BYTES
    for begin in range(0, tensor.nbytes, step):
        yield begin, min(step, tensor.nbytes - begin)
