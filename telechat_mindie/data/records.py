"""Records of data files, one after the other: lines of JSON, or the items of one JSON array."""

from __future__ import annotations

import codecs
import glob
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from telechat_mindie.errors import InputError
from telechat_mindie.reading import BYTE_ORDER_MARK, parse_json, refuse_lfs_pointer

MAX_RECORD_BYTES = 64 << 20
"""Of one conversation: far above any that a model can be trained on."""

_CHUNK_BYTES = 1 << 20
_WHITE_SPACE = " \t\r\n"
_BEFORE_FIRST, _BEFORE_NEXT = re.compile(r"\s*\[\s*"), re.compile(r"\s*,\s*")
_END = re.compile(r"\s*\]\s*")


class Record(NamedTuple):
    """One conversation as it stands in a file. `file:line` says where, or `file: item N` in an array."""

    where: str
    data: bytes

    def parse(self) -> dict[str, Any]:
        """The JSON object.

        Raises:
            InputError: not UTF-8.
            ConfigError: not a JSON object, see `reading.parse_json`.
        """
        try:
            text = self.data.decode()
        except UnicodeDecodeError as error:
            raise _not_utf8(error, self.where) from None
        return parse_json(text, self.where)


def data_files(names: Sequence[str]) -> list[Path]:
    """The files that are meant by paths and globs, each once, in the order given and by name within a glob.

    Raises:
        InputError: a name that no file has, or one that is not a regular file.
    """
    found: dict[Path, None] = {}
    for name in names:
        paths = [Path(name)] if Path(name).exists() else sorted(map(Path, glob.glob(name, recursive=True)))  # noqa: PTH207
        if not paths:
            raise InputError(
                "is not there", where=name, advice="Name files of JSON, or a pattern such as 'data/*.jsonl'."
            )
        for path in paths:
            if not path.is_file():
                kind = "a folder" if path.is_dir() else "no regular file"
                raise InputError(
                    "is not a file", where=path, found=kind, advice=f"Name its files, as '{path}/*.jsonl'."
                )
            found[path] = None
    return list(found)


def read_records(path: Path, advance: Callable[[int], None] = lambda _: None) -> Iterator[Record]:
    """The records of a file, of which never more than one is held; empty lines are none.

    A file whose first character is `[` is one JSON array, any other holds a record a line.

    Args:
        advance: told of bytes as they are read.

    Raises:
        InputError: the file cannot be read, a record is over MAX_RECORD_BYTES, or the array is not one of objects.
    """
    mark = BYTE_ORDER_MARK.encode()
    try:
        with open(path, "rb") as file:
            start = file.peek(_CHUNK_BYTES)
            refuse_lfs_pointer(start, path, InputError)
            if start.startswith(mark):
                file.read(len(mark))
            if start.removeprefix(mark).lstrip(_WHITE_SPACE.encode()).startswith(b"["):
                yield from _items(file, path, advance)
            else:
                yield from _lines(file, path, advance)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=path) from None


def _lines(file: IO[bytes], path: Path, advance: Callable[[int], None]) -> Iterator[Record]:
    number = 0
    while line := file.readline(MAX_RECORD_BYTES + 1):
        number += 1
        advance(len(line))
        _check_size(len(line), f"{path}:{number}")
        if data := line.strip(_WHITE_SPACE.encode()):
            yield Record(f"{path}:{number}", data)


def _items(file: IO[bytes], path: Path, advance: Callable[[int], None]) -> Iterator[Record]:
    decode_utf8 = codecs.getincrementaldecoder("utf-8")().decode
    decode_item = json.JSONDecoder().raw_decode
    # `text` is what has been read of the file, from `at` on not yet understood: the first bracket or a comma is next.
    text, at, ended, number, size = "", 0, False, 0, _CHUNK_BYTES
    while True:
        where = f"{path}: item {number + 1}"
        start = (_BEFORE_NEXT if number else _BEFORE_FIRST).match(text, at)
        end = _END.match(text, at) if number else start and _END.match(text, start.end())
        if end:
            if ended and end.end() == len(text):
                return
            if end.end() < len(text):
                raise InputError("goes on behind its JSON array", where=path, advice="A file is one array, or lines.")
        elif start:
            try:
                value, stop = decode_item(text, start.end())
            except RecursionError:
                raise InputError("is nested too deeply", where=where) from None
            except json.JSONDecodeError as error:
                if ended:
                    raise InputError(f"is not valid JSON: {error.msg}", where=where) from None
            else:
                if not isinstance(value, dict):
                    raise InputError("is not an object", where=where, found=type(value).__name__)
                yield Record(where, text[start.end() : stop].encode())
                at, number, size = stop, number + 1, _CHUNK_BYTES
                continue
        elif ended or text[at:].strip(_WHITE_SPACE):
            raise InputError("is not a JSON array of objects", where=where, advice="Is the file cut off?")
        text, at = text[at:], 0
        _check_size(len(text), where)
        chunk = file.read(size)
        size *= 2  # an item that is still not whole is tried again at twice the length: linear in all
        advance(len(chunk))
        ended = not chunk
        try:
            text += decode_utf8(chunk, ended)
        except UnicodeDecodeError as error:
            raise _not_utf8(error, where) from None


def _check_size(size: int, where: str) -> None:
    if size > MAX_RECORD_BYTES:
        raise InputError("is too long", where=where, expected=f"at most {MAX_RECORD_BYTES} bytes for one conversation")


def _not_utf8(error: UnicodeDecodeError, where: str) -> InputError:
    advice = "Save the file as UTF-8."
    try:
        error.object[error.start :].decode("gb18030")
        advice = "It may be GB18030: convert it with `iconv -f GB18030 -t UTF-8`."
    except UnicodeDecodeError:
        pass
    return InputError(f"is not UTF-8: {error.reason} at byte {error.start + 1}", where=where, advice=advice)
