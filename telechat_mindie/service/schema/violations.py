"""A violated rule, and the JSON path it is reported at."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

Severity = Literal["error", "warning"]
Location = tuple[str | int, ...]
"""Keys and list indices from the top of the file down to a value."""

SHOWN_CHARACTERS = 80  # of a value that a message quotes


@dataclass(frozen=True, slots=True)
class Violation:
    """One rule of conf/config.json that does not hold.

    Attributes:
        path: where, as a JSON path: `$.BackendConfig.ScheduleConfig.maxBatchSize`.
        rule: a short stable name, for programs: `type`, `range`, `compulsory`, `world-size`, ...
        expected: what would have been right, in words.
        found: what is there, as JSON; `nothing` for a missing key.
        repair: what to change, as a full sentence.
        severity: `error` where MindIE would refuse to start or could not serve; `warning` where it starts and then does
            something other than the file seems to say.
    """

    path: str
    rule: str
    expected: str
    found: str
    repair: str
    severity: Severity = "error"

    def __str__(self) -> str:
        return f"{self.path}: {self.rule}: expected {self.expected}, found {self.found}. {self.repair}"


def json_path(location: Location) -> str:
    """`("ServerConfig", "port")` as `$.ServerConfig.port`; keys that are no identifiers are quoted in brackets."""
    path = "$"
    for step in location:
        if isinstance(step, int):
            path += f"[{step}]"
        elif step.isidentifier():
            path += f".{step}"
        else:
            path += f"[{json.dumps(step, ensure_ascii=False)}]"
    return path


def show(value: Any) -> str:
    """A value as it would stand in the file, cut to a readable length."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."


def error(location: Location, rule: str, *, expected: str, found: str, repair: str) -> Violation:
    """A violation that keeps MindIE from starting or serving."""
    return Violation(json_path(location), rule, expected, found, repair, "error")


def warning(location: Location, rule: str, *, expected: str, found: str, repair: str) -> Violation:
    """A violation that MindIE passes over."""
    return Violation(json_path(location), rule, expected, found, repair, "warning")
