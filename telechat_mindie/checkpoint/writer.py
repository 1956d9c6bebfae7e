"""Output files that are written once, front to back, hashed on the way, and remembered in a journal."""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from telechat_mindie.checkpoint.direct_io import SequentialFile
from telechat_mindie.checkpoint.formats.containers import Frame
from telechat_mindie.errors import OutputError
from telechat_mindie.staging import DIR_MODE, reporting_os_errors


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A finished file: its path relative to the output folder, its size, its sha256 in hex."""

    path: str
    nbytes: int
    sha256: str


class HashedFile:
    """A file under construction, written front to back.

    `frame` cuts data into what is due; `hash` and `write` take the same pieces, each in order, from any thread;
    `finish` syncs and gives the record.

    Args:
        frames: what the file consists of: each frame's prefix goes in by itself, before the first byte of its data.
    """

    def __init__(self, root: Path, path: str, frames: Sequence[Frame]) -> None:
        self._target = root / path
        self._path = path
        self._frames = deque(frames)
        self._left = 0  # data bytes of the frame that is open
        self._written = 0
        self._hash = hashlib.sha256()
        with reporting_os_errors(self._target):
            self._target.parent.mkdir(mode=DIR_MODE, exist_ok=True)
            self._file = SequentialFile(self._target)

    def frame(self, data: memoryview) -> list[memoryview]:
        """`data` with the prefixes that are due in between. Raises OutputError for more data than was planned."""
        pieces = []
        while len(data):
            if not self._left:
                if not self._frames:
                    raise OutputError("gets more data than was planned", where=self._target)
                opened = self._frames.popleft()
                pieces.append(memoryview(opened.prefix))
                self._left = opened.nbytes
            pieces.append(data[: self._left])
            data = data[len(pieces[-1]) :]
            self._left -= len(pieces[-1])
        while self._frames and not self._left and not self._frames[0].nbytes:  # tensors without elements
            pieces.append(memoryview(self._frames.popleft().prefix))
        return pieces

    def hash(self, pieces: Sequence[memoryview]) -> None:
        for piece in pieces:
            self._hash.update(piece)

    def write(self, pieces: Sequence[memoryview]) -> None:
        """Raises OutputError where the disk is full or the file may not grow."""
        with reporting_os_errors(self._target):
            self._file.write(pieces)
        self._written += sum(len(piece) for piece in pieces)

    def finish(self) -> FileRecord:
        """Sync and close. Raises OutputError where less data came than was planned."""
        if self._left or self._frames:
            raise OutputError("came out too short", where=self._target, found=f"{self._written} bytes")
        with reporting_os_errors(self._target):
            self._file.sync()
        self.close()
        return FileRecord(self._path, self._written, self._hash.hexdigest())

    def close(self) -> None:
        self._file.close()


class Journal:
    """What an interrupted run had finished: a line a file, valid only for the very same conversion.

    The first line holds a fingerprint of everything that decides the output. A last line cut short by a kill is
    ignored, and so is a record whose file is not there with its size.
    """

    NAME = ".journal"

    def __init__(self, root: Path, fingerprint: str, *, resume: bool) -> None:
        self._path = root / self.NAME
        self.records: dict[str, FileRecord] = {}
        self.odd_values: dict[str, dict[str, int]] = {}
        if resume and self._path.exists():
            self._load(root, fingerprint)
        with reporting_os_errors(self._path):
            self._file = open(self._path, "w", encoding="utf-8")  # noqa: SIM115 - closed by close
            self._line({"fingerprint": fingerprint})
        self.add(list(self.records.values()), self.odd_values)

    def add(self, records: list[FileRecord], odd_values: dict[str, dict[str, int]]) -> None:
        """Remember finished files, and the odd values of the weights in them."""
        with reporting_os_errors(self._path):
            for name, counts in odd_values.items():
                self._line({"tensor": name, **counts})
            for record in records:
                self._line(asdict(record))
            self._file.flush()
            os.fsync(self._file.fileno())
        self.records |= {record.path: record for record in records}
        self.odd_values |= odd_values

    def remove_strays(self) -> None:
        """Delete what a killed run left unfinished, so that it cannot end up in the result."""
        root = self._path.parent
        kept = {root / path for path in self.records} | {self._path}
        for path in root.rglob("*"):
            if not path.is_dir() and path not in kept:
                path.unlink()

    def close(self) -> None:
        self._file.close()

    def _load(self, root: Path, fingerprint: str) -> None:
        lines = self._path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
        entries = []
        for line in lines:
            try:
                entries.append(json.loads(line))
            except ValueError:
                break
        if not entries or entries[0].get("fingerprint") != fingerprint:
            raise OutputError(
                "was begun with other options, another checkpoint or another version",
                where=root,
                advice="Run the command again without --resume.",
            )
        for entry in entries[1:]:
            if "tensor" in entry:
                self.odd_values[entry.pop("tensor")] = entry
                continue
            record = FileRecord(**entry)
            file = root / record.path
            if file.is_file() and file.stat().st_size == record.nbytes:
                self.records[record.path] = record

    def _line(self, entry: dict[str, object]) -> None:
        self._file.write(json.dumps(entry) + "\n")
