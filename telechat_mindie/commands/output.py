"""How commands talk: progress where a person watches, tables, JSON."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

Fact = tuple[str, str, dict[str, Any]]
"""What a command found out: a label and a text for people, and the values behind it by their names in JSON."""


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


def print_json(data: Any) -> None:
    """One JSON document on stdout."""
    print(json.dumps(data, ensure_ascii=False, indent=2))


def print_facts(title: str, facts: Sequence[Fact], *, as_json: bool) -> None:
    """One JSON object of all values, or a table of labels and texts."""
    if as_json:
        print_json({name: value for _, _, values in facts for name, value in values.items()})
    else:
        print_table(title, [(label, text) for label, text, _ in facts])


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
