"""The MindIE of this machine: its daemon, and what its workers' Python can import."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from telechat_mindie.installing import install_here
from telechat_mindie.mindie import (
    ATB,
    ATB_VARIABLES,
    DAEMON,
    MS,
    MS_WRAPPER,
    SERVER,
    SOURCE_ATB,
    WRAPPERS,
    find_home,
    generation_of,
    recorded_version,
)
from telechat_mindie.service import DEFAULT_GENERATIONS
from telechat_mindie.service.doctor.support import release_of, working_releases
from telechat_mindie.service.launch.errors import LaunchError

WORKER = "mindie_llm_backend"  # the console script that the daemon starts for each rank

PROBE_SECONDS = 60

NEEDED: dict[str, dict[str, str | None]] = {
    MS: {"telechat_mindie": None, "mindspore": "mindspore"},
    ATB: {"torch": "torch", "torch_npu": "torch-npu"},
}
"""Modules that the workers of a backend load the model with -> the packages that have them; None: this one."""

_PROBE = """
import importlib.metadata, importlib.util, json, os, sys
def folder(name):
    spec = importlib.util.find_spec(name)
    return spec and spec.origin and os.path.dirname(spec.origin)
def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
names = ("mindie_llm", "mindformers", "telechat_mindie", "mindspore", "atb_llm", "torch", "torch_npu")
print(json.dumps({"folders": {name: folder(name) for name in names}, "version": version("mindie_llm")}))
"""


class NotInstalledError(LaunchError):
    """There is no MindIE on this machine."""


@dataclass(frozen=True, slots=True)
class Installation:
    """A MindIE that can serve TeleChat2.

    Attributes:
        home: the folder with bin/, conf/ and security/.
        command: what starts the daemon.
        python: the interpreter of the workers.
        version: as recorded, None where it is not.
        generation: of its conf/config.json, a key of `schema.GENERATIONS`.
        has_mindformers: whether the workers' Python finds mindformers.
    """

    home: Path
    command: tuple[str, ...]
    python: Path
    version: str | None
    generation: str
    has_mindformers: bool


def find_installation(home: Path | None, environment: Mapping[str, str], backend: str = MS) -> Installation:
    """Find MindIE and ask its workers' Python what it can import; nothing of MindIE is run.

    Looked for in `home`, MIES_INSTALL_PATH, MINDIE_LLM_HOME_PATH, the usual places and PATH, in that order. A named
    folder may also be the one above, with mindie-service/ or mindie-llm/ in it.

    Raises:
        NotInstalledError: no daemon, where `home` names none.
        LaunchError: no daemon in `home`, or one that cannot serve TeleChat2 by this backend: no wrapper for it in its
            mindie_llm, or a Python without what the workers need.
    """
    daemon_home, command = _find_daemon(home, environment)
    python = _worker_python(daemon_home, environment)
    answer = _ask(python, daemon_home, environment)
    folders = answer["folders"]
    if folders["mindie_llm"] is None:
        raise LaunchError(
            "finds no mindie_llm, whose workers the daemon starts",
            where=python,
            advice="Source MindIE's set_env.sh, or put the Python it is installed in first on PATH.",
        )
    found = daemon_home or Path(folders["mindie_llm"])  # the wheel is its own home
    version = answer["version"] or recorded_version(found)
    release = release_of(version)
    if backend == ATB:
        _need_atb(python, folders, environment)
    elif not (Path(folders["mindie_llm"]) / MS_WRAPPER).is_dir() or not (release is None or release.ms_backend):
        raise LaunchError(
            f"has no MindSpore backend: its daemon would take backendType ms, and no worker load the model "
            f"(MindIE {version or 'of unknown version'})",
            where=folders["mindie_llm"],
            expected=f"MindIE {working_releases()}",
            found=f"no {MS_WRAPPER}",
            advice="Build a directory for its atb: telechat-mindie build MODEL_PATH --checkpoint DIR --backend atb; or "
            "install one of these, or serve this directory without MindIE: telechat-mindie serve MODEL_PATH.",
        )
    for name, package in NEEDED[backend].items():
        if folders[name] is None:
            raise LaunchError(
                f"finds no {name}, which MindIE's workers load the model with",
                where=python,
                advice=f"{python} -m pip install {package}" if package else install_here(python),
            )
    generation = generation_of(version) or DEFAULT_GENERATIONS[backend]
    return Installation(found, command, python, version, generation, folders["mindformers"] is not None)


def _need_atb(python: Path, folders: Mapping[str, str | None], environment: Mapping[str, str]) -> None:
    """What the workers of atb load the model with, and the variables that its set_env.sh exports."""
    if not (Path(str(folders["mindie_llm"])) / WRAPPERS[ATB]).is_dir():
        raise LaunchError("has no atb backend", where=folders["mindie_llm"], expected=WRAPPERS[ATB])
    absent = [name for name in ATB_VARIABLES if not environment.get(name)]
    if folders["atb_llm"] is None or absent:
        found = ", ".join(["no atb_llm"] * (folders["atb_llm"] is None) + [f"no {name}" for name in absent])
        raise LaunchError(
            "does not find what MindIE's atb needs", where=python, found=found, advice=f"First {SOURCE_ATB}."
        )


def _find_daemon(home: Path | None, environment: Mapping[str, str]) -> tuple[Path | None, tuple[str, ...]]:
    """Its home and command line; no home for the wheel's console script, which lies beside Python."""
    if found := find_home(environment, home):
        return found, (f"{found}/bin/{DAEMON}",)
    if home is not None:
        raise LaunchError(
            f"holds no bin/{DAEMON}", where=home, advice="Name MindIE's folder: the one with bin/ and conf/ in it."
        )
    search_path = environment.get("PATH", "")
    if command := shutil.which(SERVER, path=search_path):
        return None, (command,)
    if command := shutil.which(DAEMON, path=search_path):
        return Path(command).resolve().parent.parent, (command,)
    raise NotInstalledError(
        f"neither {DAEMON} nor {SERVER} was found",
        where="MindIE",
        expected=f"MindIE {working_releases()}",
        advice="Name its folder with --mindie-home, or source its set_env.sh. Without an NPU, `telechat-mindie serve` "
        "answers the same requests.",
    )


