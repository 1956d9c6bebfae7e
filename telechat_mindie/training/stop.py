"""Ctrl-C and SIGTERM end a run after a step, the same one in every rank."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import FrameType

from telechat_mindie.staging import write_file

SIGNALS = (signal.SIGINT, signal.SIGTERM)

_WISH, _LAST_STEP = "stop", "last-step"


class Listener:
    """Hears the signals, in the process that a person started: a context, in its main thread.

    The first one leaves a wish for the ranks, a second one is as if nobody listened.

    Args:
        folder: that the ranks look into; without a wish of an earlier run.
    """

    def __init__(self, folder: Path) -> None:
        self._wish = folder / _WISH
        self.signal: signal.Signals | None = None

    def __enter__(self) -> Listener:
        self._before = {number: signal.signal(number, self._hear) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, _: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        self._restore()
        self._wish.touch()
        print("\nfinishing the step and saving; once more to end at once", file=sys.stderr, flush=True)


class Stop:
    """Whether a rank shall end now.

    The first rank alone looks for the wish, and leaves the step that all shall end with: the next one. No rank has
    finished that step before the first has begun it, for its gradients are summed over all of them, so each finds the
    number when it has.

    Args:
        folder: the listener's.
        rank, ranks: of this process, and how many there are.
    """

    def __init__(self, folder: Path, rank: int = 0, ranks: int = 1) -> None:
        self._wish = folder / _WISH
        self._last_step = folder / _LAST_STEP
        self._rank = rank
        self._ranks = ranks

    def after(self, step: int) -> bool:
        """Whether `step`, which this rank has just finished, was the last."""
        if self._rank == 0 and self._wish.exists() and not self._last_step.exists():
            write_file(self._last_step, str(step if self._ranks == 1 else step + 1).encode())
        return self._last_step.exists() and int(self._last_step.read_text()) <= step
