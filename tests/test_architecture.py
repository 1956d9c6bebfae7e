"""The direction of imports: what stands on what (docs/architecture.md), and what costs nothing until it is needed."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from helpers import ROOT

PACKAGE = "telechat_mindie"

FLOORS = (
    {"errors"},
    {"mindie", "soc", "units", "dtypes", "reading", "staging", "findings", "templates", "foreign", "installing"},
    {"config_json"},
    {"config"},
    {"computation", "variants", "kv_budget", "text"},
    {"tokenizer", "checkpoint", "data", "nano"},
    {"model_dir"},
    {"model"},
    {"backend"},
    {"engine", "training"},
    {"client"},
    {"service", "loadtest"},
    {"server"},
    {"commands"},
    {"cli"},
    {"__main__"},
)
"""From the ground up: a room imports from its own files and from the floors below."""


FRAMEWORK_ROOMS = ("model", "backend", "training")


@cache
def modules() -> dict[str, Path]:
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        if not (path.parent / "__init__.py").exists():
            continue  # a file that is shipped as it is
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports() -> dict[str, set[str]]:
    """Module -> the package's modules that it names, at its top, in functions and for types alike."""
    graph: dict[str, set[str]] = {}
    for module, path in modules().items():
        named = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                assert node.level == 0, f"{module} has a relative import"
                named |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        ours = named & modules().keys()
        # A package that is named only on the way to one of its modules adds no arrow.
        graph[module] = {name for name in ours if not any(other.startswith(f"{name}.") for other in ours)} - {module}
    return graph


def room(module: str) -> str:
    return module.split(".")[1]


def test_no_circle_of_modules():
    # The package itself hands out names of upper floors, on first use; nothing imports them from there.
    graph = {module: named for module, named in imports().items() if module != PACKAGE}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_every_room_has_a_floor():
    assert {room(module) for module in modules() if module != PACKAGE} == set().union(*FLOORS)


def test_every_room_is_in_the_drawing():
    _, drawing, _ = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("```", 2)
    assert set().union(*FLOORS) <= set(re.findall(r"\w+", drawing))


def test_nothing_points_up():
    floor_of = {name: floor for floor, names in enumerate(FLOORS) for name in names}
    wrong = [
        f"{module} -> {named}"
        for module, targets in imports().items()
        if module != PACKAGE
        for named in targets
        if room(module) != room(named) and floor_of[room(named)] >= floor_of[room(module)]
    ]
    assert not wrong


def test_the_framework_stays_behind_the_model():
    """MindSpore takes seconds to import: at the top of a file it may stand in few rooms."""
    wrong = []
    for module, path in modules().items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] == "mindspore" for name in names) and room(module) not in FRAMEWORK_ROOMS:
                wrong.append(module)
    assert not wrong


COMMANDS = {
    "nano": ("nano", "{tmp}/ckpt"),
    "plan": ("plan", "--variant", "7b", "--no-probe"),
    "plan for atb": ("plan", "--variant", "7b", "--backend", "atb"),
    "build": ("build", "{tmp}/model", "--checkpoint", "{tmp}/ckpt"),
    "convert": ("convert", "{tmp}/model", "{tmp}/hf", "--to", "hf"),
    "info": ("info", "{tmp}/model"),
    "verify": ("verify", "{tmp}/model"),
    "check": ("check", "{tmp}/model"),
    "service-config": ("service-config", "{tmp}/model", "--explain"),
    "manifests": ("manifests", "{tmp}/model", "--kind", "k8s", "--insecure-http", "-o", "{tmp}/k8s"),
    "launch": ("launch", "{tmp}/model", "--dry-run", "--insecure-http"),
    "status": ("status",),
    "doctor": ("doctor",),
}


def test_commands_that_compute_nothing_import_no_framework(tmp_path):
    """Each command in a fresh interpreter, in the order in which they need each other's output."""
    code = (
        "import sys\n"
        "from telechat_mindie.__main__ import main\n"
        "code = 0\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as leave:\n"
        "    code = leave.code or 0\n"
        "print('exit', code, 'imported', sorted({'mindspore', 'torch', 'transformers'} & set(sys.modules)))\n"
    )
    for name, arguments in COMMANDS.items():
        command = [sys.executable, "-c", code, *(argument.format(tmp=tmp_path) for argument in arguments)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=300, env={"HOME": str(tmp_path), "PATH": ""}
        )
        codes = (0, 1, 2) if name == "doctor" else (0,)  # doctor's is what the machine lacks
        endings = tuple(f"exit {number} imported []\n" for number in codes)
        assert done.stdout.endswith(endings), f"{name}: {done.stdout[-300:]}{done.stderr[-300:]}"
    for made in ("ckpt", "model", "hf", "k8s"):
        assert (tmp_path / made).is_dir(), made
