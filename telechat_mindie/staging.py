"""Files and directories that appear whole or not at all: a temporary neighbour, a sync, a rename."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from telechat_mindie.errors import OutputError

DIR_MODE = 0o750
FILE_MODE = 0o640
"""The widest modes that MindIE accepts for a model directory and its files (MindIE-LLM safe_path.cpp)."""

LEFT: list[Path] = []
"""Partial directories that this process kept for another run to go on with."""

_unfinished: list[StagedDirectory] = []


def abandon_unfinished() -> None:
    """Leave every staged directory as an exception would, before the process ends without one."""
    for staged in reversed(_unfinished):
        staged.__exit__(KeyboardInterrupt)


def dump_json(data: Any) -> bytes:
    """JSON as people read it: two spaces, Chinese as it is, a final newline."""
    return (json.dumps(data, ensure_ascii=False, indent=2) + "\n").encode()


@contextlib.contextmanager
def reporting_os_errors(target: Path) -> Iterator[None]:
    """Turn an OSError of the block into an OutputError that says what the user can do about it."""
    try:
        yield
    except OSError as error:
        advice = {
            errno.ENOSPC: "Free some space or choose another disk.",
            errno.EDQUOT: "The disk quota is used up; free some space or choose another disk.",
            errno.EFBIG: "The file size limit (ulimit -f) is too low.",
            errno.EROFS: "Choose a target on a writable file system.",
            errno.EACCES: "Choose a target that you may write to.",
            errno.EPERM: "Choose a target that you may write to.",
        }.get(error.errno or 0)
        raise OutputError(
            f"cannot be written: {error.strerror or error}", where=error.filename or target, advice=advice
        ) from None


def write_file(path: Path, data: bytes) -> None:
    """Write `data` to a temporary neighbour, sync it, and rename it over `path`, with mode 0640.

    Raises:
        OutputError: the target cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with reporting_os_errors(path):
        try:
            with open(temporary, "wb") as file:
                os.fchmod(file.fileno(), FILE_MODE)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            sync_directory(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_file_target(path: Path) -> None:
    """Refuse before a long work what `write_file` could not write after it.

    Raises:
        OutputError: the folder is missing or cannot be written, or the file is a folder.
    """
    if not path.parent.is_dir():
        raise OutputError("parent folder is missing", where=path, advice=f"mkdir -p {path.parent}")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise OutputError("cannot be written", where=path, advice="Choose another folder or name.")


class StagedDirectory:
    """A directory that appears under its name complete, or not at all.

    It is made as the neighbour `.NAME.partial`, locked against a second run, and renamed by `commit`. Leaving the
    context without a commit removes it; but where it is `resumable`, an interrupt leaves it there, and so does an error
    of a resumed run. An existing target is replaced only with `replace`, and only if it holds a `marker` file, which
    shows that this package made it.

    Args:
        target: the directory to make; an existing empty directory counts as absent.
        replace: allow an existing target that holds `marker`.
        marker: name of the file that every directory of this kind holds.
        resume: keep what an interrupted run left in the partial directory.
        single_file: the target is a file; `commit_file` moves it out of the partial directory.
        scratch: name of a file for the making alone, which `commit` takes away at the last moment.

    Raises:
        OutputError: the target exists, its parent is missing or cannot be written, or another run is making it.
    """

    def __init__(
        self,
        target: Path,
        *,
        replace: bool,
        marker: str = "",
        resume: bool = False,
        single_file: bool = False,
        scratch: str = "",
    ) -> None:
        self.target = Path(os.path.abspath(target))  # noqa: PTH100 - resolve() would follow a link
        self.path = self.target.with_name(f".{self.target.name}.partial")
        self.resumable = False
        self._replace = replace
        self._marker = marker
        self._resume = resume
        self._single_file = single_file
        self._scratch = scratch
        self._lock: int | None = None

    def __enter__(self) -> StagedDirectory:
        self._check_target()
        try:
            self._begin()
        except BaseException as error:
            if self._lock is not None:
                self.__exit__(type(error))
            elif not isinstance(error, Exception):  # an interrupt behind mkdir
                with contextlib.suppress(OSError):
                    self.path.rmdir()
            raise
        return self

    def _begin(self) -> None:
        with reporting_os_errors(self.target):
            fresh = not self.path.exists()
            if self.path.is_symlink():
                raise OutputError("is a symbolic link", where=self.path, advice="Remove it.")
            if fresh:
                self.path.mkdir(mode=DIR_MODE)
            lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(lock)
                raise OutputError(
                    "another run is making this directory", where=self.target, advice="Wait for it to end."
                ) from None
            self.resumable = self._resume and not fresh
            self._lock = lock  # the directory is ours from here on
            _unfinished.append(self)
            self.path.chmod(DIR_MODE)
            if not self.resumable:
                _empty_directory(self.path)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            interrupted = kind is not None and not issubclass(kind, Exception)
            if self.resumable and (interrupted or (kind is not None and self._resume)) and self.path.exists():
                LEFT.append(self.path)
            else:
                shutil.rmtree(self.path, ignore_errors=True)
        finally:
            _unfinished.remove(self)
            if self._lock is not None:
                os.close(self._lock)

    def commit(self) -> None:
        """Set the modes, sync every file and directory, and give the directory its name."""
        with reporting_os_errors(self.target):
            for folder, _, names in os.walk(self.path, topdown=False):
                for name in names:
                    _sync_file(Path(folder, name))
                Path(folder).chmod(DIR_MODE)
                sync_directory(Path(folder))
            self._check_target()
            if self._scratch:
                (self.path / self._scratch).unlink(missing_ok=True)
            if self.target.is_dir() and any(self.target.iterdir()):
                old = self.target.with_name(f".{self.target.name}.old")
                shutil.rmtree(old, ignore_errors=True)
                try:
                    self.target.rename(old)
                    self.path.rename(self.target)
                except BaseException:  # an interrupt as well, which may come behind either
                    if not self.target.exists():
                        old.rename(self.target)
                    raise
                finally:
                    if self.target.exists():
                        shutil.rmtree(old, ignore_errors=True)
            else:
                self.path.rename(self.target)
            sync_directory(self.target.parent)

    def commit_file(self, name: str) -> None:
        """Sync the file `name` of the partial directory and give it the target's name."""
        with reporting_os_errors(self.target):
            _sync_file(self.path / name)
            self._check_target()
            (self.path / name).replace(self.target)
            sync_directory(self.target.parent)

    def _check_target(self) -> None:
        target = self.target
        if target.is_symlink():
            raise OutputError("is a symbolic link", where=target, advice="MindIE refuses links; name the real folder.")
        if not target.parent.is_dir():
            raise OutputError("parent folder is missing", where=target, advice=f"mkdir -p {target.parent}")
        if not target.exists():
            return
        if self._single_file:
            if target.is_dir() or not self._replace:
                advice = None if target.is_dir() else "Choose another path, or replace it with --force."
                raise OutputError("exists", where=target, advice=advice)
            return
        if not target.is_dir():
            raise OutputError("exists and is not a directory", where=target)
        with reporting_os_errors(target):
            filled = any(target.iterdir())
        if not filled:
            return
        if not self._replace:
            raise OutputError(
                "exists and is not empty", where=target, advice="Choose another path, or replace it with --force."
            )
        if not (target / self._marker).is_file():
            raise OutputError(
                f"was not made by this program (it holds no {self._marker}), so --force does not replace it",
                where=target,
                advice="Remove it yourself if you mean to.",
            )


def _empty_directory(path: Path) -> None:
    for entry in path.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fchmod(descriptor, FILE_MODE)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
