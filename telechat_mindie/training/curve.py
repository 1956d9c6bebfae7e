"""The course of a run: a line of loss.csv a step, and loss.png of them."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from telechat_mindie.errors import OutputError
from telechat_mindie.staging import reporting_os_errors, write_file

CSV, PICTURE = "loss.csv", "loss.png"

_BLUE, _ORANGE, _GREY = "#2563eb", "#ea580c", "#64748b"


@dataclass(frozen=True)
class Point:
    """A step that is done.

    Attributes:
        loss: mean cross entropy of the trained tokens, before the step's update.
        eval_loss: of the held-out rows after it; None where they were not looked at.
        grad_norm: before clipping.
        tokens: that were trained.
        seconds: that the step took.
    """

    step: int
    loss: float
    eval_loss: float | None
    learning_rate: float
    grad_norm: float
    tokens: int
    seconds: float


COLUMNS = tuple(field.name for field in fields(Point))


class Curve:
    """loss.csv under way, a line as soon as there is one.

    Args:
        folder: of the run.
        after: step that the run goes on from; lines of later steps, which it will repeat, are taken away.

    Raises:
        OutputError: the file cannot be written, or is not one of ours.
    """

    def __init__(self, folder: Path, after: int = 0) -> None:
        self._path = folder / CSV
        self.points = [point for point in read_points(self._path) if point.step <= after] if after else []
        lines = [",".join(COLUMNS), *map(_line, self.points)]
        write_file(self._path, "".join(f"{line}\n" for line in lines).encode())

    def add(self, point: Point) -> None:
        self.points.append(point)
        with reporting_os_errors(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(f"{_line(point)}\n")


def read_points(path: Path) -> list[Point]:
    """The lines of a loss.csv, without a last one that a kill cut short; none where there is no file."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    head, *rows = csv.reader(text[: text.rfind("\n") + 1].splitlines() or [""])
    try:
        if tuple(head) == COLUMNS:
            return [_point(*row) for row in rows]
    except (TypeError, ValueError):
        pass
    raise OutputError("is not the course of a run", where=path, advice="Move it away.")


def _point(step: str, loss: str, eval_loss: str, rate: str, norm: str, tokens: str, seconds: str) -> Point:
    held_out = float(eval_loss) if eval_loss else None
    return Point(int(step), float(loss), held_out, float(rate), float(norm), int(tokens), float(seconds))


def _line(point: Point) -> str:
    """Numbers as Python writes them, so that reading them gives the same ones."""
    return ",".join("" if value is None else repr(value) for value in asdict(point).values())


def draw(folder: Path, points: Sequence[Point], title: str) -> bool:
    """Write loss.png: loss and held-out loss, learning rate, gradient norm. False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    steps = [point.step for point in points]
    figure = Figure(figsize=(11, 6), dpi=110, layout="constrained")
    figure.suptitle(title, fontsize=11, color=_GREY)
    axes = figure.subplot_mosaic([["loss", "loss"], ["rate", "norm"]], height_ratios=[2, 1])
    _panel(axes["loss"], "Loss", steps, [point.loss for point in points])
    if held_out := [(point.step, point.eval_loss) for point in points if point.eval_loss is not None]:
        axes["loss"].plot(*zip(*held_out, strict=True), color=_ORANGE, marker="o", markersize=3, label="held out")
        axes["loss"].legend(frameon=False)
    _panel(axes["rate"], "Learning rate", steps, [point.learning_rate for point in points])
    _panel(axes["norm"], "Gradient norm", steps, [point.grad_norm for point in points])
    try:
        figure.savefig(folder / PICTURE, format="png")
    except OSError as error:
        raise OutputError(f"cannot be written: {error.strerror}", where=folder / PICTURE) from None
    return True


def _panel(axes: Any, title: str, steps: Sequence[int], values: Sequence[float]) -> None:
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel("step")
    axes.grid(alpha=0.25)
    axes.plot(steps, values, color=_BLUE, linewidth=1.2, label="trained")
