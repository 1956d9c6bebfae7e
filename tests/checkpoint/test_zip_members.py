"""Zip directories that contradict their archive, and archives made to cost more than they hold."""

from __future__ import annotations

import struct
import warnings
import zipfile
from pathlib import Path

import pytest

from telechat_mindie.checkpoint.formats.bounds import open_bounded
from telechat_mindie.checkpoint.formats.zip_members import ZipMember, read_zip_members
from telechat_mindie.errors import CheckpointError


def members(path: Path) -> dict[str, ZipMember]:
    with open_bounded(path) as file:
        return read_zip_members(file)


def local(name: bytes, data: bytes, *, flags: int = 0, method: int = 0, size: int | None = None) -> bytes:
    """A member's local header and its data."""
    size = len(data) if size is None else size
    return struct.pack("<4s5H3L2H", b"PK\3\4", 20, flags, method, 0, 0, 0, size, size, len(name), 0) + name + data


def entry(name: bytes, header: int, size: int, *, flags: int = 0, method: int = 0, extra: bytes = b"") -> bytes:
    """A member's entry in the central directory."""
    fields = (20, 20, flags, method, 0, 0, 0, size, size, len(name), len(extra), 0, 0, 0, 0, header)
    return struct.pack("<4s6H3L5H2L", b"PK\1\2", *fields) + name + extra


def archive(path: Path, content: bytes, entries: list[bytes], *, count: int | None = None, tail: bytes = b"") -> Path:
    """Members' bytes, the directory of these entries, and its end record."""
    directory = b"".join(entries)
    count = len(entries) if count is None else count
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, len(directory), len(content), 0)
    path.write_bytes(content + directory + end + tail)
    return path


def wide_archive(
    path: Path,
    content: bytes,
    entries: list[bytes],
    *,
    count: int | None = None,
    small: tuple[int, int, int] | None = None,
) -> Path:
    """The same with a zip64 end record; `small` are the count, size and offset that the old end record gives."""
    directory = b"".join(entries)
    count = len(entries) if count is None else count
    end64 = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(directory), len(content))
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, len(content) + len(directory), 1)
    small = (0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF) if small is None else small
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, small[0], *small, 0)
    path.write_bytes(content + directory + end64 + locator + end)
    return path


def test_members_are_where_zipfile_says(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a", "w") as written:
        for number in range(20):
            written.writestr(f"folder/{number}", bytes([number]) * number)

    found = members(tmp_path / "a")

    content = (tmp_path / "a").read_bytes()
    assert list(found) == [f"folder/{number}" for number in range(20)]
    for number, member in enumerate(found.values()):
        assert content[member.offset : member.offset + member.nbytes] == bytes([number]) * number


def test_offsets_and_sizes_over_4_gib_are_read(tmp_path: Path) -> None:
    # A sparse file: "big" has 5 GiB, and "behind" begins beyond them.
    big = 5 << 30
    path = tmp_path / "a"
    head = local(b"big", b"", size=0xFFFFFFFF)
    behind = local(b"behind", b"bytes")
    extra_big = struct.pack("<2H2Q", 1, 16, big, big)
    extra_behind = struct.pack("<2HH", 0x4246, 2, 0) + struct.pack("<2HQ", 1, 8, len(head) + big)
    directory = entry(b"big", 0, 0xFFFFFFFF, extra=extra_big) + entry(b"behind", 0xFFFFFFFF, 5, extra=extra_behind)
    begin = len(head) + big + len(behind)
    with path.open("wb") as file:
        file.write(head)
        file.seek(len(head) + big)
        file.write(behind + directory)
        file.write(struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 2, 2, len(directory), begin))
        file.write(struct.pack("<4sLQL", b"PK\6\7", 0, begin + len(directory), 1))
        file.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 2, 2, len(directory), 0xFFFFFFFF, 0))

    found = members(path)

    assert (found["big"].offset, found["big"].nbytes) == (len(head), big)
    assert (found["behind"].offset, found["behind"].nbytes) == (begin - 5, 5)


def test_an_archive_without_members_is_empty(tmp_path: Path) -> None:
    assert members(archive(tmp_path / "a", b"", [])) == {}
    assert members(wide_archive(tmp_path / "a", b"", [])) == {}


