"""How commands talk: progress, tables, JSON."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from telechat_mindie.commands.messages import logger
from telechat_mindie.units import format_bytes, format_duration

if TYPE_CHECKING:
    from rich.progress import Progress

LINE_SECONDS = 10.0
"""Between two lines of progress where no terminal shows a bar."""

Advance = Callable[[int], None]


@contextlib.contextmanager
def byte_progress(what: str) -> Iterator[Callable[[int], Advance]]:
    """How far a work of bytes is, on stderr. Yields `start(total_bytes)`, which gives `advance(bytes)`."""
    with _progress(what, format_bytes) as start:
        yield start


@contextlib.contextmanager
def count_progress(what: str) -> Iterator[Callable[[int | None], Advance]]:
    """The same for things that are counted; a total of None is not known."""
    with _progress(what, lambda count: f"{count:,.0f}") as start:
        yield start


@contextlib.contextmanager
def _progress(what: str, form: Callable[[float], str]) -> Iterator[Callable[[int | None], Advance]]:
    """A bar on a terminal, elsewhere a line every ten seconds; nothing with -q."""
    if logger.level > logging.INFO:  # unset where a tool works without the commands' options
        yield lambda _total: lambda _count: None
    elif sys.stderr.isatty():
        with _bars(what) as bars:

            def start(total: int | None) -> Advance:
                state = ProgressState(what, form, total)
                task = bars.add_task(what, total=total, said="")

                def advance(count: int) -> None:
                    state.done += count
                    bars.update(task, advance=count, said=state.counted)

                return advance

            yield start
    else:
        with _lines(what, form) as start_lines:
            yield start_lines


@contextlib.contextmanager
def _lines(what: str, form: Callable[[float], str]) -> Iterator[Callable[[int | None], Advance]]:
    states: list[ProgressState] = []
    is_over = threading.Event()

    def tell() -> None:
        while not is_over.wait(LINE_SECONDS):
            if states:
                print(states[-1], file=sys.stderr, flush=True)

    def start(total: int | None) -> Advance:
        state = ProgressState(what, form, total)
        states.append(state)
        return state.advance

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield start
    finally:
        is_over.set()
        teller.join()


@contextlib.contextmanager
def step_progress(what: str, total: int, done: int, before: str) -> Iterator[Callable[[int, str], None]]:
    """The same for steps, each of which has something to say: a line for the first two, for the last, and now and then.

    The first step says nothing of the time that the others take, since it compiles.

    Args:
        what: that is under way.
        total: steps in all.
        done: before this begins.
        before: said until the first step is done.

    Yields:
        `advance(step, facts)`: step number `step` is done; `facts` are shown beside it.
    """
    if logger.level > logging.INFO:
        yield lambda _step, _facts: None
    elif sys.stderr.isatty():
        with _bars(what) as bars:
            task = bars.add_task(what, total=total, completed=done, said=f"{done}/{total}  {before}")

            def show(step: int, facts: str) -> None:
                if step == done + 1:
                    bars.reset(task, completed=step)
                bars.update(task, completed=step, said=f"{step}/{total}  {facts}")

            yield show
    else:
        print(f"{what} {done + 1}/{total}  {before}", file=sys.stderr, flush=True)
        first = said = time.monotonic()

        def advance(step: int, facts: str) -> None:
            nonlocal first, said
            now = time.monotonic()
            if step == done + 1:
                first = now
            if step in (done + 1, done + 2, total) or now - said >= LINE_SECONDS:
                said = now
                per_step = (now - first) / max(1, step - done - 1)
                left = f"  {format_duration(per_step * (total - step))} left" if done + 1 < step < total else ""
                print(f"{what} {step}/{total}  {facts}{left}", file=sys.stderr, flush=True)

        yield advance


def _bars(what: str) -> Progress:
    """For a terminal: the work, a bar, the field `said`, and the time that it took and will take."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn(what), BarColumn(), TextColumn("{task.fields[said]}"), TimeElapsedColumn())
    return Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=Console(stderr=True))


class ProgressState:
    """How far a work is, in words: `building: 3.1 GiB of 14.3 GiB (21%), 105.2 MiB/s, about 2 min left`.

    Args:
        what: the work.
        form: a number of bytes or things in words.
        total: of them; None where it is not known.
    """

    def __init__(self, what: str, form: Callable[[float], str], total: int | None) -> None:
        self.done = 0
        self._what, self._form, self._total = what, form, total
        self._begin = time.monotonic()

    def advance(self, count: int) -> None:
        self.done += count

    @property
    def counted(self) -> str:
        """`3.1 GiB of 14.3 GiB (21%), 105.2 MiB/s`"""
        text = self._form(self.done)
        if self._total:
            text += f" of {self._form(self._total)} ({self.done / self._total:.0%})"
        return f"{text}, {self._form(self._speed)}/s" if self._speed else text

    @property
    def _speed(self) -> float:
        return self.done / max(time.monotonic() - self._begin, 1e-9)

    def __str__(self) -> str:
        text = f"{self._what}: {self.counted}"
        if self._total and self._speed:
            text += f", about {format_duration((self._total - self.done) / self._speed)} left"
        return text


def print_json(data: Any) -> None:
    """One JSON document on stdout; where that is no Unicode, with JSON's own escapes."""
    escaped = not sys.stdout.encoding.lower().startswith("utf")
    print(json.dumps(data, ensure_ascii=escaped, indent=2))


class Facts:
    """What a command found out: rows of label and text for people, and the values behind them by their JSON names."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str]] = []
        self.values: dict[str, Any] = {}

    def add(self, label: str, text: str, **values: Any) -> None:
        self.rows.append((label, text))
        self.values |= values

    def show(self, title: str, *, as_json: bool) -> None:
        """One JSON object of all values, or a table of labels and texts."""
        if as_json:
            print_json(self.values)
        else:
            print_table(title, self.rows)


def print_table(title: str, rows: Sequence[Sequence[str]], header: Sequence[str] = ()) -> None:
    """A table on stdout."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=bool(header))
    for column in header or rows[0]:
        table.add_column(column if header else "")
    for row in rows:
        table.add_row(*row)
    Console(highlight=False).print(table)
