"""A load test as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from telechat_mindie.errors import OutputError
from telechat_mindie.installing import MissingExtraError
from telechat_mindie.loadtest.record import Record
from telechat_mindie.loadtest.report import Report, in_flight

try:
    from matplotlib.figure import Figure
except ImportError:
    raise MissingExtraError("matplotlib", "plot") from None

_BLUE, _ORANGE, _GREY = "#2563eb", "#ea580c", "#64748b"
_BINS = 60  # of the time line


def write_plot(file: Path, records: Sequence[Record], title: str) -> None:
    """Write a PNG of four panels: how TTFT, ITL and e2e are distributed, and the load over time.

    Args:
        file: the PNG; replaced if it exists.
        records: at least one whole answer among them.

    Raises:
        OutputError: the file cannot be written.
    """
    report = Report.of(records)
    whole = [record for record in records if record.error is None]
    figure = Figure(figsize=(11, 7), dpi=110, layout="constrained")
    figure.suptitle(title, fontsize=11, color=_GREY)
    (first, between), (latency, timeline) = figure.subplots(2, 2)
    ttft = [record.time_to_first_token for record in whole]
    _distribution(first, "Time to first token", [value * 1000 for value in ttft if value is not None])
    itl = [wait * 1000 for record in whole for wait in record.inter_token_latencies]
    _distribution(between, "Inter-token latency", itl)
    _distribution(latency, "End to end", [record.latency * 1000 for record in whole])
    _timeline(timeline, records, whole, report)
    try:
        figure.savefig(file, format="png")
    except OSError as error:
        raise OutputError(f"cannot be written: {error.strerror}", where=file) from None


def _distribution(axes: Any, title: str, milliseconds: Sequence[float]) -> None:
    """The share of all values that is at most x, with p50 and p99 marked; a tail far beyond p99 is cut off."""
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel("ms")
    axes.set_ylabel("share within, %")
    axes.grid(alpha=0.25)
    if not milliseconds:
        return
    p50, p99, most = np.percentile(milliseconds, (50, 99, 100)).tolist()
    axes.set_title(f"p50 {p50:,.1f}, p99 {p99:,.1f}, max {most:,.1f} ms", loc="right", fontsize=9, color=_GREY)
    axes.plot(np.sort(milliseconds), np.linspace(0, 100, len(milliseconds)), color=_BLUE, drawstyle="steps-post")
    axes.axvline(p50, color=_ORANGE, linestyle="--", linewidth=1.2)
    axes.axvline(p99, color=_ORANGE, linestyle=":", linewidth=1.2)
    axes.set_xlim(0, 1.02 * min(most, 3 * p99))


def _timeline(axes: Any, records: Sequence[Record], whole: Sequence[Record], report: Report) -> None:
    """Output tokens a second, and the requests that run, over the test."""
    begin = min(record.sent for record in records)
    axes.set_title(f"Over time: {report.output_tokens_per_second:,.1f} output tokens/s", loc="left", fontsize=11)
    axes.set_xlabel("s")
    axes.set_ylabel("output tokens/s", color=_BLUE)
    axes.grid(alpha=0.25)
    # A piece of text is not always one token, so each stands for its share of the answer's tokens.
    moments = [moment - begin for record in whole for moment in record.texts]
    shares = [(record.generated_tokens or 0) / len(record.texts) for record in whole for _ in record.texts]
    tokens, edges = np.histogram(moments, bins=_BINS, range=(0, report.seconds), weights=shares)
    axes.stairs(tokens / np.diff(edges), edges, fill=True, color=_BLUE, alpha=0.35)
    axes.set_ylim(bottom=0)
    running = axes.twinx()
    times, counts = in_flight(records)
    running.step([moment - begin for moment in times], counts, where="post", color=_ORANGE, linewidth=1.2)
    running.set_ylabel("requests that run", color=_ORANGE)
    running.set_ylim(bottom=0)
    axes.set_xlim(0, report.seconds)
