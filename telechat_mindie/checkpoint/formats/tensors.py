"""Where a tensor lies on disk, and how its bytes are read without loading its file."""

from __future__ import annotations

import math
import mmap
import os
import stat
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from telechat_mindie.dtypes import DTYPES
from telechat_mindie.errors import CheckpointError, name_some

MAX_OPEN_FILES = 128
"""Files that a reader keeps open. A large training run has thousands of rank files; a process may open 1,024."""


@dataclass(frozen=True, slots=True)
class Extent:
    """`nbytes` bytes of `file` from `offset`."""

    file: Path
    offset: int
    nbytes: int


ReadExtent = Callable[[Extent, int, memoryview, str], None]
"""Fills a buffer from a byte of an extent on; the name is the tensor's, for messages."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file: little endian, C order, its bytes the concatenation of `extents`.

    Safetensors and torch archives give one extent; a MindSpore .ckpt stores a large tensor in several slices. What is
    put together from tensors of several files is one too, see `telechat_mindie.checkpoint.pieces`.
    """

    name: str
    dtype: str  # a key of DTYPES
    shape: tuple[int, ...]
    extents: tuple[Extent, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def read_into(self, read: ReadExtent, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the tensor's bytes from byte `start` on.

        Raises:
            CheckpointError: there are no such bytes, or `read` finds that the file ends before them.
        """
        filled = 0
        position = start  # within the extents still to come
        for extent in self.extents:
            if filled == len(buffer):
                return
            if position >= extent.nbytes:
                position -= extent.nbytes
                continue
            count = min(extent.nbytes - position, len(buffer) - filled)
            read(extent, position, buffer[filled : filled + count], self.name)
            filled += count
            position = 0
        if filled != len(buffer):
            raise CheckpointError("range lies outside the tensor", where=self.name, found=start + len(buffer))


def read_files(
    files: Iterable[Path], read: Callable[[Path, Path], dict[str, StoredTensor]], root: Path
) -> dict[str, StoredTensor]:
    """The tensors of several files of one checkpoint. Raises CheckpointError where two of them hold the same."""
    stored: dict[str, StoredTensor] = {}
    for file in files:
        tensors = read(file, root)
        if twice := stored.keys() & tensors.keys():
            raise CheckpointError(
                f"holds weights that another file holds too: {name_some(twice)}",
                where=file,
                advice="Leave one checkpoint in the folder.",
            )
        stored |= tensors
    return stored


def open_regular(path: Path, root: Path | None = None) -> int:
    """Open a regular file for reading and return its descriptor; never follow a link out of `root`.

    A FIFO or device is refused without blocking on it. A symbolic link is followed only in the Hugging Face cache
    layout (`models--*/snapshots/REV/file -> ../../blobs/HASH`), and there only into that cache's own blobs folder.

    Raises:
        CheckpointError: the file is absent, unreadable, not regular, or a link elsewhere.
    """
    root = path.parent if root is None else root
    target = path
    if path.is_symlink():
        target = path.resolve()
        blobs = root.resolve().parent.parent / "blobs"
        if root.resolve().parent.name != "snapshots" or target.parent != blobs:
            raise CheckpointError(
                "is a symbolic link",
                where=path,
                found=f"link to {target}",
                advice="Links are not followed out of a checkpoint; copy the files with `cp -rL` first.",
            )
    try:
        descriptor = os.open(target, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise CheckpointError("file is missing", where=path, advice="Download the checkpoint again.") from None
    except OSError as error:
        raise CheckpointError(f"cannot be opened: {error.strerror}", where=path) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError("is not a regular file", where=path)
    return descriptor


class TensorReader:
    """Reads byte ranges of stored tensors. Keeps the descriptors of the files that were read last, at most
    MAX_OPEN_FILES; use it as a context manager."""

    def __init__(self) -> None:
        self._descriptors: OrderedDict[Path, int] = OrderedDict()  # the one that was used last is last
        self._mapped: dict[Path, mmap.mmap] = {}  # each lives as long as an array over it

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()
        self._mapped.clear()

    def read_into(self, tensor: StoredTensor, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of `tensor` from byte `start` on.

        Raises:
            CheckpointError: the file ends before the bytes it declared.
        """
        tensor.read_into(self._read, start, buffer)

    def _descriptor(self, file: Path) -> int:
        descriptor = self._descriptors.get(file)
        if descriptor is None:
            descriptor = self._descriptors[file] = open_regular(file)
            if len(self._descriptors) > MAX_OPEN_FILES:
                os.close(self._descriptors.popitem(last=False)[1])
        else:
            self._descriptors.move_to_end(file)
        return descriptor

    def _read(self, extent: Extent, begin: int, buffer: memoryview, name: str) -> None:
        descriptor = self._descriptor(extent.file)
        done = 0
        while done < len(buffer):
            count = os.preadv(descriptor, [buffer[done:]], extent.offset + begin + done)
            if count == 0:
                raise _truncated(extent, name)
            done += count

    def load(self, tensor: StoredTensor) -> np.ndarray:
        """The whole tensor as a numpy array of its stored dtype (bfloat16 as ml_dtypes.bfloat16)."""
        array = np.empty(tensor.shape, DTYPES[tensor.dtype].numpy)
        if tensor.nbytes:
            self.read_into(tensor, 0, array.reshape(-1).view(np.uint8).data)
        return array

    def map(self, tensor: StoredTensor) -> np.ndarray:
        """The whole tensor over its file's pages, which all processes share; read when they are first touched.

        What is written to it stays in this process, and is not in the file. The file stays open while the array lives,
        and must not get shorter. A tensor of several pieces, or of one that is not aligned to its elements, is loaded.

        Raises:
            CheckpointError: as `load`.
        """
        dtype = DTYPES[tensor.dtype].numpy
        is_one = type(tensor) is StoredTensor and len(tensor.extents) == 1
        if not is_one or not tensor.nbytes or tensor.extents[0].offset % dtype.itemsize:
            return self.load(tensor)
        (extent,) = tensor.extents
        pages = self._pages(extent.file)
        if len(pages) < extent.offset + tensor.nbytes:
            raise _truncated(extent, tensor.name)
        return np.frombuffer(pages, dtype, math.prod(tensor.shape), extent.offset).reshape(tensor.shape)

    def _pages(self, file: Path) -> mmap.mmap:
        if file not in self._mapped:
            descriptor = self._descriptor(file)
            try:
                self._mapped[file] = mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
            except (OSError, ValueError) as error:  # no room in the address space; an empty file
                raise CheckpointError(f"cannot be mapped: {error}", where=file) from None
        return self._mapped[file]


def _truncated(extent: Extent, name: str) -> CheckpointError:
    return CheckpointError(
        f"ends inside tensor {name}",
        where=extent.file,
        expected=f"{extent.nbytes} bytes from offset {extent.offset}",
        advice="The file was truncated or changed while it was read; download it again.",
    )
