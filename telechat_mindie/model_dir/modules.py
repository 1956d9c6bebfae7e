"""The Python modules that the yaml names: there, importable in a process that knows nothing, and ours."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from telechat_mindie import __version__
from telechat_mindie.errors import ConfigError, name_some
from telechat_mindie.findings import Finding, error, warning
from telechat_mindie.model_dir.manifest import REBUILD, section
from telechat_mindie.model_dir.modes import file_status
from telechat_mindie.model_dir.parts import Parts
from telechat_mindie.reading import read_text
from telechat_mindie.templates import render

OWN_MODULES = ("telechat", "telechat_config", "telechat_tokenizer")
OWN_RUNNER = "telechat_mindie.backend.model_runner"

EARLIER_MODULES = {
    "fcecf8b1e2f6cc38af6a3fc7fa300b1d7f8cb9d5dc95d75afa6b17fef2749a4d": "telechat_config",
    "9e0520c8068e1185cc3976a9ca2d217c894e397d72af32ad0cdb3fbfa183b739": "telechat_tokenizer",
}
"""sha256 of what 0.1.0 wrote where this version writes something else: modules of ours too."""

AUTO_CLASSES = ("AutoConfig", "AutoModel", "AutoTokenizer")
MAX_BYTES = 1 << 20


def auto_map(parts: Parts) -> dict[str, str]:
    """`module.Class` by the auto class that the yaml maps to it."""
    found = {}
    for key, value in section(parts.model_config, "auto_map").items():
        first = value[0] if isinstance(value, list) and value else value
        if isinstance(first, str):
            found[str(key)] = first
    return found


def check_modules(parts: Parts) -> tuple[list[Finding], list[str]]:
    """What is wrong with the modules as files, and the `module.Class` names that are safe to import.

    A module that is not, byte for byte, what this version writes is only read, never imported: whoever can change the
    directory could otherwise make `check` run his code. What it imports must still be installed.
    """
    if not parts.model_config:
        return [], []
    findings = [*_architecture(parts), *_tokenizer_path(parts)]
    importable: list[str] = []
    mapped = auto_map(parts)
    for key in AUTO_CLASSES:
        if key not in mapped:
            findings.append(error("auto-map", f"{parts.yaml_path}: auto_map.{key}", "is missing", REBUILD))
    for key, name in mapped.items():
        module, dot, cls = name.rpartition(".")
        if not dot or not module.isidentifier() or not cls.isidentifier():
            where = f"{parts.yaml_path}: auto_map.{key}"
            findings.append(error("auto-map", where, f"is {name!r}, which is no module and class", REBUILD))
            continue
        wrong = list(_module(parts.path / f"{module}.py", module, cls))
        findings.extend(wrong)
        if not wrong:
            importable.append(name)
    return findings, importable


def _module(path: Path, module: str, cls: str) -> Iterator[Finding]:
    text = _read(path)
    if text is None:
        yield error("module", path, "is missing, or no file of Python text", REBUILD)
        return
    if module in OWN_MODULES and text == render(f"{module}.py.j2"):
        return
    if EARLIER_MODULES.get(hashlib.sha256(text.encode()).hexdigest()) == module:
        return
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as failure:
        yield error("module", path, f"is not Python: {failure}", REBUILD)
        return
    missing = sorted(name for name in _imports(tree) if not _installed(name, path.parent))
    if missing:
        yield error(
            "module",
            path,
            f"imports {name_some(missing)}, which no fresh process of this Python finds",
            "Install it, or " + REBUILD[0].lower() + REBUILD[1:],
        )
    elif cls not in _names(tree):
        yield error("module", path, f"defines no {cls}, which the yaml's auto_map names", REBUILD)
    else:
        yield warning(
            "module-changed",
            path,
            f"is not the module that telechat-mindie {__version__} writes; it was read, and not imported",
            "Build the directory again, or review the file: MindIE's worker will run it.",
        )


def _architecture(parts: Parts) -> Iterator[Finding]:
    """model.arch.type, a module that exports MindIEModelRunner (mindformers r1.5.0 mindformers/model_runner.py)."""
    name = section(parts.yaml, "model", "arch").get("type")
    where = f"{parts.yaml_path}: model.arch.type"
    if name == OWN_RUNNER:
        return
    advice = f"Write {OWN_RUNNER}."
    if not isinstance(name, str) or not _installed(name.partition(".")[0], parts.path):
        yield error("arch-type", where, f"is {name!r}, which no fresh process of this Python can import", advice)
    else:
        yield warning("arch-type", where, f"is {name}, another runner than this package's", advice)


def _tokenizer_path(parts: Parts) -> Iterator[Finding]:
    """processor.tokenizer.vocab_file, from which mindformers may make the tokenizer."""
    name = section(parts.yaml, "processor", "tokenizer").get("vocab_file")
    if name != "tokenizer.model":
        where = f"{parts.yaml_path}: processor.tokenizer.vocab_file"
        yield error("tokenizer-path", where, f"is {name!r}, not this directory's tokenizer", "Write 'tokenizer.model'.")


def _imports(tree: ast.Module) -> set[str]:
    """Top-level names of the packages that a module imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


def _names(tree: ast.Module) -> set[str]:
    """Names that a module binds at its top level by a class, a function or an import."""
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names.update(alias.asname or alias.name for alias in node.names)
    return names


def _installed(name: str, directory: Path) -> bool:
    """Whether a fresh process finds a top-level module; finding one runs none of its code."""
    if name in sys.builtin_module_names or (directory / f"{name}.py").is_file():
        return True
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _read(path: Path) -> str | None:
    status = file_status(path)
    if status is None or not stat.S_ISREG(status.st_mode):
        return None
    try:
        return read_text(path, MAX_BYTES)
    except ConfigError:
        return None
