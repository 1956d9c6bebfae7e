"""Probes of what is installed: Python, MindSpore, mindformers, MindIE. Nothing is imported."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator

from telechat_mindie.findings import Finding, error, ok, warning
from telechat_mindie.installing import install_here
from telechat_mindie.mindie import (
    ATB,
    ATB_UNKNOWN,
    ATB_VARIABLES,
    DAEMON,
    DEFAULT_HOME,
    GENERATIONS,
    MS_WRAPPER,
    SERVER,
    SOURCE_ATB,
    WRAPPERS,
    exported_homes,
    find_home,
    generation_of,
    recorded_version,
)
from telechat_mindie.service.doctor.machine import Machine
from telechat_mindie.service.doctor.support import release_of, same_version, stack_with, stacks, working_releases

OLDEST_MINDSPORE, NEWEST_MINDSPORE = (2, 6), (2, 11)  # as setup.cfg: from its release candidates on, and before
OLDEST_TESTED = (2, 7)
DAEMONS = (DAEMON, SERVER)

AS_ATB = (
    "Or build for its atb: telechat-mindie build MODEL_PATH --checkpoint DIR --backend atb; what that needs: "
    "telechat-mindie doctor --mindie 3.0"
)

NEEDED = ("numpy", "sentencepiece", "safetensors", "ml_dtypes", "yaml", "jinja2", "pydantic", "typer", "rich", "psutil")


def check_python(machine: Machine) -> Iterator[Finding]:
    """The interpreter, and the libraries of this package."""
    version = ".".join(map(str, sys.version_info[:3]))
    missing = [name for name in NEEDED if machine.package(name) is None]
    if missing:
        yield error("python", sys.executable, f"Python {version} lacks {', '.join(missing)}", install_here())
    else:
        yield ok("python", sys.executable, f"Python {version}")


def check_mindspore(machine: Machine) -> Iterator[Finding]:
    """MindSpore in the supported range: it runs the model, on either device."""
    found = machine.package("mindspore")
    wanted = f"mindspore>={'.'.join(map(str, OLDEST_MINDSPORE))},<{'.'.join(map(str, NEWEST_MINDSPORE))}"
    if found is None:
        yield error(
            "mindspore",
            "mindspore",
            "is not installed: a model can be built and its service config rendered, but not run",
            f"pip install '{wanted}'",
        )
        return
    version = found.version
    release = tuple(map(int, re.findall(r"\d+", version)[:2]))
    if not version:
        yield warning("mindspore", found.folder, "has no recorded version", f"Make sure that it is {wanted}.")
    elif not OLDEST_MINDSPORE <= release < NEWEST_MINDSPORE:
        yield error("mindspore", found.folder, f"is {version}, outside {wanted}", f"pip install '{wanted}'")
    elif release < OLDEST_TESTED:
        untested = f"is {version}, with which this package is untested on an NPU and on MindIE"
        yield warning("mindspore", found.folder, untested, "What goes together: telechat-mindie doctor --matrix")
    else:
        yield ok("mindspore", found.folder, version)


def check_mindformers(machine: Machine) -> Iterator[Finding]:
    """mindformers, which MindIE's workers import; without it this package stands in. With it, MindSpore must fit."""
    found = machine.package("mindformers")
    if found is None:
        yield ok("mindformers", "mindformers", "is not installed; launch puts this package in its place")
        return
    version = found.version
    row = stack_with(mindformers=version) if version else None
    mindspore = machine.package("mindspore")
    if row is None:
        known = ", ".join(stack.mindformers for stack in stacks())
        yield warning(
            "mindformers", found.folder, f"is {version or 'of unknown version'}", f"Releases that are known: {known}."
        )
    elif not row.runs:
        yield error(
            "mindformers",
            found.folder,
            f"is {version}, which does not go with this package ({row.telechat_mindie})",
            "Install mindformers 1.6.0 or later, or none.",
        )
    elif mindspore is not None and mindspore.version and not same_version(row.mindspore, mindspore.version):
        yield warning(
            "mindformers",
            found.folder,
            f"{version} was released for MindSpore {row.mindspore}, and {mindspore.version} is installed",
            f"pip install mindspore=={row.mindspore}, or uninstall mindformers: this package does without it.",
        )
    else:
        yield ok("mindformers", found.folder, version)


