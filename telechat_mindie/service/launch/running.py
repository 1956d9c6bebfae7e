"""A launch from its start to its end, as the process sees it that asked for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import telechat_mindie
from telechat_mindie.errors import name_some
from telechat_mindie.service import ports
from telechat_mindie.service.launch import client, processes, shared_memory
from telechat_mindie.service.launch.client import Answer, ClientRefusedError, UnansweredError
from telechat_mindie.service.launch.client_tls import client_tls
from telechat_mindie.service.launch.errors import LaunchError
from telechat_mindie.service.launch.log_advice import find_cause, level, success_line
from telechat_mindie.service.launch.log_tail import LogTail
from telechat_mindie.service.launch.rundir import SUPERVISOR_LOG, RunDirectory, State
from telechat_mindie.service.launch.supervisor import GRACE_SECONDS, KILL_SECONDS
from telechat_mindie.service.port_holder import port_holder
from telechat_mindie.staging import FILE_MODE

POLL_SECONDS = 0.05
KEPT_LINES = 5000  # of the log, [INFO] and the like left out, in which the cause of a failure is looked for

END_SECONDS = 2.0  # after a request without an answer, for the end of the daemon to show itself
DYING = "Daemon is killing"
"""What the daemon says before it waits for its workers and ends (MindIE-LLM v3.0.0.beta.2
src/server/daemon/llm_daemon.cpp:162)."""

OnLine = Callable[[str], None]


class Launch:
    """A daemon that this process started.

    Args:
        run: a run directory with its plan and config.
        detached: let the daemon outlive this process.
        on_line: called with each line of the daemon's log.
    """

    def __init__(self, run: RunDirectory, *, detached: bool, on_line: OnLine = lambda _line: None) -> None:
        self.run = run
        self.plan = run.plan()
        self.on_line = on_line
        self._tail = LogTail(run.log)
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._last = ""  # line of the log that is not blank
        command = [sys.executable, "-m", "telechat_mindie.service.launch.supervisor", str(run.path)]
        if not detached:
            launcher = processes.Identity.of(os.getpid())
            command += [str(launcher.pid), str(launcher.start)]
        log = os.open(run.path / SUPERVISOR_LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, FILE_MODE)
        try:
            self._supervisor = subprocess.Popen(
                command,
                cwd=Path(telechat_mindie.__file__).parent.parent,  # so that it is this package that is run
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # a terminal's Ctrl-C and hang-up are for the launcher, which passes them on
            )
        finally:
            os.close(log)

    def wait_until_up(self, timeout: float) -> None:
        """Until the daemon says that it is up.

        Raises:
            LaunchError: it ended, or `timeout` seconds passed; then it is stopped.
        """
        deadline = time.monotonic() + timeout
        while True:
            ended = self._supervisor.poll() is not None
            lines = self._read(final=ended)
            if any(success_line() in line for line in lines):
                return
            if ended:
                raise self._failure("did not start")
            if time.monotonic() > deadline:
                self.stop()
                raise self._failure(f"was not up within {timeout:g} s", "Give it longer with --timeout.")
            time.sleep(POLL_SECONDS)

    def first_request(self, prompt: str, max_tokens: int, timeout: float) -> Answer:
        """Ask the daemon. It goes on, whatever becomes of the request.

        Raises:
            UnansweredError: it gave no answer, or could not be asked.
            LaunchError: the request, or something else meanwhile, ended it.
        """
        try:
            tls = client_tls(self.run)
            return client.ask(self.plan.urls["business"], prompt, max_tokens, timeout, tls)
        except UnansweredError as failure:
            if not isinstance(failure, ClientRefusedError) and self._is_ending():
                raise self._failure("ended at the first request") from None
            raise

    def _is_ending(self) -> bool:
        """Whether the daemon has ended, or says that it is about to."""
        deadline = time.monotonic() + END_SECONDS
        while self._supervisor.poll() is None:
            if any(DYING in line for line in self._read()):
                deadline = time.monotonic() + GRACE_SECONDS
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_SECONDS)
        self._read(final=True)
        return True

    def follow(self) -> None:
        """Read the log until the daemon is stopped from elsewhere.

        Raises:
            LaunchError: it ended by itself.
        """
        while self._supervisor.poll() is None:
            self._read()
            time.sleep(POLL_SECONDS)
        self._read(final=True)
        state = self.run.state()
        if state is None or state.reason != "stopped":
            raise self._failure("has ended")

    def stop(self) -> State | None:
        """End the daemon with everything that belongs to it. An interrupt meanwhile cuts its time to end by itself."""
        self._supervisor.terminate()
        while True:
            try:
                self._supervisor.wait()
                break
            except KeyboardInterrupt:
                self._supervisor.terminate()
        self._read(final=True)
        return self.run.state()

    def _read(self, final: bool = False) -> list[str]:
        lines = self._tail.read(final)
        for line in lines:
            if level(line) != "noise":
                self._lines.append(line)
            if line.strip():
                self._last = line
            self.on_line(line)
        return lines

    def _failure(self, what: str, otherwise: str = "Look at what `telechat-mindie doctor` says.") -> LaunchError:
        """The error, with the cause by the table of known log lines."""
        state = self.run.state()
        if state is None:
            said = (self.run.path / SUPERVISOR_LOG).read_text(errors="replace").strip().rpartition("\n")[2]
            return LaunchError("could not be supervised", where=self.plan.name, found=said)
        if state.reason == "not started":
            return LaunchError(
                "could not be executed", where=self.plan.command[0], found=state.detail, advice="telechat-mindie doctor"
            )
        cause = find_cause(self._lines)
        found = f"the log's last line: {self._last}" if self._last else "an empty log"
        advice = otherwise
        if cause is not None and cause.severity == "error":
            holders = ""
            if cause.id == "port-taken":
                taken = [port for port in self.plan.ports.values() if not ports.is_free(port)]
                holders = "".join(f"; port {port} is held by {port_holder(port)}" for port in taken)
            what = f"{what}: {cause.cause}{holders}"
            found, advice = f"in its log: {cause.line.strip()}", cause.advice
        elif state.returncode is not None and state.reason == "ended":
            what = f"{what}: {_ending(state.returncode)}"
        if cause is not None and cause.severity == "warning":
            found, advice = f"{cause.cause}: {cause.line.strip()}", f"{advice} {cause.advice}"
        return LaunchError(what, where="MindIE's daemon", found=found, advice=f"{advice} The log: {self.run.log}")


def stop_run(run: RunDirectory) -> State | None:
    """End a run from another process than the one that started it, and whatever is left of it.

    Raises:
        LaunchError: it is still being checked; or processes of it do not die, as they hang in the driver, or belong to
            another user.
    """
    state = run.state()
    if state is None and run.is_active():
        raise LaunchError(
            "has not started the daemon yet", where=run.name, advice=f"End process {run.plan().launcher.pid} instead."
        )
    if state is not None and state.supervisor.alive:
        processes.send([state.supervisor.pid], signal.SIGTERM)
        deadline = time.monotonic() + GRACE_SECONDS + KILL_SECONDS
        while state.supervisor.alive and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
    left = run.members()
    state = run.state()
    if left and state is not None:
        seen = left | {state.daemon.pid}
        left = _end_members(run, seen)
        removed = shared_memory.remove_left(state.shared_memory, seen)
        state = replace(state, ended=time.time(), reason="stopped", removed=tuple(removed), survivors=tuple(left))
        run.write_state(state)
    if left or (state is not None and state.supervisor.alive):
        raise LaunchError(
            "could not be ended",
            where=run.name,
            found=f"processes {name_some(left)}" if left else "its supervisor",
            advice="Stop it as the user that started it. A process in state D waits for the driver, until a reset.",
        )
    return state


def _end_members(run: RunDirectory, seen: set[int]) -> set[int]:
    """SIGTERM, and after a while SIGKILL, to what a dead supervisor left. `seen` takes up pids; gives those left."""
    for number, seconds in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, KILL_SECONDS)):
        left = run.members()
        processes.send(left, number)
        deadline = time.monotonic() + seconds
        while left and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
            left = run.members()
            seen |= left
    return left


def _ending(returncode: int) -> str:
    if returncode >= 0:
        return f"it ended with status {returncode}"
    try:
        return f"it was ended by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"it was ended by signal {-returncode}"
