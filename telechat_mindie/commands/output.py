"""How commands talk: progress where a person watches, tables, JSON."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from telechat_mindie.units import format_seconds


@contextlib.contextmanager
def byte_progress(what: str) -> Iterator[Callable[[int], Callable[[int], None]]]:
    """A bar on stderr, shown only on a terminal. Yields `start(total_bytes)`, which gives `advance(bytes)`."""
    if not sys.stderr.isatty():
        yield lambda _total: lambda _count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(what), BarColumn(), DownloadColumn(True), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:

        def start(total: int) -> Callable[[int], None]:
            task = progress.add_task(what, total=total)
            return lambda count: progress.advance(task, count)

        yield start


QUIET_SECONDS = 10.0
"""Between two lines of progress where no person watches."""


@contextlib.contextmanager
def step_progress(what: str, total: int, done: int, before: str) -> Iterator[Callable[[int, str], None]]:
    """Progress in steps, on stderr: a bar on a terminal, elsewhere a line now and then and one for the last step.

    The first step says nothing of the time that the others take, since it compiles.

    Args:
        what: that is under way.
        total: steps in all.
        done: before this begins.
        before: said until the first step is done.

    Yields:
        `advance(step, facts)`: step number `step` is done; `facts` are shown beside it.
    """
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        facts_column = TextColumn("{task.fields[facts]}")
        with Progress(*columns, facts_column, console=Console(stderr=True)) as progress:
            task = progress.add_task(what, total=total, completed=done, facts=before)

            def show(step: int, facts: str) -> None:
                if step == done + 1:
                    progress.reset(task, completed=step, facts=facts)
                progress.update(task, completed=step, facts=facts)

            yield show
        return
    print(f"{what} {done + 1}/{total}  {before}", file=sys.stderr, flush=True)
    first = said = time.monotonic()

    def advance(step: int, facts: str) -> None:
        nonlocal first, said
        now = time.monotonic()
        if step == done + 1:
            first = now
        if step in (done + 1, done + 2, total) or now - said >= QUIET_SECONDS:
            said = now
            per_step = (now - first) / max(1, step - done - 1)
            left = f"  {format_seconds(per_step * (total - step))} left" if done + 1 < step < total else ""
            print(f"{what} {step}/{total}  {facts}{left}", file=sys.stderr, flush=True)

    yield advance


def print_json(data: Any) -> None:
    """One JSON document on stdout."""
    print(json.dumps(data, ensure_ascii=False, indent=2))


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
