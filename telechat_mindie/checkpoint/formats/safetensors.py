"""Safetensors headers, read strictly and written; the bytes of the tensors are never touched.

The layout (safetensors README, "Format"): 8 bytes, little endian, with the length of the header; the header, JSON as
`{"__metadata__": {str: str}, NAME: {"dtype": "F16", "shape": [2, 3], "data_offsets": [begin, end]}, ...}`; then one
buffer, which the offsets cut into tensors without a hole or an overlap.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from telechat_mindie.checkpoint.formats.bounds import (
    MAX_TENSORS,
    BoundedFile,
    checked_dtype,
    checked_name,
    checked_shape,
    checked_tensor,
    open_bounded,
    quoted,
)
from telechat_mindie.checkpoint.formats.tensors import Extent, StoredTensor
from telechat_mindie.dtypes import DTYPES
from telechat_mindie.errors import CheckpointError
from telechat_mindie.foreign import refuse_foreign

MAX_HEADER_BYTES = 100_000_000
"""The format's own cap on the header."""

_MAX_JSON_MARKS = 32 * MAX_TENSORS
# `{ [ , :` in the header. A tensor of rank 2 has 12; the cap is what bounds the memory of json.loads, which would
# make a hundred million bytes of `[],[],[]` into gigabytes of lists before any of it could be refused.

_METADATA = "__metadata__"
_DTYPE_OF = {dtype.safetensors: dtype.name for dtype in DTYPES.values()}


def read_safetensors(path: Path, root: Path | None = None) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, in the order of their bytes.

    Args:
        path: the file.
        root: the checkpoint's folder, when it is not the file's own.

    Raises:
        CheckpointError: the file breaks the format in any way, or stores a dtype not in `DTYPES`.
    """
    with open_bounded(path, root) as file:
        entries, buffer_start = _read_header(file)
        size = file.size
    tensors = [_read_entry(path, name, entry, buffer_start) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.extents[0].offset, tensor.nbytes))  # an empty tensor before its neighbour
    end = buffer_start
    for tensor in tensors:
        if tensor.extents[0].offset != end:
            raise CheckpointError(
                f"tensor {tensor.name} {'overlaps' if tensor.extents[0].offset < end else 'leaves a gap after'} "
                "the tensor before it",
                where=path,
                expected=f"its first byte at {end}",
                found=tensor.extents[0].offset,
            )
        end += tensor.nbytes
    if end != size:
        raise CheckpointError(
            "is truncated" if size < end else "has bytes that belong to no tensor",
            where=path,
            expected=f"{end} bytes",
            found=size,
            advice="Download the file again.",
        )
    return {tensor.name: tensor for tensor in tensors}


def encode_safetensors_header(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> bytes:
    """The head of a safetensors file: the length, and the JSON padded with spaces to a multiple of 8 bytes.

    Args:
        tensors: name, dtype (a key of `DTYPES`) and shape of each tensor, in the order in which the bytes will follow.
        metadata: the `__metadata__` table.

    Raises:
        CheckpointError: a name is given twice or reserved, or the head would be one that readers refuse.
    """
    header: dict[str, object] = {_METADATA: dict(metadata)} if metadata else {}
    end = 0
    for name, dtype, shape in tensors:
        if checked_name(name, "safetensors header") in header or name == _METADATA:
            raise CheckpointError("tensor name is taken", where=name)
        checked_shape(shape, dtype, name)
        begin, end = end, end + StoredTensor(name, dtype, shape, ()).nbytes
        header[name] = {"dtype": DTYPES[dtype].safetensors, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES or len(tensors) > MAX_TENSORS:
        raise CheckpointError(
            "too many tensors for one safetensors file",
            expected=f"at most {MAX_TENSORS} tensors and {MAX_HEADER_BYTES} bytes of header",
            found=f"{len(tensors)} tensors and {len(text)} bytes",
        )
    return len(text).to_bytes(8, "little") + text


def _read_header(file: BoundedFile) -> tuple[dict[str, dict[str, Any]], int]:
    """The header's unchecked entries by name, and the offset of the buffer behind it."""
    length = int.from_bytes(file.read(0, 8), "little")
    if length > MAX_HEADER_BYTES or 8 + length > file.size:
        raise CheckpointError(
            "declares a header that is longer than the format or the file allows",
            where=file.path,
            expected=f"at most {min(MAX_HEADER_BYTES, file.size - 8)} bytes",
            found=length,
            advice="This is not a safetensors file, or it was truncated; download it again.",
        )
    encoded = file.read(8, length)
    if encoded.count(b"{") > MAX_TENSORS + 2 or sum(map(encoded.count, (b"{", b"[", b",", b":"))) > _MAX_JSON_MARKS:
        raise CheckpointError("declares too many tensors", where=file.path, expected=f"at most {MAX_TENSORS}")
    if not encoded.startswith(b"{"):
        raise CheckpointError("has a header that is no JSON object", where=file.path, found=quoted(encoded[:16]))

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        table: dict[str, object] = {}
        for key, value in pairs:
            if key in table:
                raise CheckpointError(f"header has the key {quoted(key)} twice", where=file.path)
            table[key] = value
        return table

    try:
        header = json.loads(encoded.decode(), object_pairs_hook=unique, parse_int=_parse_int)
    except (ValueError, RecursionError) as error:
        raise CheckpointError("has a header that is no JSON object", where=file.path, found=error) from None
    for name, entry in header.items():
        if not isinstance(entry, dict):
            raise CheckpointError(f"header entry {quoted(name)} is no JSON object", where=file.path)
    metadata = header.pop(_METADATA, {})
    if not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError("has metadata that are not all strings", where=file.path)
    return header, 8 + length


def _parse_int(digits: str) -> int:
    if len(digits) > 20:  # 2**64 has 20 digits; int() takes quadratic time for millions of them on older Pythons
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def _read_entry(path: Path, name: str, entry: dict[str, Any], buffer_start: int) -> StoredTensor:
    checked_name(name, path)
    where = f"{path}, tensor {name}"
    if entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(
            "has a wrong header entry", where=where, expected="dtype, shape, data_offsets", found=quoted(list(entry))
        )
    offsets = entry["data_offsets"]
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(offset) is int for offset in offsets):
        raise CheckpointError("has no valid data_offsets", where=where, expected="two integers", found=quoted(offsets))
    begin, end = offsets
    if not 0 <= begin <= end:
        raise CheckpointError("has no valid data_offsets", where=where, expected="0 <= begin <= end", found=offsets)
    refuse_foreign("dtype", [str(entry["dtype"])[:16]], where, CheckpointError)
    dtype = checked_dtype(entry["dtype"], _DTYPE_OF, where)
    return checked_tensor(name, dtype, entry["shape"], (Extent(path, buffer_start + begin, end - begin),), where)
