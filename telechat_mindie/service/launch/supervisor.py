"""The process that keeps one daemon: it starts it, and when it or its launcher ends, leaves nothing behind.

Run as `python -m telechat_mindie.service.launch.supervisor RUN_DIRECTORY [LAUNCHER_PID LAUNCHER_START]`. With a
launcher it ends when that process ends, however that happens; without one it stays.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from telechat_mindie.service.launch import processes, shared_memory
from telechat_mindie.service.launch.processes import Identity
from telechat_mindie.service.launch.rundir import RunDirectory, State
from telechat_mindie.staging import FILE_MODE

GRACE_SECONDS = 30
"""For the daemon to end by itself after SIGTERM: it waits five seconds for its endpoint, then ten for its workers
(MindIE-LLM v3.0.0.beta.2 src/server/daemon/llm_daemon.cpp:48, 160-190)."""

KILL_SECONDS = 10  # until a process that does not die of SIGKILL is given up: it hangs in the driver

_STOP = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
_SIGNALS = _STOP | {signal.SIGCHLD}


def supervise(run: RunDirectory, launcher: Identity | None) -> None:
    """Start the daemon of `run`, wait until it ends or this process is told to stop it, and clean up."""
    processes.adopt_orphans()
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # taken by sigtimedwait, never by a handler
    if launcher is not None and not processes.end_with_parent(launcher):
        return
    plan = run.plan()
    state = State(Identity.of(os.getpid()), Identity(0, -1), time.time(), tuple(sorted(shared_memory.names())))
    try:
        daemon = _start(run, plan.command, plan.environment)
    except OSError as failure:
        detail = f"{failure.filename or plan.command[0]}: {failure.strerror}"
        run.write_state(replace(state, ended=time.time(), reason="not started", detail=detail))
        return
    state = replace(state, daemon=Identity.of(daemon.pid))
    run.write_state(state)
    stopped = _wait(daemon)
    seen = {daemon.pid} | processes.descendants(os.getpid())
    if stopped:
        daemon.terminate()
        _wait(daemon, GRACE_SECONDS)
    survivors = _kill_all(daemon, seen)
    removed = shared_memory.remove_left(state.shared_memory, seen)
    run.write_state(
        replace(
            state,
            ended=time.time(),
            reason="stopped" if stopped else "ended",
            returncode=daemon.returncode,
            removed=tuple(removed),
            survivors=tuple(sorted(survivors)),
        )
    )


def _start(run: RunDirectory, command: tuple[str, ...], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start the daemon in a process group of its own, its output appended to the log.

    Not in a session of its own: the daemon calls setpgrp(), which fails for a session's leader, and then gives up
    (llm_daemon.cpp:403).
    """

    def in_child() -> None:
        os.setpgid(0, 0)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())

    log = os.open(run.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, FILE_MODE)
    try:
        return subprocess.Popen(
            command,
            env={**os.environ, **environment},
            cwd=run.path,  # MindSpore and CANN write caches into the current folder
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            preexec_fn=in_child,
        )
    finally:
        os.close(log)


def _wait(daemon: subprocess.Popen[bytes], timeout: float | None = None) -> bool:
    """Until the daemon ends (False), or this process is told to stop or `timeout` seconds pass (True)."""
    deadline = None if timeout is None else time.monotonic() + timeout
    while daemon.poll() is None:
        left = 3600.0 if deadline is None else deadline - time.monotonic()
        if left <= 0:
            return True
        received = signal.sigtimedwait(_SIGNALS, left)
        if received is not None and received.si_signo in _STOP:
            return True
        processes.reap_others(daemon.pid)
    return False


def _kill_all(daemon: subprocess.Popen[bytes], seen: set[int]) -> set[int]:
    """SIGKILL to every descendant until none is left; `seen` takes up their pids. Gives those that would not die."""
    deadline = time.monotonic() + KILL_SECONDS
    while left := processes.descendants(os.getpid()):
        seen |= left
        if time.monotonic() > deadline:
            return left
        processes.send(left, signal.SIGKILL)
        daemon.poll()
        processes.reap_others(daemon.pid)
        time.sleep(0.01)
    daemon.wait()
    return set()


def main() -> None:
    run = RunDirectory(Path(sys.argv[1]))
    launcher = Identity(int(sys.argv[2]), int(sys.argv[3])) if len(sys.argv) > 2 else None
    supervise(run, launcher)


if __name__ == "__main__":
    main()
