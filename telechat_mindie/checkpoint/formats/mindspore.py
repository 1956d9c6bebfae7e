"""MindSpore's `.ckpt` files: read as extents, and framed for a writer; the bytes of the tensors are never held.

The layout (mindspore/train/checkpoint.proto and serialization.py, `_exec_save`) is one protobuf message:

    Checkpoint { repeated Value value = 1 }
    Value { string tag = 1; TensorProto tensor = 2; MapTensorProto maptensor = 3 }
    TensorProto { repeated int64 dims = 1; string tensor_type = 2; bytes tensor_content = 3 }

A tensor over 512 MiB is cut into slices: values one after another with the same tag, each with the dims of the whole.
With `crc_check` the file ends in `crc_num` and a 10-byte number, outside the message. MindSpore's other format,
safetensors, is read by safetensors.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from telechat_mindie.checkpoint.formats.bounds import (
    MAX_RANK,
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
from telechat_mindie.checkpoint.formats.wire import VARINT, Message, encode_field, encode_varint
from telechat_mindie.dtypes import DTYPES
from telechat_mindie.errors import CheckpointError

SLICE_BYTES = 512 << 20
"""Content of one value at most, as MindSpore writes it; a protobuf parser may refuse a field of 2 GiB."""

_DTYPE_OF = {dtype.mindspore: dtype.name for dtype in DTYPES.values()}

_KIND = "MindSpore checkpoint"
_CHECKSUM_MARK, _CHECKSUM_BYTES = b"crc_num", 17
_CIPHER_MAGICS = {0x7F3A5ED8: "AES-GCM", 0x7F3A5ED9: "AES-CBC", 0x7F3A5EDA: "SM4-CBC"}


@dataclass(frozen=True, slots=True)
class _Slice:
    name: str
    type_name: str
    dims: tuple[int, ...]
    extent: Extent


def read_mindspore_ckpt(path: Path, root: Path | None = None) -> dict[str, StoredTensor]:
    """The tensors of a MindSpore `.ckpt` file, in the order of the file.

    Everything is reported as it is, optimizer state and counters such as `epoch_num` too. A string, which
    `save_checkpoint(append_dict=...)` can store, is reported as the uint8 bytes of its UCS-4 text. The checksum that
    `crc_check=True` adds is passed over.

    Args:
        path: the file.
        root: the checkpoint's folder, when it is not the file's own.

    Raises:
        CheckpointError: the file is encrypted, not such a message, truncated, or holds a tensor twice, one of an
            unsupported dtype, a map tensor, or bytes that do not fit a tensor's shape.
    """
    tensors: dict[str, StoredTensor] = {}
    with open_bounded(path, root) as file:
        _refuse_encrypted(file)
        for name, slices in groupby(_read_slices(file), lambda piece: piece.name):
            if name in tensors:
                raise CheckpointError("is stored twice", where=f"{path}, tensor {name}")
            tensors[name] = _join(list(slices))
    if not tensors:
        raise CheckpointError("holds no tensors", where=path, advice="Download or save the file again.")
    return tensors


def encode_ckpt_entry_prefix(name: str, dtype: str, shape: tuple[int, ...], nbytes: int) -> bytes:
    """What stands in a `.ckpt` before the `nbytes` bytes of one of `ckpt_slices`; nothing stands after them.

    Args:
        dtype: a key of `DTYPES`.
        shape: of the whole tensor, in every one of its slices.

    Raises:
        CheckpointError: a name or shape that could not be read again.
    """
    checked_shape(shape, dtype, checked_name(name, _KIND))
    dims = b"".join(bytes([1 << 3 | VARINT]) + encode_varint(dim) for dim in shape)
    tensor = dims + encode_field(2, DTYPES[dtype].mindspore.encode()) + encode_field(3, b"", nbytes)
    return encode_field(1, encode_field(1, name.encode()) + encode_field(2, tensor, nbytes), nbytes)


def ckpt_slices(nbytes: int) -> list[int]:
    """The bytes of each slice into which MindSpore cuts a tensor of `nbytes` bytes."""
    full, rest = divmod(nbytes, SLICE_BYTES)
    return [SLICE_BYTES] * full + ([rest] if rest or not full else [])


def _refuse_encrypted(file: BoundedFile) -> None:
    cipher = _CIPHER_MAGICS.get(int.from_bytes(file.read(0, min(file.size, 4)), "little"))
    if cipher:
        raise CheckpointError(
            "is encrypted",
            where=file.path,
            found=cipher,
            advice="Load it in MindSpore with its dec_key and save it again without enc_key.",
        )


def _is_checksum(file: BoundedFile, position: int) -> bool:
    # No value can begin with a "c", which would be field 12.
    at_end = file.size - position == _CHECKSUM_BYTES
    return at_end and file.read(position, len(_CHECKSUM_MARK)) == _CHECKSUM_MARK


def _read_slices(file: BoundedFile) -> Iterator[_Slice]:
    values = Message(file, 0, file.size, _KIND)
    count = 0
    while not values.is_read() and not _is_checksum(file, values.position):
        count += 1
        if count > MAX_TENSORS:
            raise CheckpointError("holds too many tensors", where=file.path, expected=f"at most {MAX_TENSORS}")
        values.expect_field(1)
        yield _read_value(values.submessage())


def _read_value(value: Message) -> _Slice:
    name: str | None = None
    tensor: Message | None = None
    while not value.is_read():
        match value.field():
            case (1, 2) if name is None:
                name = checked_name(value.text(), value.file.path)
            case (2, 2) if tensor is None:
                tensor = value.submessage()
            case (3, 2):
                raise CheckpointError(
                    f"holds the map tensor {quoted(name)}, which is no weight of a language model",
                    where=value.file.path,
                )
            case _:
                raise value.broken("an unknown or repeated field")
    if name is None or tensor is None:
        raise value.broken("a value without a name or a tensor")
    return _read_tensor(name, tensor)


def _read_tensor(name: str, tensor: Message) -> _Slice:
    dims: list[int] = []
    type_name: str | None = None
    extent: Extent | None = None
    while not tensor.is_read():
        match tensor.field():
            case (1, 0) if len(dims) < MAX_RANK:
                dims.append(tensor.varint())
            case (2, 2) if type_name is None:
                type_name = tensor.text()
            case (3, 2) if extent is None:
                extent = Extent(tensor.file.path, *tensor.skip())
            case _:
                raise tensor.broken(f"an unknown or repeated field in tensor {name}")
    if type_name is None or extent is None:
        raise tensor.broken(f"no type or no content in tensor {name}")
    return _Slice(name, type_name, tuple(dims), extent)


def _join(slices: Sequence[_Slice]) -> StoredTensor:
    """The tensor that consecutive slices of one name make up."""
    first = slices[0]
    where = f"{first.extent.file}, tensor {first.name}"
    if any((piece.type_name, piece.dims) != (first.type_name, first.dims) for piece in slices):
        raise CheckpointError("is stored in slices that differ", where=where)
    extents = tuple(piece.extent for piece in slices if piece.extent.nbytes)
    nbytes = sum(extent.nbytes for extent in extents)
    if first.type_name == "str":
        return checked_tensor(first.name, "uint8", (nbytes,), extents, where)
    dtype = checked_dtype(first.type_name, _DTYPE_OF, where)
    # Dims of [0] and one element: how releases before dims may be empty write a scalar, and every release reads it.
    dims = () if first.dims == (0,) and nbytes == DTYPES[dtype].itemsize else first.dims
    return checked_tensor(first.name, dtype, dims, extents, where)
