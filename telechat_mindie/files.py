"""Files read with suspicion and written whole or not at all."""

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

import yaml

from telechat_mindie.errors import ConfigError, InputError, OutputError

DIR_MODE = 0o750
FILE_MODE = 0o640
"""The widest modes that MindIE accepts for a model directory and its files (MindIE-LLM safe_path.cpp)."""

MAX_TEXT_BYTES = 64 << 20
MAX_DEPTH = 64


def read_json(path: Path, limit: int = MAX_TEXT_BYTES) -> dict[str, Any]:
    """A JSON object from a file, as data only.

    Raises:
        ConfigError: absent, unreadable, over `limit` bytes, not UTF-8 JSON, not an object, a key twice, too deep.
    """
    text = read_text(path, limit)
    try:
        data = json.loads(text, object_pairs_hook=_unique_keys)
    except RecursionError:
        raise ConfigError("is nested too deeply", where=path) from None
    except ValueError as error:
        raise ConfigError(f"is not valid JSON: {error}", where=path) from None
    if not isinstance(data, dict):
        raise ConfigError("holds no JSON object", where=path, found=type(data).__name__)
    return data


def read_yaml(path: Path, limit: int = 1 << 20) -> dict[str, Any]:
    """A YAML mapping from a file: plain data, no aliases (so no alias bombs), no key twice.

    Raises:
        ConfigError: absent, unreadable, over `limit` bytes, not YAML, not a mapping, with aliases or duplicate keys.
    """
    text = read_text(path, limit)
    try:
        data = yaml.load(text, Loader=_PlainLoader)
    except RecursionError:
        raise ConfigError("is nested too deeply", where=path) from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"is not plain YAML: {error}", where=path) from None
    if not isinstance(data, dict):
        raise ConfigError("holds no YAML mapping", where=path, found=type(data).__name__)
    return data


class _PlainLoader(yaml.SafeLoader):
    """SafeLoader without aliases and with unique keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not allowed")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for position, key in enumerate(keys):
            if key in keys[:position]:
                raise yaml.YAMLError(f"key {key!r} stands twice")
        return super().construct_mapping(node, deep)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {twice!r} stands twice")
    return result


def read_text(path: Path, limit: int = MAX_TEXT_BYTES) -> str:
    """A UTF-8 file's text. Raises ConfigError where it is absent, no regular file, over `limit` bytes, or not UTF-8."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            if not path.is_file():
                raise ConfigError("is not a regular file", where=path)
            raw = file.read(limit + 1)
    except FileNotFoundError:
        raise ConfigError("file is missing", where=path) from None
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=path) from None
    if len(raw) > limit:
        raise ConfigError("is too large", where=path, expected=f"at most {limit} bytes")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"is not UTF-8: {error.reason} at byte {error.start}", where=path) from None


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


class StagedDirectory:
    """A directory that appears under its name complete, or not at all.

    It is made as the neighbour `.NAME.partial`, locked against a second run, and renamed by `commit`. Leaving the
    context without a commit removes it, unless `keep` was set. An existing target is replaced only with `replace`,
    and only if it holds a `marker` file, which shows that this package made it.

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
        self.keep = False
        self._replace = replace
        self._marker = marker
        self._resume = resume
        self._single_file = single_file
        self._scratch = scratch
        self._lock: int | None = None

    def __enter__(self) -> StagedDirectory:
        self._check_target()
        with reporting_os_errors(self.target):
            fresh = not self.path.exists()
            if self.path.is_symlink():
                raise OutputError("is a symbolic link", where=self.path, advice="Remove it.")
            if fresh:
                self.path.mkdir(mode=DIR_MODE)
            self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(self._lock)
                raise OutputError(
                    "another run is making this directory", where=self.target, advice="Wait for it to end."
                ) from None
            self.path.chmod(DIR_MODE)
            if not fresh and not self._resume:
                _empty_directory(self.path)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if self.path.exists() and not self.keep:
                shutil.rmtree(self.path, ignore_errors=True)
        finally:
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
                self.target.rename(old)
                try:
                    self.path.rename(self.target)
                except OSError:
                    old.rename(self.target)
                    raise
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


def existing_directory(path: Path, what: str) -> Path:
    """`path` if it is a directory.

    Raises:
        InputError: it is missing or not a directory.
    """
    if not path.is_dir():
        found = "a file" if path.exists() else "nothing"
        raise InputError(f"{what} is not a directory", where=path, found=found)
    return path
