"""Where a launch keeps its config, its log and what it knows of itself, so that another command finds it again."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from telechat_mindie.errors import ConfigError, InputError
from telechat_mindie.reading import read_json
from telechat_mindie.service.launch import processes
from telechat_mindie.service.launch.client import OWN_FILES, ClientFiles
from telechat_mindie.service.launch.processes import Identity
from telechat_mindie.staging import DIR_MODE, dump_json, reporting_os_errors, write_file

CONFIG, LOG, PLAN, STATE, SUPERVISOR_LOG = "config.json", "daemon.log", "plan.json", "state.json", "supervisor.log"


@dataclass(frozen=True)
class LaunchPlan:
    """What is to be started. Written once, by `launch`.

    Attributes:
        name: of the run: the model's name and its port.
        model_path: the model directory, absolute.
        generation: of MindIE.
        command: the daemon's command line.
        environment: variables over those of the caller.
        ports: each port of the run by what it is for.
        urls: `business` and `management`, as a client on this host reaches them.
        tls_home: MindIE's home, for the certificates; None without HTTPS.
        client: the files of this host's own clients.
        cards: that the ranks of all instances take, as npu-smi counts them.
        model_name: what requests call the model.
        launcher: the process that starts it.
    """

    name: str
    model_path: str
    generation: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    ports: Mapping[str, int]
    urls: Mapping[str, str]
    tls_home: str | None
    model_name: str
    launcher: Identity
    client: ClientFiles = OWN_FILES
    cards: tuple[int, ...] = ()


@dataclass(frozen=True)
class State:
    """What became of it. Written by the run's supervisor alone: once when the daemon runs, once when all is over.

    Attributes:
        supervisor: the process that keeps the daemon.
        daemon: the daemon, which leads a process group of its own.
        started: seconds since the epoch.
        shared_memory: names in /dev/shm before the start.
        ended: seconds since the epoch; None while it runs.
        reason: `stopped` on request, `ended` by itself, `not started`.
        returncode: of the daemon, negative for a signal; None where it never ran.
        detail: why it could not be started.
        removed: shared memory that was cleaned up.
        survivors: processes that could not be ended.
    """

    supervisor: Identity
    daemon: Identity
    started: float
    shared_memory: tuple[str, ...]
    ended: float | None = None
    reason: str | None = None
    returncode: int | None = None
    detail: str | None = None
    removed: tuple[str, ...] = ()
    survivors: tuple[int, ...] = ()


@dataclass(frozen=True)
class RunDirectory:
    """The folder of one run: config.json, daemon.log, plan.json, state.json."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def config(self) -> Path:
        return self.path / CONFIG

    @property
    def log(self) -> Path:
        return self.path / LOG

    def create(self, plan: LaunchPlan, config_text: str) -> None:
        """Make the folder, in place of an earlier run's; the config is written with the mode that MindIE asks for.

        Raises:
            OutputError: it cannot be written.
        """
        with reporting_os_errors(self.path):
            if (self.path / PLAN).is_file():
                shutil.rmtree(self.path)
            self.path.mkdir(mode=DIR_MODE, parents=True)
        write_file(self.config, config_text.encode())
        write_file(self.path / PLAN, dump_json(asdict(plan)))

    def remove(self) -> None:
        """Forget a run that never came to be."""
        shutil.rmtree(self.path, ignore_errors=True)

    def plan(self) -> LaunchPlan:
        """Raises ConfigError: there is none, or not a whole one."""
        data = read_json(self.path / PLAN)
        with _whole(self.path / PLAN):
            launcher = Identity(**data.pop("launcher"))
            client = ClientFiles(**data.pop("client", {}))  # 0.2.0 wrote neither it nor the cards
            cards = tuple(data.pop("cards", ()))
            command = tuple(data.pop("command"))
            return LaunchPlan(**data, command=command, launcher=launcher, client=client, cards=cards)

    def state(self) -> State | None:
        """None before the daemon was started."""
        path = self.path / STATE
        if not path.is_file():
            return None
        data: dict[str, Any] = read_json(path)
        with _whole(path):
            for key in ("supervisor", "daemon"):
                data[key] = Identity(**data[key])
            for key in ("shared_memory", "removed", "survivors"):
                data[key] = tuple(data[key])
            return State(**data)

    def write_state(self, state: State) -> None:
        write_file(self.path / STATE, dump_json(asdict(state)))

    def members(self) -> set[int]:
        """Living processes of this run, whether or not its supervisor lives."""
        state = self.state()
        group = state.daemon.pid if state is not None and state.daemon.alive else 0
        return processes.members(str(self.path), group)

    def is_active(self) -> bool:
        """Whether it may hold ports: it is starting, it runs, or something is left of it."""
        state = self.state()
        if state is None:
            return self.plan().launcher.alive
        return state.supervisor.alive or bool(self.members())