def mindie_version(machine: Machine) -> str | None:
    """The installed MindIE's version: of the package mindie_llm, or of the version.info in its home."""
    found = machine.package("mindie_llm")
    if found is not None and found.version:
        return found.version
    home = find_home(machine.environment, root=machine.root)
    without_daemon = (machine.path(str(folder)) for folder in (*exported_homes(machine.environment), DEFAULT_HOME))
    return next(filter(None, map(recorded_version, [home] if home else without_daemon)), None)


def find_daemon(machine: Machine) -> str | None:
    """The path of MindIE's daemon, as `launch` finds it: in the bin folder of its home, or on PATH."""
    if home := find_home(machine.environment, root=machine.root):
        return str(home / "bin" / DAEMON)
    return machine.which(SERVER) or machine.which(DAEMON)


def check_mindie(machine: Machine) -> Iterator[Finding]:
    """mindie_llm with its MindSpore wrapper, and the daemon."""
    found, daemon, version = machine.package("mindie_llm"), find_daemon(machine), mindie_version(machine)
    if found is None and daemon is None:
        yield warning(
            "mindie",
            "MindIE",
            "is not installed (no mindie_llm, no daemon): nothing can be launched here",
            f"MindIE {working_releases()} serve TeleChat2 through MindSpore.",
        )
        return
    where = found.folder if found else daemon
    release = release_of(version)
    advice = f"Install MindIE {working_releases()}."
    if found is not None and not (found.folder / MS_WRAPPER).is_dir():
        yield error(
            "ms-wrapper",
            found.folder,
            f"MindIE {version or 'of unknown version'} has no {MS_WRAPPER}: its daemon would take backendType ms, and "
            "no worker load the model",
            f"{advice} {AS_ATB}",
        )
    elif release is not None and not release.ms_backend:
        message = f"MindIE {version} has no MindSpore backend ({release.source})"
        yield error("ms-wrapper", where, message, f"{advice} {AS_ATB}")
    elif release is not None:
        yield ok("mindie", where, f"{version}: its conf/config.json is of the generation {generation_of(version)}")
    else:
        yield warning("mindie", where, f"is of a version that is not known ({version or 'none recorded'})", advice)
    yield _daemon(daemon)


def check_atb(machine: Machine) -> Iterator[Finding]:
    """mindie_llm with its atb wrapper, and what its workers load TeleChat2 with: atb_llm, torch_npu, two set_env.sh."""
    found, version = machine.package("mindie_llm"), mindie_version(machine)
    generation = generation_of(version)
    where = found.folder if found else "MindIE"
    if found is None or not (found.folder / WRAPPERS[ATB]).is_dir():
        what = f"has no {WRAPPERS[ATB]}" if found else "is not installed: there is no mindie_llm"
        yield error("mindie", where, what, "Install MindIE 3.0.0, and source its set_env.sh.")
    elif generation is not None and not GENERATIONS[generation].is_public:
        yield warning(
            "mindie", where, f"MindIE {version} {ATB_UNKNOWN}", "Take MindIE 3.0.0, or serve with backendType ms."
        )
    else:
        yield ok("mindie", where, f"{version or 'of unknown version'}, with backendType atb")
    for name, remedy in (
        ("atb_llm", f"First {SOURCE_ATB}."),
        ("torch", "Install the torch that MindIE's release notes name."),
        ("torch_npu", "Install the torch_npu made for that torch."),
    ):
        package = machine.package(name)
        if package is None:
            yield error("atb", name, "is not found, and atb's workers import it", remedy)
        else:
            yield ok("atb", package.folder, package.version or f"{name}, of unknown version")
    for name in ATB_VARIABLES:
        if machine.environment.get(name):
            yield ok("atb-environment", name, str(machine.environment[name]))
        else:
            yield error(
                "atb-environment", name, "is not set, and atb_llm finds its libraries by it", f"First {SOURCE_ATB}."
            )
    yield _daemon(find_daemon(machine))


def _daemon(daemon: str | None) -> Finding:
    if daemon is None:
        return error(
            "daemon",
            "PATH",
            f"neither {' nor '.join(DAEMONS)} is on PATH or in MindIE's home",
            "source MindIE's set_env.sh first: /usr/local/Ascend/mindie/set_env.sh in the public images.",
        )
    return ok("daemon", daemon, "is the daemon that launch would start")
