"""Files read with suspicion: bounded in size and depth, as data only, with every fault told in one sentence."""

from __future__ import annotations

import json
import math
import os
import re
import stat
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from telechat_mindie.errors import ConfigError, InputError, TelechatMindieError

MAX_TEXT_BYTES = 64 << 20
MAX_DEPTH = 64
BYTE_ORDER_MARK = "\ufeff"
LFS_POINTER = b"version https://git-lfs"
"""How the text begins that Git leaves in the place of a large file."""

_MARKS = re.compile(r'\\.|["\[\]{}]', re.DOTALL)  # what tells brackets from text: an escape is passed over as one


def read_json(path: Path, limit: int = MAX_TEXT_BYTES) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ConfigError: as `read_text` and `parse_json`.
    """
    return parse_json(read_text(path, limit), path)


def parse_json(text: str, where: object, max_depth: int = MAX_DEPTH) -> dict[str, Any]:
    """A JSON object from a text, as data only; a byte order mark is skipped.

    Args:
        text: the document.
        where: the file or what else it came from, for messages.
        max_depth: levels of objects and lists.

    Raises:
        ConfigError: not JSON (NaN and numbers beyond a double are none), no object, a key twice, too deep.
    """
    text = text.removeprefix(BYTE_ORDER_MARK)
    if (found := text_depth(text, max_depth)) > max_depth:  # before Python's parser, which recurses
        raise ConfigError("is nested too deeply", where=where, expected=f"at most {max_depth} levels", found=found)
    try:
        data = json.loads(text, object_pairs_hook=unique_keys, parse_constant=_finite, parse_float=_finite)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"is not valid JSON: {error.msg}",
            where=f"{where}:{error.lineno}:{error.colno}",
            advice="JSON has no comments, no single quotes and no comma after the last item.",
        ) from None
    except ValueError as error:
        raise ConfigError(f"is not valid JSON: {error}", where=where) from None
    if not isinstance(data, dict):
        raise ConfigError("holds no JSON object", where=where, expected="{...}", found=type(data).__name__)
    return data


def text_depth(text: str, enough: int = 0) -> int:
    """The deepest nesting of brackets outside of the strings of a JSON text; not counted where at most `enough`."""
    depth = text.count("[") + text.count("{")
    if depth <= enough:
        return depth
    depth = deepest = 0
    in_string = False
    for match in _MARKS.finditer(text):
        mark = match[0]
        if mark == '"':
            in_string = not in_string
        elif in_string:
            continue
        elif mark in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif mark in "]}":
            depth -= 1
    return deepest


def depth(value: object) -> int:
    """How many levels of objects and lists a JSON value has: 0 for a number, 1 for `[]`."""
    count, level = 0, [value] if isinstance(value, (dict, list)) else []
    while level:
        count += 1
        level = [
            item
            for parent in level
            for item in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(item, (dict, list))
        ]
    return count


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of `json.loads`, for `object_pairs_hook`. Raises ValueError where a key stands twice."""
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {twice!r} stands twice in one object")
    return result


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is no number of JSON")
    return number


def read_yaml(path: Path, limit: int = 1 << 20) -> dict[str, Any]:
    """A YAML mapping from a file: plain data, no aliases (so no alias bombs), no key twice.

    Raises:
        ConfigError: absent, unreadable, over `limit` bytes, not YAML, not a mapping, with aliases or duplicate keys.
    """
    import yaml

    text = read_text(path, limit)
    try:
        data = yaml.load(text, Loader=_plain_loader())
    except RecursionError:
        raise ConfigError("is nested too deeply", where=path) from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"is not plain YAML: {error}", where=path) from None
    if not isinstance(data, dict):
        raise ConfigError("holds no YAML mapping", where=path, found=type(data).__name__)
    return data


@cache
def _plain_loader() -> type[Any]:
    """SafeLoader without aliases and with unique keys. Made when asked for: who reads JSON alone needs no yaml."""
    import yaml

    class PlainLoader(yaml.SafeLoader):
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

    return PlainLoader