def _is_executable(path: Path) -> bool:
    return path.is_file() and os.access(path, os.X_OK)


def _worker_python(home: Path | None, environment: Mapping[str, str]) -> Path:
    """The interpreter in the first line of the worker's script, else the python3 of PATH, which older daemons embed."""
    search_path = environment.get("PATH", "")
    script = shutil.which(WORKER, path=search_path if home is None else f"{search_path}:{home / 'bin'}")
    if script is not None:
        with open(script, "rb") as file:
            first = file.readline(4096).decode(errors="replace").strip()
        interpreter = Path(first[2:].split()[0]) if first.startswith("#!") and first[2:].strip() else None
        if interpreter is not None and interpreter.name != "env" and _is_executable(interpreter):
            return interpreter
    return Path(shutil.which("python3", path=search_path) or sys.executable)


def _ask(python: Path, home: Path | None, environment: Mapping[str, str]) -> dict[str, Any]:
    """What the workers' Python finds, with MindIE's own folders searched as the daemon would have it."""
    own = [] if home is None else [str(home / "bin"), str(home)]
    search_path = ":".join([*own, *filter(None, [environment.get("PYTHONPATH")])])
    try:
        done = subprocess.run(
            [str(python), "-c", _PROBE],
            env={**environment, "PYTHONPATH": search_path},
            cwd="/",  # not the caller's folder, from which Python would import
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=PROBE_SECONDS,
        )
        answer = json.loads(done.stdout.decode(errors="replace").strip().rpartition("\n")[2])
    except (OSError, ValueError, subprocess.TimeoutExpired) as failure:
        raise LaunchError(
            f"cannot tell what MindIE's workers would import: {failure}", where=python, advice="Repair that Python."
        ) from None
    return dict(answer)
