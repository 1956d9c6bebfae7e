"""Tensors put together from pieces in many files, cut out of others, or held as copies; each is a `StoredTensor`.

A tensor of C order that is cut along an axis is a matrix: a line for each index of the axes before it, and the piece is
a stretch of every line. So three kinds are enough, and they nest: pieces joined along an axis, a stretch cut out, and
copies that have to agree. Where the axis is the first (or all before it are 1), a piece is a stretch of the whole's
bytes, and what comes out is an ordinary stored tensor whose extents lie in several files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from telechat_mindie.checkpoint.formats.tensors import Extent, ReadExtent, StoredTensor
from telechat_mindie.dtypes import DTYPES
from telechat_mindie.errors import CheckpointError

STRETCH_BYTES = 2048
"""A stretch of a line of fewer bytes is read with the line: one large read costs less than many small ones."""

Fill = Callable[[int, memoryview], None]
"""Fills a buffer with a tensor's bytes from a byte on."""


@dataclass(frozen=True, slots=True)
class Joined(StoredTensor):
    """`parts` side by side along `axis`, which are equal along the others. `extents` are all of theirs, unordered."""

    axis: int
    parts: tuple[StoredTensor, ...]

    def read_into(self, read: ReadExtent, start: int, buffer: memoryview) -> None:
        widths = [_line_bytes(part, self.axis) for part in self.parts]
        for first, last, begin, end, out in _lines(sum(widths), start, buffer):
            offset = 0
            for part, width in zip(self.parts, widths, strict=True):
                left, right = max(begin, offset), min(end, offset + width)
                if left < right:
                    stretch = (left - offset, right - offset, width)
                    _read_stretch(part, read, first, last, stretch, out[:, left - begin : right - begin])
                offset += width


@dataclass(frozen=True, slots=True)
class Stretch(StoredTensor):
    """The bytes [begin, end) of every line of `width` bytes of `whole`."""

    whole: StoredTensor
    begin: int
    end: int
    width: int

    def read_into(self, read: ReadExtent, start: int, buffer: memoryview) -> None:
        for first, last, begin, end, out in _lines(self.end - self.begin, start, buffer):
            stretch = (self.begin + begin, self.begin + end, self.width)
            _read_stretch(self.whole, read, first, last, stretch, out)


@dataclass(frozen=True, slots=True)
class Zeros(StoredTensor):
    """A tensor of zeros, which lies in no file."""

    def read_into(self, read: ReadExtent, start: int, buffer: memoryview) -> None:
        np.frombuffer(buffer, np.uint8)[:] = 0


@dataclass(frozen=True, slots=True)
class Copies(StoredTensor):
    """A tensor that several files hold. The first of `tensors` is read, and the others compared with it."""

    tensors: tuple[StoredTensor, ...]

    def read_into(self, read: ReadExtent, start: int, buffer: memoryview) -> None:
        first, *others = self.tensors
        first.read_into(read, start, buffer)
        wanted, found = np.frombuffer(buffer, np.uint8), np.empty(len(buffer), np.uint8)
        for other in others:
            other.read_into(read, start, found.data)
            if not np.array_equal(found, wanted):
                raise CheckpointError(
                    "is not the same in two ranks that hold copies of it",
                    where=self.name,
                    found=f"{first.extents[0].file} and {other.extents[0].file} differ",
                    advice="The ranks have drifted apart, or a file is damaged or of another run; take another step.",
                )


def join(parts: Sequence[StoredTensor], axis: int) -> StoredTensor:
    """The tensor whose parts along `axis` these are, in this order; they have one dtype and agree on the other axes."""
    first = parts[0]
    if len(parts) == 1:
        return first
    shape = (*first.shape[:axis], sum(part.shape[axis] for part in parts), *first.shape[axis + 1 :])
    extents = tuple(extent for part in parts for extent in part.extents)
    if math.prod(shape[:axis]) == 1 and all(type(part) is StoredTensor for part in parts):
        return StoredTensor(first.name, first.dtype, shape, extents)
    return Joined(first.name, first.dtype, shape, extents, axis, tuple(parts))


