"""Replaces values in the text of a JSON file and leaves every other character as it is."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from json.decoder import scanstring  # type: ignore[attr-defined]
from typing import Any

from telechat_mindie.errors import ConfigError
from telechat_mindie.service.schema.violations import Location, json_path

_SPACE = re.compile(r"[ \t\r\n]*")
_SCALAR = re.compile(r'[^\s,\]}"]+')


@dataclass
class _Node:
    """A value: its characters [begin, end), and those of its quoted key where it is a member of an object."""

    begin: int
    end: int = 0
    key: tuple[int, int] = (0, 0)
    children: dict[str | int, _Node] = field(default_factory=dict)


def patch(text: str, values: Mapping[Location, Any], where: object) -> str:
    """`text` with the values at the given locations; a key that is not there is added at the end of its object.

    Args:
        text: valid JSON without duplicate keys, as `schema.parse` accepts it.
        values: new values by location.
        where: the file, for messages.

    Raises:
        ConfigError: a location lies in an object that the text does not have.
    """
    root, _ = _scan(text, _skip(text, 1 if text.startswith("\ufeff") else 0))
    edits: list[tuple[int, int, str]] = []
    added: dict[int, str] = {}
    for location, value in values.items():
        parent = root
        for depth, step in enumerate(location[:-1]):
            child = parent.children.get(step)
            if child is None or text[child.begin] != ("{" if isinstance(location[depth + 1], str) else "["):
                raise ConfigError(
                    "lacks an object that must be filled in",
                    where=f"{where}: {json_path(location[: depth + 1])}",
                    advice="Start from the conf/config.json that MindIE ships.",
                )
            parent = child
        node = parent.children.get(location[-1])
        if node is not None:
            if _dump(json.loads(text[node.begin : node.end])) != _dump(value):  # 0 is not false
                edits.append((node.begin, node.end, _dump(value)))
        else:
            end, member = _addition(text, parent, str(location[-1]), value)
            comma = ", " if end in added and not parent.children else ""
            added[end] = added.get(end, "") + comma + member
    edits += [(position, position, members) for position, members in added.items()]
    for begin, end, replacement in sorted(edits, reverse=True):
        text = text[:begin] + replacement + text[end:]
    return text


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _addition(text: str, parent: _Node, name: str, value: Any) -> tuple[int, str]:
    """Where a new member goes and what is inserted, laid out like the member before it."""
    if not parent.children:
        return parent.begin + 1, f"{_dump(name)}: {_dump(value)}"
    last = list(parent.children.values())[-1]
    before = _space_before(text, last.key[0]) or (" " if len(parent.children) == 1 else "")
    colon = text[last.key[1] : last.begin]
    return last.end, f",{before}{_dump(name)}{colon}{_dump(value)}"


def _space_before(text: str, position: int) -> str:
    before = text[:position]
    space = before[len(before.rstrip(" \t\r\n")) :]
    newline = space.rfind("\n")
    # Blank lines that set members apart are not repeated.
    return space if newline < 0 else ("\r\n" if space[:newline].endswith("\r") else "\n") + space[newline + 1 :]


def _scan(text: str, position: int) -> tuple[_Node, int]:
    """The value that begins at `position`, and the position behind it."""
    node = _Node(position)
    opening = text[position]
    if opening == '"':
        node.end = scanstring(text, position + 1)[1]
    elif opening in "{[":
        position = _skip(text, position + 1)
        while text[position] not in "}]":
            begin = end = position
            name: str | int = len(node.children)
            if opening == "{":
                name, end = scanstring(text, begin + 1)
                position = _skip(text, _skip(text, end) + 1)  # over the colon
            child, behind = _scan(text, position)
            child.key = (begin, end)
            node.children[name] = child
            position = _skip(text, behind)
            if text[position] == ",":
                position = _skip(text, position + 1)
        node.end = position + 1
    else:
        node.end = _SCALAR.match(text, position).end()  # type: ignore[union-attr]
    return node, node.end


def _skip(text: str, position: int) -> int:
    return _SPACE.match(text, position).end()  # type: ignore[union-attr]
