"""Files read with suspicion: bounded in size and depth, as data only, with every fault told in one sentence."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import yaml

from telechat_mindie.errors import ConfigError, InputError

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


def existing_directory(path: Path, what: str) -> Path:
    """`path` if it is a directory.

    Raises:
        InputError: it is missing or not a directory.
    """
    if not path.is_dir():
        found = "a file" if path.exists() else "nothing"
        raise InputError(f"{what} is not a directory", where=path, found=found)
    return path