def copies(tensors: Sequence[StoredTensor]) -> StoredTensor:
    """One tensor that several files hold; that they agree is checked when it is read."""
    first = tensors[0]
    if len(tensors) == 1:
        return first
    extents = tuple(extent for tensor in tensors for extent in tensor.extents)
    return Copies(first.name, first.dtype, first.shape, extents, tuple(tensors))


def cut(tensor: StoredTensor, axis: int, wanted: range) -> StoredTensor:
    """The part of a tensor that has the indices `wanted` of `axis`."""
    if wanted == range(tensor.shape[axis]):
        return tensor
    if isinstance(tensor, Copies):
        return copies([cut(copy, axis, wanted) for copy in tensor.tensors])
    if isinstance(tensor, Joined) and axis != tensor.axis:
        return join([cut(part, axis, wanted) for part in tensor.parts], tensor.axis)
    if isinstance(tensor, Joined):
        found, offset = [], 0
        for part in tensor.parts:
            size = part.shape[axis]
            inside = range(max(0, wanted.start - offset), min(size, wanted.stop - offset))
            if inside:
                found.append(cut(part, axis, inside))
            offset += size
        return join(found, axis)
    shape = (*tensor.shape[:axis], len(wanted), *tensor.shape[axis + 1 :])
    step = math.prod(tensor.shape[axis + 1 :]) * DTYPES[tensor.dtype].itemsize
    begin, end = wanted.start * step, wanted.stop * step
    if math.prod(tensor.shape[:axis]) == 1 and type(tensor) is StoredTensor:
        return replace(tensor, shape=shape, extents=tuple(_within(tensor.extents, begin, end)))
    width = _line_bytes(tensor, axis)
    return Stretch(tensor.name, tensor.dtype, shape, tensor.extents, tensor, begin, end, width)


def _within(extents: Sequence[Extent], begin: int, end: int) -> list[Extent]:
    """What of consecutive extents lies in the bytes [begin, end)."""
    found, offset = [], 0
    for extent in extents:
        left, right = max(begin, offset), min(end, offset + extent.nbytes)
        if left < right:
            found.append(Extent(extent.file, extent.offset + left - offset, right - left))
        offset += extent.nbytes
    return found


def _line_bytes(tensor: StoredTensor, axis: int) -> int:
    return math.prod(tensor.shape[axis:]) * DTYPES[tensor.dtype].itemsize


def _lines(width: int, start: int, buffer: memoryview) -> list[tuple[int, int, int, int, np.ndarray]]:
    """The bytes from `start` on of lines of `width` bytes, as rectangles, of which there are three at most: their lines
    [first, last), the bytes [begin, end) of each, and where they go in `buffer`, as an array [lines, bytes]."""
    rectangles: list[tuple[int, int, int, int, np.ndarray]] = []
    data, done = np.frombuffer(buffer, np.uint8), 0
    while done < len(data):
        line, begin = divmod(start + done, width)
        left = len(data) - done
        lines = left // width if begin == 0 and left >= width else 1
        count = lines * width if begin == 0 and left >= width else min(width - begin, left)
        out = data[done : done + count].reshape(lines, -1)
        rectangles.append((line, line + lines, begin, begin + count // lines, out))
        done += count
    return rectangles


def _read_stretch(
    tensor: StoredTensor, read: ReadExtent, first: int, last: int, stretch: tuple[int, int, int], out: np.ndarray
) -> None:
    """Fill `out` with the bytes [begin, end) of the lines [first, last) of a tensor whose lines are `width` bytes.

    Args:
        stretch: begin, end and width.
    """
    begin, end, width = stretch
    if first + 1 == last and out.flags.c_contiguous:
        tensor.read_into(read, first * width + begin, out.reshape(-1).data)
    elif end - begin == width or end - begin < STRETCH_BYTES:
        step = max(1, (4 << 20) // width)  # lines: a bound of the memory for what is read and not wanted
        lines = np.empty((min(step, last - first), width), np.uint8)
        for line in range(first, last, step):
            count = min(step, last - line)
            tensor.read_into(read, line * width, lines[:count].reshape(-1).data)
            out[line - first : line - first + count] = lines[:count, begin:end]
    else:
        for line in range(first, last):
            tensor.read_into(read, line * width + begin, out[line - first].data)
