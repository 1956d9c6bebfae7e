"""`telechat-mindie logs`."""

from __future__ import annotations

import os
import time

import typer

from telechat_mindie.commands.completion import runs

POLL_SECONDS = 0.2


def logs(
    name: str = typer.Argument(
        None, help="A run; may be left out where only one runs, or none: then it is the last.", autocompletion=runs
    ),
    follow: bool = typer.Option(False, "--follow", "-f", help="Go on until the run ends, or Ctrl-C."),
    lines: int = typer.Option(100, "--lines", "-n", min=0, help="Lines to begin with, counted from the end."),
) -> None:
    """Print the log of a launch: what its daemon and the workers said.

    Examples:
        telechat-mindie logs
        telechat-mindie logs model-1025 --follow
    """
    from telechat_mindie.service.launch.log_tail import LogTail
    from telechat_mindie.service.launch.rundir import find_run, state_home

    run = find_run(state_home(os.environ), name, or_last=True)
    tail = LogTail(run.log)
    tail.skip_to_last(lines)
    while follow and run.is_active():
        _print(tail.read())
        time.sleep(POLL_SECONDS)
    _print(tail.read(final=True))


def _print(lines: list[str]) -> None:
    for line in lines:
        print(line)
    if lines:
        print(end="", flush=True)
