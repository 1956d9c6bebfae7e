"""What every file format checks before it believes a number or a name that a file declares."""

from __future__ import annotations

import math
import os
import reprlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from telechat_mindie.checkpoint.formats.tensors import Extent, StoredTensor, open_regular
from telechat_mindie.dtypes import DTYPES
from telechat_mindie.errors import CheckpointError
from telechat_mindie.reading import LFS_POINTER, refuse_lfs_pointer

MAX_TENSORS = 100_000
"""Tensors in one file. The 115B has 963 in all; the cap keeps the memory for a hostile header small."""

MAX_RANK = 32
"""Dimensions of a tensor: numpy's own limit."""

MAX_NAME_LENGTH = 512
"""Characters in the name of a tensor or of an archive's member."""

_WINDOW_BYTES = 4096  # one read serves a record's few short fields; the tensor bytes that follow are not wanted

_REPR = reprlib.Repr()
_REPR.maxlevel = 2
_REPR.maxstring = _REPR.maxother = 80


class BoundedFile:
    """A file read at offsets, where a read past the end is an error and not a short answer."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self.size = os.fstat(descriptor).st_size
        self._descriptor = descriptor
        self._window = b""
        self._window_start = 0

    def read(self, offset: int, count: int) -> bytes:
        """`count` bytes from `offset`.

        Raises:
            CheckpointError: the file ends before them.
        """
        begin = offset - self._window_start
        if begin < 0 or begin + count > len(self._window):
            self._window = self._fill(offset, max(count, _WINDOW_BYTES))
            self._window_start, begin = offset, 0
        chunk = self._window[begin : begin + count]
        if len(chunk) != count:
            raise CheckpointError(
                "ends too early",
                where=self.path,
                expected=f"{count} bytes from offset {offset}",
                found=f"{self.size} bytes in all",
                advice="The file is truncated or damaged; download it again.",
            )
        return chunk

    def _fill(self, offset: int, count: int) -> bytes:
        pieces = []
        end = min(offset + count, self.size)  # an offset past the end must not reach pread as a huge number
        while offset < end:
            piece = os.pread(self._descriptor, end - offset, offset)
            if not piece:
                break
            pieces.append(piece)
            offset += len(piece)
        return b"".join(pieces)


@contextmanager
def open_bounded(path: Path, root: Path | None = None) -> Iterator[BoundedFile]:
    """Open a checkpoint file by the rules of `open_regular`, and close it at the end.

    Raises:
        CheckpointError: `open_regular` refuses it, or it is what Git leaves in place of a large file.
    """
    descriptor = open_regular(path, root)
    try:
        file = BoundedFile(path, descriptor)
        refuse_lfs_pointer(file.read(0, min(file.size, len(LFS_POINTER))), path, CheckpointError)
        yield file
    finally:
        os.close(descriptor)


def quoted(value: object) -> str:
    """A value from a file as it may stand in an error message: control characters escaped, and short.

    The work is bounded too: builtin repr() may recurse too deeply, or grow without end, on nested and shared values.
    """
    return _REPR.repr(value)


def checked_name(name: object, where: object) -> str:
    """A name that is safe to print and to store: 1 to `MAX_NAME_LENGTH` printable characters.

    Control characters, NUL and lone surrogates are not printable (`str.isprintable`).

    Raises:
        CheckpointError: anything else.
    """
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME_LENGTH or not name.isprintable():
        raise CheckpointError(
            "holds a name that is no tensor's",
            where=where,
            expected=f"1 to {MAX_NAME_LENGTH} printable characters",
            found=quoted(name) if isinstance(name, str) else type(name).__name__,
        )
    return name


def checked_shape(dims: object, dtype: str, where: object) -> tuple[int, ...]:
    """A shape of non-negative integers whose bytes in `dtype`, a key of `DTYPES`, can be counted in 63 bits.

    Raises:
        CheckpointError: a dimension is negative or no integer (True and 1e3 are none), or there are too many.
    """
    if not isinstance(dims, (list, tuple)) or len(dims) > MAX_RANK:
        raise CheckpointError("has no valid shape", where=where, expected=f"a list of at most {MAX_RANK} integers")
    # A zero dimension must not hide others that no array could have, so zeros count as ones here.
    if not all(type(dim) is int and dim >= 0 for dim in dims) or (
        math.prod(max(dim, 1) for dim in dims) * DTYPES[dtype].itemsize >= 2**63
    ):
        raise CheckpointError(
            "has no valid shape",
            where=where,
            expected="non-negative integers, and less than 2**63 bytes",
            found=quoted(dims),
        )
    return tuple(dims)


def checked_dtype(spelled: object, names: Mapping[str, str], where: object) -> str:
    """The key of `DTYPES` for a dtype as a format spells it. Raises CheckpointError where it is none of `names`."""
    if not isinstance(spelled, str) or spelled not in names:
        raise CheckpointError(
            "has a dtype that is not supported", where=where, expected=" ".join(names), found=quoted(spelled)
        )
    return names[spelled]


def checked_tensor(name: str, dtype: str, dims: object, extents: tuple[Extent, ...], where: object) -> StoredTensor:
    """A tensor whose extents have the bytes of its shape. Raises CheckpointError otherwise."""
    tensor = StoredTensor(name, dtype, checked_shape(dims, dtype, where), extents)
    nbytes = sum(extent.nbytes for extent in extents)
    if nbytes != tensor.nbytes:
        raise CheckpointError(
            "has bytes that do not fit its shape",
            where=where,
            expected=f"{tensor.nbytes} bytes for {dtype} {list(tensor.shape)}",
            found=nbytes,
            advice="The file is truncated or damaged; download or save it again.",
        )
    return tensor
