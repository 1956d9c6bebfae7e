"""Which versions work together: support.json, with the public source of each row in it.

`doctor --matrix` prints the table, and README.md and README_zh.md hold it as `markdown` writes it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from telechat_mindie.mindie import GENERATIONS, generation_of

LANGUAGES = ("en", "zh")


@dataclass(frozen=True, slots=True)
class MindieRelease:
    """A row of `mindie`: releases of one generation and what they come with."""

    versions: str
    config: str  # their generation, as `--mindie` calls it
    python: str
    cann: str
    mindformers: str | None  # of `stack`
    source: str

    @property
    def ms_backend(self) -> bool:
        """Whether their workers know backendType ms."""
        return GENERATIONS[self.config].ms_backend

    @property
    def stack(self) -> Stack | None:
        """The row of `mindspore` made for the same CANN; None where no ms backend needs one."""
        return stack_with(mindformers=self.mindformers) if self.mindformers else None


@dataclass(frozen=True, slots=True)
class Stack:
    """A row of `mindspore`: versions that the MindSpore project released for each other."""

    mindformers: str
    mindspore: str
    cann: str
    driver: str | None
    telechat_mindie: str  # what it means for this package: begins with "no:" where it cannot run there
    telechat_mindie_zh: str

    @property
    def runs(self) -> bool:
        """Whether this package can run there."""
        return not self.telechat_mindie.startswith("no:")


@dataclass(frozen=True, slots=True)
class Support:
    """A row of the matrix: a MindIE, what it runs on, and what that means for this package."""

    mindie: str
    cann: str
    driver: str
    python: str
    mindspore: str
    mindformers: str
    telechat_mindie: str


HEADINGS = {
    "en": Support("MindIE", "CANN", "driver", "Python", "MindSpore", "mindformers", "telechat-mindie"),
    "zh": Support("MindIE", "CANN", "驱动", "Python", "MindSpore", "mindformers", "telechat-mindie"),
}


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


def matrix(language: str = "en") -> tuple[Support, ...]:
    """Each kind of MindIE with the MindSpore made for its CANN, oldest first; the last column in one of LANGUAGES."""
    column = "telechat_mindie" if language == "en" else f"telechat_mindie_{language}"
    rows = []
    for release in mindie_releases():
        stack = release.stack
        driver, mindspore = (stack.driver or "-", stack.mindspore) if stack else ("-", "-")
        meaning = getattr(stack, column) if stack else _table()["no_ms_backend"][column]
        named = release.mindformers or "-"
        rows.append(Support(release.versions, release.cann, driver, release.python, mindspore, named, meaning))
    return tuple(rows)


def cells(row: Support) -> tuple[str, ...]:
    return tuple(getattr(row, name) for name in Support.__slots__)


def markdown(language: str) -> str:
    """The matrix as README.md ("en") and README_zh.md ("zh") hold it."""

    def line(texts: Sequence[str]) -> str:
        return f"| {' | '.join(texts)} |"

    heading = cells(HEADINGS[language])
    return "\n".join([line(heading), "|---" * len(heading) + "|", *(line(cells(row)) for row in matrix(language))])


def release_of(version: str | None) -> MindieRelease | None:
    """The row of a MindIE version; None for one that no row knows."""
    generation = generation_of(version)
    return next((row for row in mindie_releases() if row.config == generation), None)


def working_releases() -> str:
    """`2.1.RC1, 2.1.RC2 and 2.3.0`, for advice: those on which this package can run."""
    names = [release.versions for release in mindie_releases() if release.stack and release.stack.runs]
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
