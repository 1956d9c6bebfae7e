"""Two load tests side by side, from their JSON reports."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from telechat_mindie.errors import ConfigError
from telechat_mindie.reading import read_json

THROUGHPUTS = (
    # label, key of the report
    ("requests/s", "requests_per_second"),
    ("output tokens/s", "output_tokens_per_second"),
    ("tokens/s with prompts", "total_tokens_per_second"),
)
LATENCIES = (("TTFT", "ttft_ms"), ("TPOT", "tpot_ms"), ("ITL", "itl_ms"), ("e2e", "e2e_ms"))
PERCENTILES = ("p50", "p90", "p95", "p99")


@dataclass(frozen=True, slots=True)
class Measure:
    """One number of both tests.

    Attributes:
        name: with its unit.
        before, after: of the first and the second test.
        change: of the first, 0.1 for a tenth more; None where the first is 0.
        better: whether the second is better; None where they are equal.
    """

    name: str
    before: float
    after: float
    change: float | None
    better: bool | None

    @classmethod
    def of(cls, name: str, before: float, after: float, *, more_is_better: bool) -> Measure:
        change = (after - before) / before if before else None
        better = None if before == after else (after > before) == more_is_better
        return cls(name, before, after, change, better)

    def row(self) -> tuple[str, ...]:
        """For a table: name, both numbers, the change and what it means."""
        change = "" if self.change is None else f"{self.change:+.1%}"
        word = {None: "", True: "better", False: "worse"}[self.better]
        return self.name, f"{self.before:,.2f}", f"{self.after:,.2f}", change, word


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two tests.

    Attributes:
        files: the reports, the first one's first.
        reports: their JSON.
        differing: settings in which the tests differ, with both values.
        measures: what both have.
    """

    files: tuple[Path, Path]
    reports: tuple[dict[str, Any], dict[str, Any]]
    differing: dict[str, tuple[Any, Any]]
    measures: list[Measure]

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "before": str(self.files[0]),
            "after": str(self.files[1]),
            "differing_settings": {name: list(values) for name, values in self.differing.items()},
            "measures": [asdict(measure) for measure in self.measures],
        }


def compare(first: Path, second: Path) -> Comparison:
    """Read and compare the reports of `bench serve --json` or `--output`.

    Raises:
        ConfigError: a file that is no such report.
    """
    before, after = _read(first), _read(second)
    names = dict.fromkeys([*before["settings"], *after["settings"]])
    settings = {name: (before["settings"].get(name), after["settings"].get(name)) for name in names}
    differing = {name: values for name, values in settings.items() if values[0] != values[1]}
    return Comparison((first, second), (before, after), differing, list(_measures(before, after)))


def _measures(before: dict[str, Any], after: dict[str, Any]) -> Iterator[Measure]:
    for label, key in THROUGHPUTS:
        yield Measure.of(label, before[key], after[key], more_is_better=True)
    for label, key in LATENCIES:
        if before[key] is not None and after[key] is not None:
            for percentile in ("mean", *PERCENTILES):
                name = f"{label} {percentile}, ms"
                yield Measure.of(name, before[key][percentile], after[key][percentile], more_is_better=False)
    lost = [sum(report["failed"].values()) / report["requests"] * 100 for report in (before, after)]
    yield Measure.of("failed, %", *lost, more_is_better=False)


def _read(path: Path) -> dict[str, Any]:
    report = read_json(path)
    numbers = ("requests", *(key for _, key in THROUGHPUTS))
    is_report = (
        all(isinstance(report.get(key), int | float) for key in numbers)
        and report["requests"] > 0
        and all(isinstance(report.get(key), dict) for key in ("settings", "failed"))
        and all(isinstance(lost, int) for lost in report["failed"].values())
        and all(_is_spread(report.get(key, 0)) for _, key in LATENCIES)
    )
    if not is_report:
        raise ConfigError(
            "is no report of a load test", where=path, advice="`telechat-mindie bench serve --output FILE` writes one."
        )
    return report


def _is_spread(value: object) -> bool:
    if value is None:
        return True  # no answer was long enough to measure it
    names = ("mean", *PERCENTILES)
    return isinstance(value, dict) and all(isinstance(value.get(name), int | float) for name in names)
