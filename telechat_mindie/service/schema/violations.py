"""A violated rule, and the JSON path it is reported at."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from telechat_mindie.findings import Finding, Severity

Location = tuple[str | int, ...]
"""Keys and list indices from the top of the file down to a value."""

SHOWN_CHARACTERS = 80  # of a value that a message quotes


@dataclass(frozen=True, slots=True)
class Violation(Finding):
    """One rule of conf/config.json that does not hold: a finding that says what belongs there and what is there.

    `error`: MindIE would refuse to start or could not serve. `warning`: it starts and then does something other than
    the file seems to say.

    Attributes:
        expected: what would have been right, in words.
        found: what is there, as JSON; `nothing` for a missing key.
    """

    expected: str = ""
    found: str = ""

    @property
    def path(self) -> str:
        """Where, as a JSON path: `$.BackendConfig.ScheduleConfig.maxBatchSize`."""
        return self.where

    @property
    def rule(self) -> str:
        """A short stable name, for programs: `type`, `range`, `compulsory`, `world-size`, ..."""
        return self.id

    @property
    def repair(self) -> str:
        """What to change, as a full sentence."""
        return self.advice

    def as_dict(self) -> dict[str, str]:
        """For `service-config --json`, under the names that it has always had there."""
        names = ("path", "rule", "expected", "found", "repair", "severity")
        return {name: getattr(self, name) for name in names}

    def __str__(self) -> str:
        return f"{self.path}: {self.rule}: {self.message}. {self.repair}"


class Words(str):
    """What was found, told in words: `3 entries`."""


NOTHING = Words("nothing")
MISSING = object()
"""A default of `value_at` that is no value of JSON."""


def error(location: Location, rule: str, expected: str, found: object, repair: str) -> Violation:
    """A violation that keeps MindIE from starting or serving; `found` is a value of the file, or Words."""
    return violation(location, rule, expected, found, repair, "error")


def warning(location: Location, rule: str, expected: str, found: object, repair: str) -> Violation:
    """A violation that MindIE passes over."""
    return violation(location, rule, expected, found, repair, "warning")


def violation(
    location: Location, rule: str, expected: str, found: object, repair: str, severity: Severity
) -> Violation:
    shown = found if isinstance(found, Words) else show(found)
    message = f"expected {expected}, found {shown}"
    return Violation(rule, severity, json_path(location), message, repair, expected, shown)


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


def value_at(data: Any, location: Location, default: Any = None) -> Any:
    """The value at a location, `default` where there is none."""
    try:
        for step in location:
            data = data[step]
    except (LookupError, TypeError):
        return default
    return data


def typed_at(data: Any, location: Location, kind: type = int) -> Any:
    """The value at a location if it is exactly of `kind`, else None: of another one the schema tells."""
    value = value_at(data, location)
    return value if type(value) is kind else None


def show(value: Any) -> str:
    """A value as it would stand in the file, cut to a readable length."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."
