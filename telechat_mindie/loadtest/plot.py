"""Load tests as pictures."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from telechat_mindie.errors import InputError
from telechat_mindie.installing import MissingExtraError
from telechat_mindie.loadtest.compare import LATENCIES, PERCENTILES, Comparison
from telechat_mindie.loadtest.record import Record
from telechat_mindie.loadtest.report import Report, in_flight
from telechat_mindie.staging import check_file_target, write_file

try:
    from matplotlib.figure import Figure
except ImportError:
    raise MissingExtraError("matplotlib", "plot") from None

_BLUE, _ORANGE, _GREY = "#2563eb", "#ea580c", "#64748b"
_BINS = 60  # of the time line


def check_target(file: Path) -> None:
    """Refuse before a test what could not be written after it.

    Raises:
        InputError: the file's ending is no format of a picture.
        OutputError: it cannot be written there.
    """
    formats = Figure().canvas.get_supported_filetypes()
    if _format(file) not in formats:
        expected = " or ".join(f".{name}" for name in ("png", "svg", "pdf", *sorted(formats)) if name in formats)
        raise InputError("has no ending of a picture", where=file, expected=expected, found=file.suffix or "none")
    check_file_target(file)


def write_plot(file: Path, records: Sequence[Record], title: str) -> None:
    """Write a picture of four panels: how TTFT, ITL and e2e are distributed, and the load over time.

    Args:
        file: its ending is the format; replaced if it exists.
        records: at least one whole answer among them.

    Raises:
        OutputError: the file cannot be written.
    """
    report = Report.of(records)
    whole = [record for record in records if record.error is None]
    lost = len(records) - len(whole)
    figure = _figure(f"{title}, {lost} failed" if lost else title)
    (first, between), (latency, timeline) = figure.subplots(2, 2)
    ttft = [record.time_to_first_token for record in whole]
    _distribution(first, "Time to first token", "requests", [value * 1000 for value in ttft if value is not None])
    itl = [wait * 1000 for record in whole for wait in record.inter_token_latencies]
    _distribution(between, "Inter-token latency", "waits", itl)
    _distribution(latency, "End to end", "requests", [record.latency * 1000 for record in whole])
    _timeline(timeline, records, whole, report)
    _save(figure, file)


def write_comparison(file: Path, comparison: Comparison) -> None:
    """Write a picture of four panels: percentiles of TTFT, TPOT, ITL and e2e of both tests.

    Raises:
        OutputError: the file cannot be written.
    """
    names = [path.stem for path in comparison.files]
    if names[0] == names[1]:
        names = [str(path) for path in comparison.files]
    rates = [f"{report['output_tokens_per_second']:,.1f}" for report in comparison.reports]
    figure = _figure(f"{names[0]}: {rates[0]}, {names[1]}: {rates[1]} output tokens/s")
    for axes, (label, key) in zip(figure.subplots(2, 2).flat, LATENCIES, strict=True):
        axes.set_title(label, loc="left", fontsize=11)
        axes.set_ylabel("ms")
        axes.grid(alpha=0.25, axis="y")
        places = np.arange(len(PERCENTILES))
        for report, name, color, shift in zip(comparison.reports, names, (_BLUE, _ORANGE), (-0.2, 0.2), strict=True):
            if report[key] is None:  # no answer was long enough to measure it
                continue
            heights = [report[key][percentile] for percentile in PERCENTILES]
            axes.bar_label(axes.bar(places + shift, heights, 0.38, color=color, label=name), fmt="{:,.1f}", fontsize=7)
        axes.set_xticks(places, PERCENTILES)
        if axes.containers:
            axes.legend(fontsize=8)
    _save(figure, file)


def _figure(title: str) -> Figure:
    figure = Figure(figsize=(11, 7), dpi=110, layout="constrained")
    figure.suptitle(title, fontsize=11, color=_GREY)
    return figure


def _format(file: Path) -> str:
    return file.suffix.removeprefix(".").lower()


def _save(figure: Figure, file: Path) -> None:
    image = io.BytesIO()
    figure.savefig(image, format=_format(file))
    write_file(file, image.getvalue())


def _distribution(axes: Any, title: str, what: str, milliseconds: Sequence[float]) -> None:
    """The share of all `what` that took at most x, with p50 and p99 marked; a tail far beyond p99 is cut off."""
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel("ms")
    axes.set_ylabel(f"{what} within, %")
    axes.grid(alpha=0.25)
    if not milliseconds:
        return
    p50, p99, most = np.percentile(milliseconds, (50, 99, 100)).tolist()
    shares = np.linspace(0, 100, len(milliseconds))
    name = f"{len(milliseconds):,} {what}, max {most:,.1f} ms"
    axes.plot(np.sort(milliseconds), shares, color=_BLUE, drawstyle="steps-post", label=name)
    axes.axvline(p50, color=_ORANGE, linestyle="--", linewidth=1.2, label=f"p50 {p50:,.1f} ms")
    axes.axvline(p99, color=_ORANGE, linestyle=":", linewidth=1.2, label=f"p99 {p99:,.1f} ms")
    axes.set_xlim(0, 1.02 * min(most, 3 * p99))
    axes.legend(loc="lower right", fontsize=8)


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
    rate = axes.stairs(tokens / np.diff(edges), edges, fill=True, color=_BLUE, alpha=0.35, label="output tokens/s")
    axes.set_ylim(bottom=0)
    running = axes.twinx()
    times, counts = in_flight(records)
    seconds = [moment - begin for moment in times]
    (count,) = running.step(seconds, counts, where="post", color=_ORANGE, linewidth=1.2, label="requests that run")
    running.set_ylabel("requests that run", color=_ORANGE)
    running.set_ylim(bottom=0)
    axes.set_xlim(0, report.seconds)
    running.legend(handles=[rate, count], loc="lower right", fontsize=8)  # of both axes, above all that is drawn