def state_home(environment: Mapping[str, str]) -> Path:
    """XDG_STATE_HOME/telechat-mindie, by default ~/.local/state/telechat-mindie (XDG Base Directory Specification)."""
    named = environment.get("XDG_STATE_HOME", "")
    base = Path(named) if named.startswith("/") else Path(environment.get("HOME") or Path.home()) / ".local" / "state"
    return base / "telechat-mindie"


def all_runs(home: Path) -> list[RunDirectory]:
    """Every run that is recorded, the oldest first; folders that hold no readable plan are passed over."""
    found = []
    for path in home.iterdir() if home.is_dir() else ():
        with contextlib.suppress(ConfigError, OSError):
            run = RunDirectory(path)
            run.plan()
            run.state()
            found.append((path.stat().st_mtime, run))
    return [run for _, run in sorted(found, key=lambda pair: pair[0])]


def active_runs(home: Path) -> list[RunDirectory]:
    """Those of `all_runs` that may hold ports and cards."""
    return _active(all_runs(home))


def _active(runs: Iterable[RunDirectory]) -> list[RunDirectory]:
    active = []
    for run in runs:
        with contextlib.suppress(ConfigError):  # it vanishes meanwhile
            if run.is_active():
                active.append(run)
    return active


def cards_held(home: Path) -> dict[int, str]:
    """`cards_of` the active runs; none where the folder cannot be read."""
    try:
        return cards_of(active_runs(home))
    except OSError:
        return {}


def cards_of(active: Iterable[RunDirectory]) -> dict[int, str]:
    """Names of active runs by the cards that they hold, counted as `Cards.unmasked` gives them."""
    held = {}
    for run in active:
        with contextlib.suppress(ConfigError):  # it vanishes meanwhile
            held.update(dict.fromkeys(run.plan().cards, run.name))
    return held


def find_run(home: Path, name: str | None, *, or_last: bool = False) -> RunDirectory:
    """The run called `name`; without a name, the only one that is active, or with `or_last` the last one where none is.

    Raises:
        InputError: there is none, or several to choose from.
    """
    runs = all_runs(home)
    active = _active(runs)
    listed = ", ".join(run.name for run in active) or "none"
    if name is not None:
        for run in runs:
            if run.name == name:
                return run
        raise InputError("is not the name of a run", where=name, expected=f"one of those running: {listed}")
    if or_last and runs and not active:
        return runs[-1]
    if len(active) != 1:
        advice = "Name one of them." if active else "Start one with `telechat-mindie launch MODEL_PATH`."
        raise InputError("which run is meant is not clear", where=home, found=f"running: {listed}", advice=advice)
    return active[0]


@contextlib.contextmanager
def locked(home: Path, timeout: float = 30) -> Iterator[None]:
    """One launch at a time chooses its ports and records them.

    Raises:
        InputError: another launch holds the lock for longer than `timeout` seconds.
        OutputError: the folder cannot be written.
    """
    with reporting_os_errors(home):
        home.mkdir(mode=DIR_MODE, parents=True, exist_ok=True)
        descriptor = os.open(home / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + timeout
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise InputError("another launch is choosing its ports", where=home) from None
                time.sleep(0.05)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError):
        raise ConfigError("is not what `launch` writes", where=path) from None