def read_text(path: str | os.PathLike[str], limit: int = MAX_TEXT_BYTES) -> str:
    """A UTF-8 file's text, line ends and byte order mark as they are.

    Raises:
        ConfigError: as `read_bytes`, or not UTF-8.
    """
    try:
        return read_bytes(path, limit).decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"is not UTF-8: {error.reason} at byte {error.start}", where=path) from None


def read_bytes(
    path: str | os.PathLike[str], limit: int, kind: type[TelechatMindieError] = ConfigError, advice: str | None = None
) -> bytes:
    """A file's bytes.

    Args:
        kind: the error that is raised.
        advice: what to do about a file that is not there or is none.

    Raises:
        TelechatMindieError: absent, no regular file, over `limit` bytes, or a Git LFS pointer.
    """
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise kind("is not a regular file", where=path, advice=advice)
            raw = file.read(limit + 1)
    except FileNotFoundError:
        raise kind("file is missing", where=path, advice=advice) from None
    except IsADirectoryError:
        raise kind("is not a regular file", where=path, found="a directory", advice=advice) from None
    except OSError as error:
        raise kind(f"cannot be read: {error.strerror}", where=path) from None
    if len(raw) > limit:
        raise kind("is too large", where=path, expected=f"at most {limit} bytes")
    refuse_lfs_pointer(raw, path, kind)
    return raw


def refuse_lfs_pointer(start: bytes, path: object, error: type[TelechatMindieError]) -> None:
    """Raises `error` where a file that begins with `start` is what Git LFS leaves in its place."""
    if start.startswith(LFS_POINTER):
        raise error(
            "is a Git LFS pointer, not the file itself",
            where=path,
            advice="Run `git lfs pull` in its folder, or download the file.",
        )


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe that nobody writes to would block


def existing_path(path: Path, what: str) -> Path:
    """`path` if it is a directory or a regular file.

    Raises:
        InputError: it is missing, or a pipe, a device or the like.
    """
    if not path.exists():
        raise InputError(f"{what} is not there", where=path, advice=meant_instead(path))
    if not path.is_dir() and not path.is_file():
        raise InputError(f"{what} is neither a folder nor a regular file", where=path)
    return path


_HUB = re.compile(
    r"(?P<url>https?:/+(www\.)?(huggingface\.co|hf-mirror\.com|modelscope\.cn)/(models/)?)?"
    r"(?P<owner>[A-Za-z][\w-]*)/(?P<name>[\w-][\w.-]*)(?(url)(/.*)?)"
)
_SERVICE = re.compile(r"(?P<scheme>https?:/+)?[\w.-]+(?P<port>:\d+)?(/.*)?")


def meant_instead(path: Path) -> str | None:
    """What to do about a path that is not there, as a sentence: it may be a model of a hub, a service, or misspelt.

    Args:
        path: of what a command was given; `Path` has made one slash of a URL's two.
    """
    text = str(path)
    hub = _HUB.fullmatch(text)
    if hub and (hub["url"] or not path.parent.exists()):
        owner, name = hub["owner"], hub["name"]
        other = owner.replace("Tele-AI", "TeleAI")  # what China Telecom is called at ModelScope
        return (
            f"Download the model first: `hf download {owner}/{name} --local-dir {name}` from Hugging Face, or "
            f"`modelscope download --model {other}/{name} --local_dir {name}` from ModelScope; then name {name}."
        )
    service = _SERVICE.fullmatch(text)
    if service and (service["scheme"] or service["port"]):
        scheme, address = re.fullmatch(r"(?:(https?):/+)?(.*)", text).groups("http")  # type: ignore[union-attr]
        return f"A service is asked by `telechat-mindie chat {scheme}://{address}`."
    try:
        beside = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return None
    close = get_close_matches(path.name, beside, 1)
    return f"Is it {path.parent / close[0]}?" if close else None