def test_refuses_a_zip_bomb_unread(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a", "w", zipfile.ZIP_DEFLATED) as written:
        written.writestr("a/data.pkl", bytes(50_000_000))
    with pytest.raises(CheckpointError, match=r"a/data\.pkl is compressed"):
        members(tmp_path / "a")


def test_refuses_a_name_twice(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a", "w") as written, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        written.writestr("a/data.pkl", b"good")
        written.writestr("a/data.pkl", b"evil")
    with pytest.raises(CheckpointError, match=r"a/data\.pkl twice"):
        members(tmp_path / "a")


@pytest.mark.parametrize(
    "name",
    [
        b"../a",
        b"/etc/passwd",
        b"a/../../b",
        b"a//b",
        b"a/./b",
        b"..",
        b"a\\..\\b",
        b"a\0b",
        b"\xff",
        b"",
        b"a\nb",
        b"a" * 513,
    ],
)
def test_refuses_names_that_leave_the_archive(tmp_path: Path, name: bytes) -> None:
    with pytest.raises(CheckpointError, match="name"):
        members(archive(tmp_path / "a", local(name, b"x"), [entry(name, 0, 1)]))


A, B = local(b"a", b"12345678"), local(b"b", b"12345678")
AB = [entry(b"a", 0, 8), entry(b"b", len(A), 8)]
INNER = local(b"inner", b"1234")


def test_the_archives_that_are_spoilt_below_are_good(tmp_path: Path) -> None:
    assert members(archive(tmp_path / "a", A + B, AB)).keys() == {"a", "b"}
    assert members(wide_archive(tmp_path / "a", A + B, AB)).keys() == {"a", "b"}


CONTRADICTIONS = {
    "a member in a member": (
        local(b"outer", INNER),
        [entry(b"outer", 0, len(INNER)), entry(b"inner", 35, 4)],
        "overlap",
    ),
    "two sizes": (A, [entry(b"a", 0, 9)], "9 bytes in the local header"),
    "into the directory": (local(b"a", b"1234", size=50), [entry(b"a", 0, 50)], "runs into the zip directory"),
    "over the end": (local(b"a", b"1234", size=9999), [entry(b"a", 0, 9999)], "lies outside the file"),
    "encrypted": (local(b"a", b"1234", flags=1), [entry(b"a", 0, 4, flags=1)], "encrypted"),
    "compressed": (local(b"a", b"1234", method=8), [entry(b"a", 0, 4, method=8)], "compressed"),
    "compressed in one of two headers": (local(b"a", b"1234", method=8), [entry(b"a", 0, 4)], "local header of a"),
    "two names": (local(b"b", b"1234"), [entry(b"a", 0, 4)], "local header of a"),
    "no header there": (A, [entry(b"a", 1, 8)], "local header of a"),
    "header over the end": (A, [entry(b"a", 0xFFFFFFF0, 8)], "ends too early"),
    "zip64 without values": (
        A,
        [entry(b"a", 0, 0xFFFFFFFF, extra=struct.pack("<2H", 1, 0))],
        "in the local header",
    ),
    "entry cut": (A + B, [AB[0], AB[1][:-1]], "directory entry"),
    "entry of another kind": (A + B, [AB[0], b"PK\5\6" + AB[1][4:]], "directory entry"),
    "bytes behind the entries": (A + B, [AB[0], AB[1] + b"x"], "directory entries"),
}


@pytest.mark.parametrize(("content", "entries", "message"), CONTRADICTIONS.values(), ids=CONTRADICTIONS.keys())
def test_refuses_archives_that_contradict_themselves(
    tmp_path: Path, content: bytes, entries: list[bytes], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        members(archive(tmp_path / "a", content, entries))


def test_refuses_directories_that_are_not_where_the_end_record_says(tmp_path: Path) -> None:
    archive(tmp_path / "a", A + B, AB, tail=b"x")
    for spoilt in (
        tmp_path / "a",
        archive(tmp_path / "b", A + B, AB, count=3),
        archive(tmp_path / "c", A + B, AB, count=1),
        wide_archive(tmp_path / "d", A + B, AB, small=(3, 0xFFFFFFFF, 0xFFFFFFFF)),
        wide_archive(tmp_path / "e", A + B, AB, small=(2, 0xFFFFFFFF, 0)),
    ):
        with pytest.raises(CheckpointError, match="not a well-formed zip"):
            members(spoilt)


@pytest.mark.parametrize("count", [200_000, 2**40, 2**64 - 1])
def test_refuses_directories_of_absurd_size_before_reading_them(tmp_path: Path, count: int) -> None:
    with pytest.raises(CheckpointError, match="too large a zip directory"):
        members(wide_archive(tmp_path / "a", A + B, AB, count=count))


def test_refuses_archives_cut_anywhere(tmp_path: Path) -> None:
    whole = wide_archive(tmp_path / "a", A + B, AB).read_bytes()
    for size in range(len(whole)):
        (tmp_path / "a").write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            members(tmp_path / "a")
