"""Which versions work together: support.json, with the public source of each row in it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any


@dataclass(frozen=True, slots=True)
class MindieRelease:
    """A row of `mindie`: releases of one kind, and whether their workers know backendType ms."""

    versions: str
    pattern: str
    ms_backend: bool
    config: str  # what `--mindie` calls them
    source: str


@dataclass(frozen=True, slots=True)
class Stack:
    """A row of `mindspore`: versions that the MindSpore project released for each other."""

    mindformers: str
    mindspore: str
    cann: str
    driver: str | None
    telechat_mindie: str


@cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(resources.files(__package__).joinpath("support.json").read_text("utf-8"))
    return table


def mindie_releases() -> tuple[MindieRelease, ...]:
    return tuple(MindieRelease(**row) for row in _table()["mindie"])


def stacks() -> tuple[Stack, ...]:
    return tuple(Stack(**row) for row in _table()["mindspore"])


def stacks_source() -> str:
    return str(_table()["mindspore_source"])


def release_of(version: str | None) -> MindieRelease | None:
    """The row of a MindIE version; None for one that no row knows."""
    rows = (row for row in mindie_releases() if version and re.search(row.pattern, version, re.IGNORECASE))
    return next(rows, None)


def working_releases() -> str:
    """`1.0, 2.x and 3.0.0.beta.1`, for advice."""
    names = [release.versions for release in mindie_releases() if release.ms_backend]
    return ", ".join(names[:-1]) + " and " + names[-1]


def stack_with(**versions: str) -> Stack | None:
    """The row in which each named component has the given version, compared without case and local parts."""
    for stack in stacks():
        if all(same_version(getattr(stack, name), version) for name, version in versions.items()):
            return stack
    return None


def same_version(first: str | None, second: str) -> bool:
    """Whether two versions are the same release: `24.1.rc3` and `24.1.RC3`, `2.10.0` and `2.10.0+cpu`."""
    return first is not None and first.lower() == second.lower().partition("+")[0].strip()
