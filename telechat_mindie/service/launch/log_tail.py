"""The daemon's log, followed as it grows."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

MAX_LINE = 4096  # characters shown of a line
BLOCK = 1 << 16  # bytes read first from the end; then twice as many, and so on

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b[@-_]")
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class LogTail:
    """New whole lines of a growing file, made safe for a terminal. The file may not exist yet, and may be truncated."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._rest = b""

    def skip_to_last(self, lines: int) -> None:
        """Begin with the last `lines` whole lines that are there now."""
        with contextlib.suppress(FileNotFoundError), open(self._path, "rb") as file:
            begin = end = file.seek(0, os.SEEK_END)
            found, size = b"", BLOCK
            while begin > 0 and found.count(b"\n") <= lines:
                begin, size = max(0, end - size), 2 * size
                file.seek(begin)
                found = file.read(end - begin)
            kept = found.split(b"\n")[-lines - 1 :]
            self._offset = end - len(b"\n".join(kept))

    def read(self, final: bool = False) -> list[str]:
        """The lines that came since the last call; with `final` also a last one without its end."""
        try:
            with open(self._path, "rb") as file:
                if os.fstat(file.fileno()).st_size < self._offset:
                    self._offset, self._rest = 0, b""
                file.seek(self._offset)
                new = file.read()
        except FileNotFoundError:
            return []
        self._offset += len(new)
        *lines, self._rest = (self._rest + new).split(b"\n")
        if final and self._rest:
            lines.append(self._rest)
            self._rest = b""
        return [clean(line.decode(errors="replace")) for line in lines]


def clean(line: str) -> str:
    """A line without terminal escapes and control characters, cut to a readable length."""
    return _CONTROLS.sub("", _ESCAPES.sub("", line.rstrip("\r").replace("\t", "    ")))[:MAX_LINE]
