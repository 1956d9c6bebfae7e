"""What the program says on stderr beside its results: how much of it, and in which form.

The package's modules log: `info` is what a user wants to know while it happens, `debug` what is asked for with -v.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import sys
from collections.abc import Iterator

import typer

logger = logging.getLogger("telechat_mindie")

PANEL = "Messages"


class Level(str, enum.Enum):
    """How much is said."""

    debug = "debug"
    info = "info"
    warning = "warning"
    error = "error"


LEVELS = {level: getattr(logging, level.name.upper()) for level in Level}


def options(
    verbose: int = typer.Option(
        0, "-v", "--verbose", count=True, show_default=False, help="Say more on stderr.", rich_help_panel=PANEL
    ),
    quiet: int = typer.Option(
        0,
        "-q",
        "--quiet",
        count=True,
        show_default=False,
        help="Say less: warnings and errors; -qq: errors.",
        rich_help_panel=PANEL,
    ),
    log_level: Level = typer.Option(None, "--log-level", help="The same in a word.", rich_help_panel=PANEL),
) -> None:
    """Carry out the options that every command has. What is not given is as it was."""
    if log_level is not None:
        logger.setLevel(LEVELS[log_level])
    elif verbose or quiet:
        logger.setLevel(max(logging.DEBUG, min(logging.ERROR, logging.INFO + 10 * (quiet - verbose))))


class _Stderr(logging.StreamHandler):
    """Writes to what `sys.stderr` is at that moment: a progress bar puts itself in its place."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> object:  # type: ignore[override]
        return sys.stderr


class _Line(logging.Formatter):
    """`warning: ...`, behind the time where there is one; what is for information alone has no word before it."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        if record.levelno != logging.INFO:
            record.message = f"{record.levelname.lower()}: {record.message}"
        return super().formatMessage(record)


@contextlib.contextmanager
def on_stderr() -> Iterator[None]:
    """Send the package's log to stderr, from `info` on; behind the block it is as it was before."""
    handler, level = _Stderr(), logger.level
    handler.setFormatter(_Line())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def add_time() -> None:
    """Begin each line with the time, for a process that runs for long."""
    for handler in logger.handlers:
        handler.setFormatter(_Line("%(asctime)s %(message)s"))
