"""What rules find, and the report that `check` and `doctor` make of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

Severity = Literal["error", "warning", "ok"]

EXIT_CODES: dict[Severity, int] = {"ok": 0, "warning": 1, "error": 2}


@dataclass(frozen=True, slots=True)
class Finding:
    """The outcome of one rule.

    Attributes:
        id: a short stable name of the rule, for programs: `file-mode`, `world-size`, ...
        severity: `error` where MindIE would not start or not serve right; `warning` where it may, or only for this
            user; `ok` for what was looked at and is right.
        where: the file, key or part of the machine.
        message: what was found, as a clause without a full stop.
        advice: the next thing to do, as a full sentence; empty where nothing is to be done.
    """

    id: str
    severity: Severity
    where: str
    message: str
    advice: str = ""


def error(id: str, where: object, message: str, advice: str = "") -> Finding:
    return Finding(id, "error", str(where), message, advice)


def warning(id: str, where: object, message: str, advice: str = "") -> Finding:
    return Finding(id, "warning", str(where), message, advice)


def ok(id: str, where: object, message: str) -> Finding:
    return Finding(id, "ok", str(where), message)


def printable(text: str) -> str:
    """A text without control characters and broken UTF-8, which a terminal would obey and a pipe refuse."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in text)


@dataclass(frozen=True)
class Report:
    """Findings, the worst first, and what was repaired before they were made."""

    findings: tuple[Finding, ...]
    repairs: tuple[str, ...] = ()

    @classmethod
    def of(cls, findings: Iterable[Finding], repairs: Iterable[str] = ()) -> Report:
        """A report of findings that quote whatever was found: file names and values become printable here."""
        shown = [
            replace(item, where=printable(item.where), message=printable(item.message), advice=printable(item.advice))
            for item in findings
        ]
        shown.sort(key=lambda finding: -EXIT_CODES[finding.severity])
        return cls(tuple(shown), tuple(map(printable, repairs)))

    @property
    def exit_code(self) -> int:
        """0 clean, 1 warnings, 2 errors."""
        return max((EXIT_CODES[finding.severity] for finding in self.findings), default=0)

    def with_severity(self, severity: Severity) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.severity == severity)

    def as_dict(self) -> dict[str, Any]:
        """For `--json`: of each finding its own five fields, whatever a subclass adds."""
        names = [field.name for field in fields(Finding)]
        return {
            "exit_code": self.exit_code,
            "repairs": list(self.repairs),
            "findings": [{name: getattr(finding, name) for name in names} for finding in self.findings],
        }
