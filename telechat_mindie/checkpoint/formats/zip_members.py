"""The members of an uncompressed zip archive, as extents of its file.

The layout is PKWARE's APPNOTE.TXT, sections 4.3 and 4.5.3 (zip64, which torch writes always). The standard zipfile
module is not used: it reads a central directory of any size, and does not notice members that overlap.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from telechat_mindie.checkpoint.formats.bounds import MAX_TENSORS, BoundedFile, checked_name, quoted
from telechat_mindie.errors import CheckpointError

MAX_DIRECTORY_BYTES = 64 << 20
_MAX_MEMBERS = MAX_TENSORS + 64  # a tensor's storage each, and the archive's few own records

_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_DIRECTORY_ENTRY = struct.Struct("<4s6H3L5H2L")
_END = struct.Struct("<4s4H2LH")
_END_LOCATOR64 = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")

_SATURATED = 0xFFFFFFFF  # "the real value stands in the zip64 record"
_HAS_DESCRIPTOR = 0x0008  # sizes follow the data, and the local header may have zeros
_IS_UTF8 = 0x0800
_ADVICE = "The file is damaged or was not written by torch.save; download it again or re-save it."


@dataclass(frozen=True, slots=True)
class ZipMember:
    """Where a member's header begins and where its bytes lie. `crc32` is 0 when the writer did not compute it."""

    header: int
    offset: int
    nbytes: int
    crc32: int


def read_zip_members(file: BoundedFile) -> dict[str, ZipMember]:
    """The members of an archive by name, in the order of the central directory.

    Raises:
        CheckpointError: a member is compressed, encrypted, named twice or with a path that leaves the archive, overlaps
            another or lies outside the file; or the directory contradicts itself or is too large.
    """
    begin, size, count = _find_directory(file)
    if count > _MAX_MEMBERS or size > MAX_DIRECTORY_BYTES:
        raise CheckpointError(
            "has too large a zip directory",
            where=file.path,
            expected=f"at most {_MAX_MEMBERS} members and {MAX_DIRECTORY_BYTES} bytes",
            found=f"{count} members and {size} bytes",
        )
    directory = file.read(begin, size)
    members: dict[str, ZipMember] = {}
    position = 0
    for _ in range(count):
        name, member, position = _read_entry(file, directory, position)
        if name in members:
            raise CheckpointError(f"holds the zip member {name} twice", where=file.path)
        members[name] = member
    if position != size:
        raise _broken(file, f"directory entries of {size} bytes", position)
    end = 0
    for member in sorted(members.values(), key=lambda member: member.header):
        if member.header < end:
            raise CheckpointError("has zip members that overlap", where=file.path, advice=_ADVICE)
        end = member.offset + member.nbytes
    if end > begin:
        raise CheckpointError("has a zip member that runs into the zip directory", where=file.path, advice=_ADVICE)
    return members


def _find_directory(file: BoundedFile) -> tuple[int, int, int]:
    """Offset and bytes of the central directory, and its number of entries."""
    end = file.size - _END.size
    if end < 0:
        raise _broken(file, f"at least {_END.size} bytes", file.size)
    signature, disk, first_disk, here, count, size, begin, comment = _END.unpack(file.read(end, _END.size))
    if signature != b"PK\x05\x06" or (disk, first_disk, here, comment) != (0, 0, count, 0):
        raise _broken(file, "the zip directory's end record in the last 22 bytes", "something else")
    locator = end - _END_LOCATOR64.size
    if locator >= 0 and file.read(locator, 4) == b"PK\x06\x07":
        small = (count, size, begin)
        end = locator - _END64.size
        if _END_LOCATOR64.unpack(file.read(locator, _END_LOCATOR64.size))[1:] != (0, end, 1):
            raise _broken(file, f"a zip64 end record at {end}", "another place")
        fields = _END64.unpack(file.read(end, _END64.size))
        count, size, begin = fields[7:]
        if fields[:2] != (b"PK\x06\x06", _END64.size - 12) or fields[4:7] != (0, 0, count):
            raise _broken(file, f"a zip64 end record at {end}", "another record")
        limits = (0xFFFF, _SATURATED, _SATURATED)
        if any(s not in (large, limit) for s, large, limit in zip(small, (count, size, begin), limits, strict=True)):
            raise _broken(file, "end records that agree", "two that differ")
    if begin + size != end:
        raise _broken(file, f"a zip directory that ends at {end}", begin + size)
    return begin, size, count


