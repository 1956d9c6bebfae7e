"""Ctrl-C and SIGTERM end a run after a step, the same one in every rank."""

from __future__ import annotations

import signal
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType

from telechat_mindie.staging import write_file

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Whether the run shall end now; a context, in the main thread.

    The first rank alone listens, and leaves in a file the step that all shall end with: the next one. No rank has
    finished that step before the first has begun it, for its gradients are summed over all of them, so each finds the
    file when it has. A second signal ends the first rank at once.

    Args:
        file: the same for every rank, and not there when the first of them begins.
        rank, ranks: of this process, and how many there are.
    """

    def __init__(self, file: Path, rank: int = 0, ranks: int = 1) -> None:
        self._file = file
        self._rank = rank
        self._ranks = ranks
        self.signal: signal.Signals | None = None

    def __enter__(self) -> Stop:
        self._before = {number: signal.getsignal(number) for number in SIGNALS}
        for number in SIGNALS:
            signal.signal(number, self._heard if self._rank == 0 else signal.SIG_IGN)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def after(self, step: int) -> bool:
        """Whether `step`, which this rank has just finished, was the last."""
        if self._ranks == 1:
            return self.signal is not None
        if self._rank == 0 and self.signal is not None and not self._file.exists():
            write_file(self._file, f"{step + 1}\n".encode())
        with suppress(FileNotFoundError):
            return int(self._file.read_text()) <= step
        return False

    def _heard(self, number: int, _: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        for known, handler in self._before.items():
            signal.signal(known, handler)
        print("\nfinishing the step and saving; once more to end at once", file=sys.stderr, flush=True)
