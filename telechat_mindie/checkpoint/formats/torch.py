"""PyTorch's zip archives (`pytorch_model*.bin`), read without torch and without running anything in them.

The layout (torch/serialization.py, `_save`): an uncompressed zip archive with one folder, which holds `data.pkl`, the
pickled state dict; `data/KEY`, the bytes of each storage; and `byteorder`. Older releases leave `byteorder` out.
"""

from __future__ import annotations

import math
import zlib
from pathlib import Path

from telechat_mindie.checkpoint.formats.bounds import BoundedFile, open_bounded, quoted
from telechat_mindie.checkpoint.formats.pickle import TensorRef, read_state_dict
from telechat_mindie.checkpoint.formats.tensors import Extent, StoredTensor
from telechat_mindie.checkpoint.formats.zip_members import ZipMember, read_zip_members
from telechat_mindie.dtypes import DTYPES
from telechat_mindie.errors import CheckpointError, name_some

MAX_PICKLE_BYTES = 64 << 20

_ZIP_START = b"PK\x03\x04"
_LEGACY_MAGIC = bytes.fromhex("1950a86a20f9469cfc6c")[::-1]  # as a little-endian integer in the first pickle
_LEGACY_ADVICE = (
    "It can only be read by running it. On a machine that may do that, re-save it as safetensors, or with "
    "torch.save(torch.load(path, weights_only=True), new_path, _use_new_zipfile_serialization=True)."
)


def read_torch_bin(path: Path, root: Path | None = None) -> dict[str, StoredTensor]:
    """The tensors of a state dict that torch.save wrote, in the order of the dict.

    Tensors may share a storage (tied weights) or view a part of one, as long as their elements lie in C order.

    Args:
        path: the archive.
        root: the checkpoint's folder, when it is not the archive's own.

    Raises:
        CheckpointError: the file is in a legacy format, not a well-formed archive of one flat state dict, big endian,
            asks for anything beyond tensors, or has tensors that are not contiguous or lie outside their storage.
    """
    with open_bounded(path, root) as file:
        _refuse_other_formats(file)
        members = read_zip_members(file)
        folder = _top_folder(members, path)
        _check_byte_order(file, members.get(f"{folder}/byteorder"))
        tensors = read_state_dict(_read_pickle(file, members.get(f"{folder}/data.pkl")), path)
    strided = [name for name, tensor in tensors.items() if not _is_contiguous(tensor)]
    if strided:
        raise CheckpointError(
            f"has tensors whose elements do not lie in C order: {name_some(strided)}",
            where=path,
            advice="Re-save each of them as tensor.contiguous().",
        )
    return {
        name: _locate(path, name, tensor, members.get(f"{folder}/data/{tensor.storage.key}"))
        for name, tensor in tensors.items()
    }


def _refuse_other_formats(file: BoundedFile) -> None:
    start = file.read(0, min(file.size, 512))
    if start.startswith(_ZIP_START):
        return
    if _LEGACY_MAGIC in start[:32]:
        raise CheckpointError("is in torch's legacy pickle format", where=file.path, advice=_LEGACY_ADVICE)
    if start[257:262] == b"ustar":
        raise CheckpointError("is in torch's legacy tar format", where=file.path, advice=_LEGACY_ADVICE)
    raise CheckpointError(
        "is not a torch archive",
        where=file.path,
        expected="a zip file",
        found=quoted(start[:16]),
        advice=_LEGACY_ADVICE,
    )


def _top_folder(members: dict[str, ZipMember], path: Path) -> str:
    folders = {name.partition("/")[0] for name in members}
    if len(folders) != 1:
        raise CheckpointError(
            "is a zip archive, but not one that torch.save wrote",
            where=path,
            expected="one folder with everything in it",
            found=f"{len(folders)} entries at the top",
        )
    return folders.pop()


def _check_byte_order(file: BoundedFile, member: ZipMember | None) -> None:
    if member is None:
        return
    order = file.read(member.offset, min(member.nbytes, 16))
    if order != b"little":
        raise CheckpointError(
            "was written on a machine of another byte order",
            where=file.path,
            expected="little",
            found=quoted(order),
            advice="Re-save it on a little-endian machine, or as safetensors.",
        )


def _read_pickle(file: BoundedFile, member: ZipMember | None) -> bytes:
    if member is None:
        raise CheckpointError("is a zip archive without a state dict", where=file.path, expected="a member data.pkl")
    if member.nbytes > MAX_PICKLE_BYTES:
        raise CheckpointError(
            "has too large a data.pkl", where=file.path, expected=f"at most {MAX_PICKLE_BYTES}", found=member.nbytes
        )
    pickle = file.read(member.offset, member.nbytes)
    if member.crc32 not in (0, zlib.crc32(pickle)):  # 0: torch.serialization.set_crc32_options(False)
        raise CheckpointError(
            "has a data.pkl that does not match its checksum",
            where=file.path,
            advice="The file is damaged or was changed after it was saved; download it again.",
        )
    return pickle


def _is_contiguous(tensor: TensorRef) -> bool:
    expected = 1
    for dim, stride in zip(reversed(tensor.shape), reversed(tensor.stride), strict=True):
        if dim > 1 and stride != expected:
            return 0 in tensor.shape
        expected *= dim
    return True


def _locate(path: Path, name: str, tensor: TensorRef, member: ZipMember | None) -> StoredTensor:
    storage = tensor.storage
    where = f"{path}, tensor {name}"
    if member is None:
        raise CheckpointError("has no bytes in the archive", where=where, expected=f"a member data/{storage.key}")
    itemsize = DTYPES[storage.dtype].itemsize
    if member.nbytes != storage.numel * itemsize:
        raise CheckpointError(
            "has a storage of the wrong size",
            where=where,
            expected=f"{storage.numel * itemsize} bytes for {storage.numel} x {storage.dtype}",
            found=member.nbytes,
        )
    last = tensor.offset + math.prod(tensor.shape)
    if last > storage.numel:
        raise CheckpointError(
            "reaches beyond its storage", where=where, expected=f"at most {storage.numel} elements", found=last
        )
    begin = tensor.offset * itemsize
    extent = Extent(path, member.offset + begin, last * itemsize - begin)
    return StoredTensor(name, storage.dtype, tensor.shape, (extent,))
