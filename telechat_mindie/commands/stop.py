"""`telechat-mindie stop`."""

from __future__ import annotations

import os

import typer

from telechat_mindie.commands.options import AsJson


def stop(
    name: str = typer.Argument(None, help="The run; may be left out where only one runs."),
    as_json: AsJson = False,
) -> None:
    """End a launch with everything that belongs to it: daemon, workers, scheduler, shared memory."""
    from telechat_mindie.commands.output import print_json
    from telechat_mindie.service.launch.rundir import find_run, state_home
    from telechat_mindie.service.launch.running import stop_run

    run = find_run(state_home(os.environ), name)
    was_active = run.is_active()
    state = stop_run(run)
    if as_json:
        print_json(
            {
                "run": run.name,
                "was_active": was_active,
                "returncode": getattr(state, "returncode", None),  # no state where it never started
                "shared_memory_removed": list(getattr(state, "removed", ())),
            }
        )
    else:
        print(f"{run.name}: stopped" if was_active else f"{run.name}: did not run")
