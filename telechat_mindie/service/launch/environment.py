"""The environment of MindIE's daemon, which its workers inherit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import telechat_mindie.backend
from telechat_mindie.mindie import HOME_VARIABLES, MS, is_since, rank_environment
from telechat_mindie.service.launch.processes import MARKER
from telechat_mindie.service.launch.rundir import RunDirectory

SHADOW = Path(telechat_mindie.backend.__file__).parent / "shadow"
"""The folder whose `mindformers` stands in for the real one."""

OLD_STDOUT_VARIABLES = ("MINDIE_LLM_LOG_TO_STDOUT", "MINDIE_LLM_PYTHON_LOG_TO_STDOUT", "MIES_PYTHON_LOG_TO_STDOUT")
"""Replaced by MINDIE_LOG_TO_STDOUT in January 2025, before 2.0: MindIE-LLM v3.0.0.beta.2
docs/zh/user_guide/user_manual/logging_configuration.md."""


def daemon_environment(
    base: Mapping[str, str],
    run: RunDirectory,
    ports: Mapping[str, int],
    *,
    generation: str,
    home: Path | None,
    shadow: bool,
    backend: str = MS,
) -> dict[str, str]:
    """The variables that differ from `base`, in the order in which a person would export them.

    Args:
        base: the caller's environment.
        run: where the rendered conf/config.json lies; its path also marks the processes of this launch.
        ports: by name, those of RANK_PORTS among them.
        generation: of MindIE, a key of `schema.GENERATIONS`.
        home: MindIE's folder with bin/; None where no MindIE is installed.
        shadow: put the stand-in for mindformers first on PYTHONPATH.
        backend: whose workers are started; the rest is for those of ms.
    """
    variables: dict[str, str] = {}
    if home is not None:
        variables |= _home_variables(base, generation, home)
    variables["MIES_CONFIG_JSON_PATH"] = str(run.config)
    if backend == MS:
        variables |= rank_environment(ports)
    if backend == MS and base.get("MINDIE_ASYNC_SCHEDULING_ENABLE") == "1":
        variables["MINDIE_ASYNC_SCHEDULING_ENABLE"] = "0"  # MindSpore workers raise on it
    if backend == MS and shadow:
        variables["PYTHONPATH"] = _prepend([SHADOW], variables.get("PYTHONPATH", base.get("PYTHONPATH", "")))
    variables["MINDIE_LOG_TO_STDOUT"] = "1"
    variables["MINDIE_LOG_LEVEL"] = base.get("MINDIE_LOG_LEVEL", "INFO")
    if generation == "1.0":
        variables |= dict.fromkeys(OLD_STDOUT_VARIABLES, "1")
    variables["PYTHONUNBUFFERED"] = "1"  # the daemon passes its workers' output on line by line
    variables[MARKER] = str(run.path)
    return {name: value for name, value in variables.items() if base.get(name) != value}


def _home_variables(base: Mapping[str, str], generation: str, home: Path) -> dict[str, str]:
    """MindIE's own variables, as its set_env.sh exports them; search paths only where it was not sourced.

    set_env.sh itself is not run: one of them empties /dev/shm, and with it other instances' shared memory.
    """
    service, llm = HOME_VARIABLES
    variable = llm if is_since(generation, "3.0.0.beta") else service
    variables = {variable: str(home)}
    if llm not in base:
        beside = home.parent / "mindie-llm"
        variables.setdefault(llm, str(beside if beside.is_dir() else home))
    if variable not in base:
        libraries = [folder for folder in (home / "lib", home / "lib" / "grpc") if folder.is_dir()]
        if libraries:
            variables["LD_LIBRARY_PATH"] = _prepend(libraries, base.get("LD_LIBRARY_PATH", ""))
        modules = [folder for folder in (home / "bin", home / "lib") if folder.is_dir()]
        if modules:
            variables["PYTHONPATH"] = _prepend(modules, base.get("PYTHONPATH", ""))
    return variables


def _prepend(folders: list[Path], search_path: str) -> str:
    first = [str(folder) for folder in folders]
    return ":".join([*first, *(entry for entry in search_path.split(":") if entry and entry not in first)])
