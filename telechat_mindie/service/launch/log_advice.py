"""What MindIE's log lines mean, by the table in log_advice.yaml."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from telechat_mindie.reading import read_yaml

TABLE = Path(__file__).with_name("log_advice.yaml")

KINDS = ("particular", "code", "consequence")
"""Of the table's rows, in the order of what they say: why, who reports it, that something went wrong before."""

MAX_LINE = 4096  # characters of a line that are looked at
SHOWN_ERRORS = 3  # lines, where none of them is known

Level = Literal["error", "warning", "noise", "text"]

_WORDS = {"error": "ERROR|CRITICAL|FATAL", "warning": "WARN|WARNING", "noise": "INFO|DEBUG|EVENT|TRACE"}
_ANY = "|".join(_WORDS.values())
_TAG = re.compile(rf"\[({_ANY})\]|\| *({_ANY}) *\||^(?:\([^)]{{1,60}}\) )?({_ANY})[ :]", re.IGNORECASE)
"""The level in a line: `[ERROR]` of MindIE, MindSpore and CANN, `| ERROR |` of loguru, `ERROR 07-17` and `ERROR:` of
Python's logging."""
_LEVELS: dict[str, Level] = {word: level for level, words in _WORDS.items() for word in words.split("|")}  # type: ignore[misc]

_MIE_ERROR, _MIE_WARNING = re.compile(r"MIE[0-9]{2}[EC][0-9A-F]{6}"), re.compile(r"MIE[0-9]{2}W[0-9A-F]{6}")
_EXCEPTION = re.compile(r"^[\w.]{0,200}(Error|Exception)(: |$)")


@dataclass(frozen=True, slots=True)
class Cause:
    """Why a launch failed.

    Attributes:
        id: of the table's row, or the error code; `unknown` where only the last errors can be shown.
        cause: as a clause.
        advice: the next thing to do, as a sentence.
        line: the line of the log that told it; where it does not say why, after the errors before it, ` / ` between.
        severity: of that line. A warning alone seldom stops MindIE.
    """

    id: str
    cause: str
    advice: str
    line: str
    severity: Literal["error", "warning"] = "error"


class _Row(NamedTuple):
    """A row of the table."""

    id: str
    rank: int  # of its kind
    pattern: re.Pattern[str]
    cause: str
    advice: str


@cache
def table() -> dict[str, Any]:
    """log_advice.yaml as it stands."""
    return read_yaml(TABLE)


@cache
def _rows() -> tuple[_Row, ...]:
    return tuple(
        _Row(
            row["id"],
            KINDS.index(row.get("kind", KINDS[0])),
            re.compile(row["pattern"]),
            row["cause"],
            row["advice"],
        )
        for row in table()["causes"]
    )


@cache
def _noise() -> re.Pattern[str]:
    return re.compile("|".join(table()["noise"]))


def success_line() -> str:
    """What the daemon prints when its endpoint is up and every rank has answered."""
    return str(table()["success"])


def level(line: str) -> Level:
    """`error`, `warning`, `noise` or `text` for a line of the log; `noise` is what a person need not read.

    The first level that a line names is its own: what an [INFO] line quotes is no error. Without one, MindIE's codes
    and the last line of a Python traceback tell.
    """
    line = line[:MAX_LINE]
    if _noise().search(line):
        return "noise"
    if tag := _TAG.search(line):
        return _LEVELS[next(filter(None, tag.groups())).upper()]
    if _MIE_ERROR.search(line) or _EXCEPTION.search(line):
        return "error"
    return "warning" if _MIE_WARNING.search(line) else "text"


def find_cause(lines: Iterable[str]) -> Cause | None:
    """The cause that a log names, by the order that log_advice.yaml explains; where no row fits, its last errors.

    Args:
        lines: of the log, of any number and length; only a few are kept.

    Returns:
        None where there is no row for any line, and no error.
    """
    best: Cause | None = None
    best_rank = 2 * len(KINDS)  # errors count from 0 on, warnings after them
    errors: deque[str] = deque(maxlen=SHOWN_ERRORS)
    for line in lines:
        line_level = level(line)
        if line_level == "noise":
            continue
        if line_level == "error":
            errors.append(line)
        found = next(((row, match) for row in _rows() if (match := row.pattern.search(line[:MAX_LINE]))), None)
        if found is None:
            continue
        rank = found[0].rank + (len(KINDS) if line_level == "warning" else 0)
        if rank < best_rank:
            best, best_rank = _cause(*found, line, errors, is_warning=line_level == "warning"), rank
        if best_rank == 0:
            return best
    if errors and (best is None or best.severity == "warning"):
        what = "nothing in its log is a known cause, and its last errors are shown"
        advice = "Look at the lines before them, and at what `telechat-mindie doctor` says."
        return Cause("unknown", what, advice, " / ".join(errors))
    return best


def _cause(row: _Row, match: re.Match[str], line: str, errors: Iterable[str], *, is_warning: bool) -> Cause:
    groups = {name: text or "" for name, text in match.groupdict().items()}
    id = groups.get("code", row.id)
    if "code" in groups:
        groups["code"] = explain_code(groups["code"].upper())
    cause = " ".join(row.cause.format(**groups).split())
    if is_warning:
        return Cause(id, f"its log holds no error, but a warning: {cause}", row.advice, line, "warning")
    before = [error for error in errors if error != line] if KINDS[row.rank] == "consequence" else []
    return Cause(id, cause, row.advice, " / ".join([*before, line]))


def explain_code(code: str) -> str:
    """An error code of MindIE or CANN in words: `MIE04E01011C, daemon, start: it could not be initialised`, `EI0005, of
    HCCL, the ranks' arguments differ`; else the code itself."""
    known = table()["codes"].get(code) or table()["cann_codes"].get(code)
    module = table()["cann_modules"].get(code[1]) if len(code) == 6 else None
    if known is not None or module is not None:
        return ", ".join(filter(None, (code, module and f"of {module}", known)))
    words = table()["server_codes"]
    if code.startswith("MIE04") and len(code) == 12:
        parts = (words["submodules"].get(code[6:8]), words["features"].get(code[8:10]), words["errors"].get(code[10:]))
        if all(parts):
            return "{}, {}, {}: {}".format(code, *parts)
    return code