def _read_entry(file: BoundedFile, directory: bytes, position: int) -> tuple[str, ZipMember, int]:
    """Name and member of the directory entry at `position`, and the position of the next entry."""
    names = position + _DIRECTORY_ENTRY.size
    if names > len(directory):
        raise _broken(file, "a whole zip directory entry", "the directory's end")
    fields = _DIRECTORY_ENTRY.unpack_from(directory, position)
    signature, _, _, flags, method, _, _, crc32, packed, nbytes, name_size, extra_size, comment_size, disk = fields[:14]
    extras = names + name_size
    comments = extras + extra_size
    if signature != b"PK\x01\x02" or disk != 0 or comments + comment_size > len(directory):
        raise _broken(file, "a zip directory entry", quoted(directory[position : position + 4]))
    encoded_name = directory[names:extras]
    name = _checked_path(encoded_name, file)
    # The zip64 record holds, in this order, only those of the three that are saturated here.
    wide = iter(_zip64_values(directory[extras:comments]))
    sizes = [next(wide, _SATURATED) if value == _SATURATED else value for value in (nbytes, packed, fields[16])]
    nbytes, packed, header = sizes
    if method != 0 or packed != nbytes:
        raise CheckpointError(
            f"zip member {name} is compressed",
            where=file.path,
            advice="torch.save never compresses: this is TorchScript, or was packed again by another program. Save the "
            "state dict with torch.save, or as safetensors.",
        )
    if flags & ~(_HAS_DESCRIPTOR | _IS_UTF8):
        raise CheckpointError(f"zip member {name} is encrypted or patched", where=file.path, found=f"flags {flags:#x}")
    offset = _data_offset(file, header, encoded_name, flags, nbytes)
    if offset + nbytes > file.size:
        raise CheckpointError(f"zip member {name} lies outside the file", where=file.path, advice=_ADVICE)
    return name, ZipMember(header, offset, nbytes, crc32), comments + comment_size


def _checked_path(encoded: bytes, file: BoundedFile) -> str:
    try:
        name = checked_name(encoded.decode(), file.path)
    except UnicodeDecodeError:
        raise CheckpointError(
            "has a zip member with a name that is not UTF-8", where=file.path, found=quoted(encoded)
        ) from None
    parts = name.removesuffix("/").split("/")
    if "\\" in name or any(part in ("", ".", "..") for part in parts):
        raise CheckpointError("has a zip member whose name leaves the archive", where=file.path, found=quoted(name))
    return name


def _zip64_values(extra: bytes) -> list[int]:
    """The 8-byte values of the zip64 record among an entry's extra fields."""
    position = 0
    while position + 4 <= len(extra):
        kind, size = struct.unpack_from("<2H", extra, position)
        if kind == 1:
            payload = extra[position + 4 : position + 4 + size]
            return [value for (value,) in struct.iter_unpack("<Q", payload[: len(payload) // 8 * 8])]
        position += 4 + size
    return []


def _data_offset(file: BoundedFile, header: int, name: bytes, flags: int, nbytes: int) -> int:
    """Where the data behind the local header at `header` begin, after checking it against the directory."""
    fields = _LOCAL_HEADER.unpack(file.read(header, _LOCAL_HEADER.size))
    signature, _, local_flags, method, _, _, _, packed, unpacked, name_size, extra_size = fields
    names = header + _LOCAL_HEADER.size
    if (signature, local_flags, method, name_size) != (b"PK\x03\x04", flags, 0, len(name)) or (
        file.read(names, name_size) != name
    ):
        raise _broken(file, f"the local header of {name.decode()} at {header}", "another")
    sizes_follow = flags & _HAS_DESCRIPTOR and (packed, unpacked) == (0, 0)
    if not sizes_follow and {packed, unpacked} - {nbytes, _SATURATED}:
        raise _broken(file, f"{nbytes} bytes in the local header of {name.decode()}", unpacked)
    return names + int(name_size) + int(extra_size)


def _broken(file: BoundedFile, expected: object, found: object) -> CheckpointError:
    return CheckpointError(
        "is not a well-formed zip archive", where=file.path, expected=expected, found=found, advice=_ADVICE
    )
