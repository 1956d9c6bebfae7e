"""`telechat-mindie status`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import typer

from telechat_mindie.commands.completion import runs
from telechat_mindie.commands.options import AsJson

if TYPE_CHECKING:
    from telechat_mindie.service.launch.rundir import RunDirectory


def status(
    name: str = typer.Argument(None, help="A run; default: all of them.", autocompletion=runs),
    as_json: AsJson = False,
) -> None:
    """Say which launches run, and what became of the others.

    Exit codes: 1 where one has ended by itself, is not ready or has left something over; else 0.

    Examples:
        telechat-mindie status
        telechat-mindie status model-1025 --json
    """
    from telechat_mindie.commands.output import print_json, print_table
    from telechat_mindie.service.launch.rundir import all_runs, find_run, state_home

    home = state_home(os.environ)
    runs = [find_run(home, name)] if name is not None else all_runs(home)
    rows = [_describe(run) for run in runs]
    if as_json:
        print_json(rows)
    elif not rows:
        print("nothing was launched; `telechat-mindie launch MODEL_PATH` does")
    else:
        rows_of_text = [[row["run"], row["state"], _cards(row["cards"]), row["address"]] for row in rows]
        print_table(str(home), rows_of_text, ("run", "state", "cards", "address"))
        print("`telechat-mindie logs RUN` shows what it says")
    if any(row["state"] not in ("ready", "running", "stopped") for row in rows):
        raise typer.Exit(1)


def _describe(run: RunDirectory) -> dict[str, Any]:
    plan, state = run.plan(), run.state()
    return {
        "run": run.name,
        "state": _state(run),
        "address": plan.urls["business"],
        "cards": list(plan.cards),
        "pid": None if state is None else state.daemon.pid,
        "log": str(run.log),
        "model_path": plan.model_path,
        "ports": dict(plan.ports),
        **{name: getattr(state, name, None) for name in ("started", "ended", "returncode")},  # None before the start
    }


def _cards(cards: list[int]) -> str:
    """`0-3,6`."""
    ranges: list[list[int]] = []
    for card in sorted(cards):
        if ranges and card == ranges[-1][-1] + 1:
            ranges[-1].append(card)
        else:
            ranges.append([card])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in ranges)


def _state(run: RunDirectory) -> str:
    """In words: starting, ready, running, stopped, ended, not started, killed, left over."""
    from telechat_mindie.service.launch.client import ClientRefusedError, is_healthy
    from telechat_mindie.service.launch.client_tls import client_tls

    state = run.state()
    if state is None:
        return "starting" if run.is_active() else "not started"
    if not state.supervisor.alive:
        if run.members():
            return "left over"  # its supervisor was killed; `stop` cleans up
        return state.reason or "killed"
    try:
        healthy = is_healthy(run.plan().urls["management"], tls=client_tls(run, "management"))
    except ClientRefusedError:
        return "running"  # its health cannot be asked for
    return "ready" if healthy else "starting"
