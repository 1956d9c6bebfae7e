"""Processes of a launch, found in /proc: by descent, by process group, and by a marker in their environment."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")

MARKER = "TELECHAT_MINDIE_LAUNCH"
"""Environment variable that every process of a launch inherits. It names the run, so that a child which left the group
and lost its parent, as the scheduler that mindformers' rank 0 forks does, is still known."""

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # the kernel's include/uapi/linux/prctl.h


@dataclass(frozen=True, slots=True)
class Process:
    """A line of /proc/PID/stat. `start` is in clock ticks since boot; with the pid it names a process for good."""

    pid: int
    parent: int
    group: int
    start: int
    zombie: bool


@dataclass(frozen=True, slots=True)
class Identity:
    """A process that another one can find again, though its pid may be reused."""

    pid: int
    start: int

    @classmethod
    def of(cls, pid: int) -> Identity:
        """The identity of a process; of one that is gone already, an identity that is never alive."""
        process = read_process(pid)
        return cls(pid, -1 if process is None else process.start)

    @property
    def alive(self) -> bool:
        process = read_process(self.pid)
        return process is not None and process.start == self.start and not process.zombie


def read_process(pid: int) -> Process | None:
    """A process, None where there is none."""
    try:
        text = (PROC / str(pid) / "stat").read_text(errors="replace")
    except OSError:
        return None
    # The name stands in parentheses and may hold any character.
    fields = text[text.rindex(")") + 2 :].split()
    return Process(pid, int(fields[1]), int(fields[2]), int(fields[19]), fields[0] in "ZX")


def all_processes() -> dict[int, Process]:
    """Every process by pid."""
    found = (read_process(int(entry.name)) for entry in PROC.iterdir() if entry.name.isdigit())
    return {process.pid: process for process in found if process is not None}


def descendants(ancestor: int) -> set[int]:
    """Children of a process, their children, and so on, zombies included."""
    children: dict[int, list[int]] = {}
    for process in all_processes().values():
        children.setdefault(process.parent, []).append(process.pid)
    found: set[int] = set()
    pending = list(children.get(ancestor, ()))
    while pending:
        pid = pending.pop()
        found.add(pid)
        pending.extend(children.get(pid, ()))
    return found


def marked(marker: str) -> set[int]:
    """Living processes that were started with `MARKER=marker` in their environment, the caller left out."""
    wanted = f"{MARKER}={marker}".encode()
    found = set()
    for entry in PROC.iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):  # gone meanwhile, or another user's
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.add(int(entry.name))
    return found


def members(marker: str, group: int) -> set[int]:
    """Living processes of a launch: those marked, and those of the daemon's process group."""
    in_group = {pid for pid, process in all_processes().items() if process.group == group and not process.zombie}
    return marked(marker) | (in_group if group > 1 else set())


def send(pids: Collection[int], number: signal.Signals) -> None:
    """Signal each process that is still there."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def reap(pids: Collection[int]) -> None:
    """Take the exit status of each that is a dead child of this process."""
    for pid in pids:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


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
