"""Processes of a launch: by descent, by process group, and by a marker in their environment."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

MARKER = "TELECHAT_MINDIE_LAUNCH"
"""Environment variable that every process of a launch inherits. It names the run, so that a child which left the group
and lost its parent, as the scheduler that mindformers' rank 0 forks does, is still known."""

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # the kernel's include/uapi/linux/prctl.h


@dataclass(frozen=True, slots=True)
class Identity:
    """A process that another one can find again, though its pid may be reused.

    `start` is in clock ticks since boot. psutil gives the time of day instead, which moves when the clock is set.
    """

    pid: int
    start: int

    @classmethod
    def of(cls, pid: int) -> Identity:
        """The identity of a process; of one that is gone already, an identity that is never alive."""
        return cls(pid, _state_and_start(pid)[1])

    @property
    def alive(self) -> bool:
        state, start = _state_and_start(self.pid)
        return start == self.start and state not in "ZX"


def _state_and_start(pid: int) -> tuple[str, int]:
    """Fields 3 and 22 of /proc/PID/stat; X, as a dead process has it, and -1 where there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return "X", -1
    fields = text[text.rindex(")") + 2 :].split()  # the name before it may hold any character
    return fields[0], int(fields[19])


def descendants(ancestor: int) -> set[int]:
    """Children of a process, their children, and so on, zombies included."""
    import psutil  # here and below: 25 ms that a command mostly does without

    return {process.pid for process in psutil.Process(ancestor).children(recursive=True)}


def members(marker: str, group: int = 0) -> set[int]:
    """Living processes of a launch: those started with `MARKER=marker` in their environment, the caller left out, and
    those of the daemon's process group, 0 for none."""
    import psutil

    found = set()
    for process in psutil.process_iter(["environ", "status"]):
        environment = process.info["environ"] or {}  # None: another user's, or gone
        with contextlib.suppress(OSError):
            in_group = group > 1 and os.getpgid(process.pid) == group
            marked = environment.get(MARKER) == marker and process.pid != os.getpid()
            if (in_group or marked) and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.add(process.pid)
    return found


def send(pids: Collection[int], number: signal.Signals) -> None:
    """Signal each process that is still there."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def reap_others(child: int) -> None:
    """Take the exit status of the dead children of this process, up to that of `child`, which is wanted elsewhere."""
    with contextlib.suppress(ChildProcessError):  # no children at all
        while (dead := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) and dead.si_pid != child:
            os.waitpid(dead.si_pid, 0)


def adopt_orphans() -> None:
    """Make this process the parent of every descendant that loses its own (PR_SET_CHILD_SUBREAPER)."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def end_with_parent(parent: Identity) -> bool:
    """Ask for SIGTERM when the process that started this one ends; False where it has ended already."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    return parent.alive


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
