"""Writes what torch.save writes, without torch: archives for tests, good ones and bad ones."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

STORAGE_CLASSES = {
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "float64": "DoubleStorage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
}


@dataclass(frozen=True)
class View:
    """A tensor that sees a part of a storage; offset and stride are in elements."""

    storage: np.ndarray
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def write_torch_archive(
    path: Path,
    tensors: Mapping[str, np.ndarray | View],
    *,
    parameters: Collection[str] = (),
    module: bool = False,
    byteorder: str | None = "little",
    wide: bool = False,
) -> None:
    """Write a state dict as torch.save(state_dict, path) does.

    Args:
        path: the archive; its stem names the folder inside.
        tensors: arrays, or views of them. One array (the same object) given twice is one storage: tied weights.
        parameters: the names saved as torch.nn.Parameter.
        module: an OrderedDict with `_metadata`, as Module.state_dict() makes, and not a plain dict.
        byteorder: the record of that name; None leaves it out, as torch before 2.1 did.
        wide: zip64 records for the members, as torch writes for 4 GiB and more.
    """
    pickle, storages = pickle_state_dict(tensors, parameters=parameters, module=module)
    write_pickle_archive(path, pickle, storages, byteorder=byteorder, wide=wide)


def write_pickle_archive(
    path: Path,
    pickle: bytes,
    storages: Mapping[str, bytes] | None = None,
    *,
    byteorder: str | None = "little",
    wide: bool = False,
) -> Path:
    """Write an archive around any data.pkl and any storages by key, and return its path."""
    records = {"data.pkl": pickle, ".format_version": b"1"}
    if byteorder is not None:
        records["byteorder"] = byteorder.encode()
    records |= {f"data/{key}": data for key, data in (storages or {}).items()}
    records["version"] = b"3\n"
    write_records(path, {f"{path.stem}/{name}": data for name, data in records.items()}, wide=wide)
    return path


def write_records(path: Path, records: Mapping[str, bytes], *, wide: bool = False) -> None:
    """An uncompressed zip archive whose members' data are aligned to 64 bytes, as torch pads them."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in records.items():
            info = zipfile.ZipInfo(name)
            begin = archive.start_dir + 30 + len(name.encode()) + 4
            padding = -(begin + 20 * wide) % 64
            info.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
            with archive.open(info, "w", force_zip64=wide) as member:
                member.write(data)


def pickle_state_dict(
    tensors: Mapping[str, np.ndarray | View], *, parameters: Collection[str] = (), module: bool = False
) -> tuple[bytes, dict[str, bytes]]:
    """The data.pkl of a state dict, in pickle protocol 2, and the bytes of its storages by key."""
    storages: dict[int, np.ndarray] = {}
    body = b""
    for name, tensor in tensors.items():
        view = tensor if isinstance(tensor, View) else whole(tensor)
        storages.setdefault(id(view.storage), view.storage)
        key = list(storages).index(id(view.storage))
        rebuilt = rebuild_tensor(view, str(key))
        if name in parameters:
            rebuilt = call("torch._utils", "_rebuild_parameter", rebuilt + b"\x88" + ordered_dict())
        body += text(name) + rebuilt
    if module:
        metadata = ordered_dict() + b"(" + text("") + b"}" + text("version") + integer(1) + b"su"
        pickle = ordered_dict() + b"(" + body + b"u" + b"}" + text("_metadata") + metadata + b"sb"
    else:
        pickle = b"}(" + body + b"u"
    contents = {str(key): storage.tobytes() for key, storage in enumerate(storages.values())}
    return b"\x80\x02" + pickle + b".", contents


def whole(array: np.ndarray) -> View:
    """The view of all of an array in C order."""
    strides = tuple(int(np.prod(array.shape[axis + 1 :], dtype=np.int64)) for axis in range(array.ndim))
    return View(array, 0, array.shape, strides)


def pickle_of_weight(value: bytes) -> bytes:
    """The pickle of {"weight": value}, for the opcodes of any value."""
    return b"\x80\x02}" + text("weight") + value + b"s."


def rebuild_tensor(view: View, key: str) -> bytes:
    """Opcodes that leave the tensor on the stack, as Tensor.__reduce_ex__ makes torch write them."""
    storage_class = STORAGE_CLASSES[view.storage.dtype.name]
    identity = text("storage") + symbol("torch", storage_class) + text(key) + text("cpu") + integer(view.storage.size)
    arguments = b"(" + identity + b"tQ" + integer(view.offset)
    arguments += integers(view.shape) + integers(view.stride) + b"\x89" + ordered_dict()
    return call("torch._utils", "_rebuild_tensor_v2", arguments)


def ordered_dict() -> bytes:
    return call("collections", "OrderedDict", b"")


def call(module: str, name: str, arguments: bytes) -> bytes:
    """GLOBAL, the arguments as a tuple, REDUCE."""
    return symbol(module, name) + b"(" + arguments + b"t" + b"R"


def symbol(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def integer(value: int) -> bytes:
    if 0 <= value < 256:
        return b"K" + bytes([value])
    if 0 <= value < 65536:
        return b"M" + struct.pack("<H", value)
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    size = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def integers(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(integer, values)) + b"t"
