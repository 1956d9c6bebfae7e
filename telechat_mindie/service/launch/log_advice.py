"""What MindIE's log lines mean, by the table in log_advice.yaml."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from telechat_mindie.reading import read_yaml

TABLE = Path(__file__).with_name("log_advice.yaml")

_CODE = re.compile(r"MIE[0-9]{2}[EWC][0-9A-F]{6}")
_FATAL = re.compile(r"\[(ERROR|CRITICAL|FATAL)\]|MIE[0-9]{2}[EC][0-9A-F]{6}|^\w*(Error|Exception): ", re.IGNORECASE)
_WARNING = re.compile(r"\[WARN(ING)?\]|MIE[0-9]{2}W[0-9A-F]{6}", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Cause:
    """Why a launch failed.

    Attributes:
        id: of the table's entry, or the error code.
        cause: as a clause.
        advice: the next thing to do, as a sentence.
        line: the line of the log that told it.
    """

    id: str
    cause: str
    advice: str
    line: str


@cache
def table() -> dict[str, Any]:
    """log_advice.yaml as it stands."""
    return read_yaml(TABLE)


@cache
def _patterns() -> tuple[re.Pattern[str], ...]:
    return tuple(re.compile(row["pattern"], re.IGNORECASE) for row in table()["causes"])


@cache
def _noise() -> re.Pattern[str]:
    return re.compile("|".join(table()["noise"]))


def success_line() -> str:
    """What the daemon prints when its endpoint is up and every rank has answered."""
    return str(table()["success"])


def level(line: str) -> str:
    """`error`, `warning`, `noise` or `text` for a line of the log; `noise` is what a person need not read."""
    if _noise().search(line):
        return "noise"
    if _FATAL.search(line):
        return "error"
    if _WARNING.search(line):
        return "warning"
    return "noise" if re.search(r"\[(INFO|DEBUG)\]", line) else "text"


def find_cause(lines: Iterable[str]) -> Cause | None:
    """The cause that stands first in the table; where no entry fits, the first error code; None without either."""
    best: tuple[int, Cause] | None = None
    code: Cause | None = None
    for line in lines:
        for rank, pattern in enumerate(_patterns()[: None if best is None else best[0]]):
            if match := pattern.search(line):
                row = table()["causes"][rank]
                groups = {name: text or "" for name, text in match.groupdict().items()}
                best = rank, Cause(row["id"], row["cause"].format(**groups), row["advice"], line)
                break
        if code is None and (match := _CODE.search(line)) and match[0][5] != "W":
            code = Cause(match[0], f"MindIE says {explain_code(match[0])}", "Look at the lines before it.", line)
    return best[1] if best is not None else code


def explain_code(code: str) -> str:
    """An error code in words: `MIE04E01011C` is `daemon, start: it could not be initialised`; else the code itself."""
    known = table()["codes"].get(code)
    if known is not None:
        return f"{code}, {known}"
    words = table()["server_codes"]
    if code.startswith("MIE04") and len(code) == 12:
        parts = (words["submodules"].get(code[6:8]), words["features"].get(code[8:10]), words["errors"].get(code[10:]))
        if all(parts):
            return "{}, {}, {}: {}".format(code, *parts)
    return code
