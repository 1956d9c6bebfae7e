"""`telechat-mindie stop`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import typer

from telechat_mindie.commands.completion import runs
from telechat_mindie.commands.options import AsJson

if TYPE_CHECKING:
    from telechat_mindie.service.launch.rundir import RunDirectory


def stop(
    name: str = typer.Argument(None, help="The run; may be left out where only one runs.", autocompletion=runs),
    every: bool = typer.Option(False, "--all", help="All that run."),
    as_json: AsJson = False,
) -> None:
    """End a launch with everything that belongs to it: daemon, workers, scheduler, shared memory.

    Examples:
        telechat-mindie stop
        telechat-mindie stop --all
    """
    from telechat_mindie.commands.output import print_json
    from telechat_mindie.errors import InputError
    from telechat_mindie.service.launch.rundir import active_runs, find_run, state_home

    if every and name is not None:
        raise InputError("exclude each other", where=f"--all and {name}")
    home = state_home(os.environ)
    runs = active_runs(home) if every else [find_run(home, name)]
    ended = []
    for run in runs:
        ended.append(_stop(run))
        if not as_json:
            print(f"{run.name}: stopped" if ended[-1]["was_active"] else f"{run.name}: did not run")
    if as_json:
        print_json(ended if every else ended[0])
    elif not runs:
        print("nothing runs")


def _stop(run: RunDirectory) -> dict[str, Any]:
    from telechat_mindie.service.launch.running import stop_run

    was_active = run.is_active()
    state = stop_run(run)
    return {
        "run": run.name,
        "was_active": was_active,
        "returncode": getattr(state, "returncode", None),  # no state where it never started
        "shared_memory_removed": list(getattr(state, "removed", ())),
    }
