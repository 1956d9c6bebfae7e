"""The outcome of a load test in numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from telechat_mindie.loadtest.record import Record


@dataclass(frozen=True, slots=True)
class Spread:
    """A measure over many requests: its mean and percentiles, interpolated between neighbours."""

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """None where there is nothing to measure."""
        if not values:
            return None
        percentiles = np.percentile(values, (50, 90, 95, 99, 100)).tolist()
        return cls(float(np.mean(values)), *percentiles)


@dataclass(frozen=True, slots=True)
class Report:
    """A load test in numbers. Durations are milliseconds where the name ends in `_ms`, seconds otherwise.

    Attributes:
        requests: how many ended.
        failed: of these, how many for which fault.
        seconds: from the first request to the last byte.
        requests_per_second: whole answers a second.
        output_tokens_per_second: of these, tokens a second.
        total_tokens_per_second: the same with their prompts.
        peak_concurrency: most requests that ran at a time.
        prompt_tokens: a request's; None where the service does not tell.
        output_tokens: an answer's.
        ttft_ms: time to first token: from the request to the first text.
        tpot_ms: time per output token: the mean wait of an answer's tokens after the first.
        itl_ms: inter-token latency: each wait between two pieces of text of an answer.
        e2e_ms: from the request to the last byte.
    """

    requests: int
    failed: dict[str, int]
    seconds: float
    requests_per_second: float
    output_tokens_per_second: float
    total_tokens_per_second: float
    peak_concurrency: int
    prompt_tokens: Spread | None
    output_tokens: Spread | None
    ttft_ms: Spread | None
    tpot_ms: Spread | None
    itl_ms: Spread | None
    e2e_ms: Spread | None

    @property
    def succeeded(self) -> int:
        return self.requests - sum(self.failed.values())

    @classmethod
    def of(cls, records: Sequence[Record]) -> Report:
        """Of at least one record. Latencies and rates are those of whole answers; a fault is only counted."""
        whole = [record for record in records if record.error is None]
        seconds = max(record.ended for record in records) - min(record.sent for record in records)
        prompts = [record.prompt_tokens for record in whole if record.prompt_tokens is not None]
        outputs = [record.generated_tokens for record in whole if record.generated_tokens is not None]
        first = [record.time_to_first_token for record in whole]
        per_token = [record.time_per_output_token for record in whole]
        return cls(
            requests=len(records),
            failed=dict(Counter(record.error for record in records if record.error is not None).most_common()),
            seconds=seconds,
            requests_per_second=len(whole) / seconds,
            output_tokens_per_second=sum(outputs) / seconds,
            total_tokens_per_second=(sum(outputs) + sum(prompts)) / seconds,
            peak_concurrency=max(in_flight(records)[1]),
            prompt_tokens=Spread.of(prompts),
            output_tokens=Spread.of(outputs),
            ttft_ms=Spread.of([value * 1000 for value in first if value is not None]),
            tpot_ms=Spread.of([value * 1000 for value in per_token if value is not None]),
            itl_ms=Spread.of([wait * 1000 for record in whole for wait in record.inter_token_latencies]),
            e2e_ms=Spread.of([record.latency * 1000 for record in whole]),
        )

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {"succeeded": self.succeeded, **asdict(self)}

    def rows(self) -> list[tuple[str, ...]]:
        """The measures as a table's rows: name, mean, p50, p90, p95, p99, max."""
        measures = (
            ("TTFT, ms", self.ttft_ms, 1),
            ("TPOT, ms", self.tpot_ms, 2),
            ("ITL, ms", self.itl_ms, 2),
            ("e2e, ms", self.e2e_ms, 1),
            ("prompt tokens", self.prompt_tokens, 0),
            ("output tokens", self.output_tokens, 0),
        )
        return [
            (name, *(f"{value:,.{digits}f}" for value in asdict(spread).values()))
            for name, spread, digits in measures
            if spread is not None
        ]


def in_flight(records: Sequence[Record]) -> tuple[list[float], list[int]]:
    """Times at which a request began or ended, and how many ran from then on."""
    changes = sorted([(record.ended, -1) for record in records] + [(record.sent, 1) for record in records])
    times = [moment for moment, _ in changes]
    return times, np.cumsum([change for _, change in changes]).tolist()
