"""What the Tab key offers behind an option: the words are read where they are known, and only then."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable

Complete = Callable[[str], list[str]]


def names_in(module: str, constant: str, *more: str) -> Complete:
    """The words of a constant in a module of the package, and `more`."""

    def complete(incomplete: str) -> list[str]:
        found = getattr(importlib.import_module(f"telechat_mindie.{module}"), constant)
        return [word for word in (*more, *found) if word.startswith(incomplete)]

    return complete


def runs(incomplete: str) -> list[str]:
    """Launches that are recorded."""
    from telechat_mindie.service.launch.rundir import all_runs, state_home

    return [run.name for run in all_runs(state_home(os.environ)) if run.name.startswith(incomplete)]
