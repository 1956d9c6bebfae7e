"""The small files that describe a model directory, each read on its own, so that one broken file hides no other."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from telechat_mindie.computation import check_computation
from telechat_mindie.config import TelechatConfig
from telechat_mindie.dtypes import WEIGHT_DTYPES
from telechat_mindie.errors import TelechatMindieError
from telechat_mindie.findings import Finding, error
from telechat_mindie.foreign import WEIGHT_SUFFIXES, find_foreign
from telechat_mindie.mindie import ATB, MS
from telechat_mindie.model_dir.manifest import MANIFEST, REBUILD, Entry, check_manifest, section, sound_entries
from telechat_mindie.model_dir.serving import ONE_YAML, ServingConfig, contradictions, read_serving, yaml_files
from telechat_mindie.reading import meant_instead, read_json, read_yaml

READ_FAILURES = (TelechatMindieError, OSError, TypeError, ValueError, OverflowError)
"""What reading a damaged file may end in: beside refusals, a list where a text belongs, a number beyond a float."""

T = TypeVar("T")


def attempt(problems: list[Finding], id: str, where: Path, read: Callable[[], T], advice: str = REBUILD) -> T | None:
    """What `read` gives, or None and one more problem."""
    try:
        return read()
    except READ_FAILURES as failure:
        problems.append(error(id, where, str(failure).removeprefix(f"{where}: "), advice))
    return None


@dataclass
class Parts:
    """What could be read of a directory, None or empty where it could not, and what is wrong with it.

    This is the one reading of a directory's description: `ModelDir.open` raises the first of `problems`, `inspect`
    lists them all, with what the other rules find.

    Attributes:
        files: the manifest's files by path, without entries that are damaged.
        serving: None unless the yaml's values are all sound.
    """

    path: Path
    manifest: dict[str, Any] | None = None
    files: dict[str, Entry] = field(default_factory=dict)
    config_json: dict[str, Any] | None = None
    config: TelechatConfig | None = None
    yaml_path: Path | None = None
    yaml: dict[str, Any] = field(default_factory=dict)
    serving: ServingConfig | None = None
    problems: list[Finding] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Parts:
        """Read everything that is there; no more than manifest.json, config.json and the yaml."""
        parts = cls(path)
        if not path.is_dir():
            found = "a file" if path.exists() else "nothing"
            advice = meant_instead(path) or "Name a model directory, as `telechat-mindie build` makes it."
            if path.exists() and (match := find_foreign("file", [path.name])):
                found, advice = f"a file that {match[0].what}", match[0].advice
            parts._problem("model-dir", path, f"is not a directory (found {found})", advice)
            return parts
        parts._read_manifest()
        if parts.is_something_else:
            return parts
        parts._read_config()
        parts._read_yaml()
        return parts

    @property
    def is_something_else(self) -> bool:
        """Whether it is no model directory at all, of which nothing more is worth saying."""
        return any(problem.id == "model-dir" for problem in self.problems)

    @property
    def backend(self) -> str:
        """That of a directory whose every part is read here."""
        return MS

    @property
    def model_config(self) -> Mapping[str, Any]:
        """The yaml's model.model_config."""
        return section(self.yaml, "model", "model_config")

    @property
    def tp(self) -> int | None:
        """Ranks, as a sound manifest says."""
        damaged = any(problem.id in ("manifest", "backend") for problem in self.problems)
        return None if self.manifest is None or damaged else int(self.manifest["tp"])

    def _problem(self, id: str, where: object, message: str, advice: str = REBUILD) -> None:
        self.problems.append(error(id, where, message, advice))

    def _read_manifest(self) -> None:
        where = self.path / MANIFEST
        if not where.is_file():
            self._problem(*_without_manifest(self.path))
            return
        self.manifest = attempt(self.problems, "manifest-json", where, lambda: read_json(where))
        if self.manifest is not None and self.manifest.get("backend") == ATB:
            self._problem("backend", self.path, *_for_atb(self.path, self.manifest))
        elif self.manifest is not None:
            self.problems += check_manifest(self.manifest, where)
            self.files = sound_entries(self.manifest)

    def _read_config(self) -> None:
        where = self.path / "config.json"
        data = self.config_json = attempt(self.problems, "config-json", where, lambda: read_json(where))
        if data is not None:
            self.config = attempt(self.problems, "config-json", where, lambda: TelechatConfig.from_dict(data))
        if self.config is None:
            return
        config, tp = self.config, self.tp
        attempt(self.problems, "config-json", where, lambda: check_computation(config, where))
        if tp is not None:
            attempt(self.problems, "tp", self.path / MANIFEST, lambda: config.check_tp(tp))

    def _read_yaml(self) -> None:
        yamls = attempt(self.problems, "yaml-count", self.path, lambda: yaml_files(self.path))
        if yamls is None:
            return
        if len(yamls) != 1:
            names = [file.name for file in yamls]
            others = [name for name in names if name not in self.files]
            advice = REBUILD
            if len(names) - len(others) == 1:
                built = next(name for name in names if name in self.files)
                advice = f"Move {' and '.join(others)} out of the directory; build wrote {built}."
            self._problem("yaml-count", self.path, f"{ONE_YAML} (found {', '.join(names) or 'none'})", advice)
            return
        where = self.yaml_path = yamls[0]
        described = attempt(self.problems, "yaml", where, lambda: read_yaml(where))
        if described is None:
            return
        self.yaml = described
        if not self.model_config:
            self._problem("model-config", where, "has no model.model_config")
            return
        if self.config is not None:
            for key, fault in contradictions(self.model_config, self.config):
                self._problem("layers" if key == "num_layers" else "yaml-shape", f"{where}: {key}", fault)
        self.serving = attempt(self.problems, "yaml-value", where, lambda: read_serving(self.model_config, where))
        dtype = (self.manifest or {}).get("dtype")
        if self.serving is not None and dtype is not None and self.serving.dtype != dtype:
            message = f"is not the dtype of the weights (expected {dtype}, found {self.serving.dtype})"
            self._problem("dtype", f"{where}: param_init_type", message)


def _without_manifest(path: Path) -> tuple[str, Path, str, str]:
    """The finding's id, place, message and advice for a folder without a manifest: what it may be instead."""
    message = f"is not a model directory: it has no {MANIFEST}"
    names = sorted(entry.name for entry in path.iterdir())
    if match := find_foreign("file", names):
        row, found = match
        return "model-dir", path, f"{message}, and {row.what} (found {found})", row.advice
    if "config.json" in names and any(Path(name).suffix in WEIGHT_SUFFIXES for name in names):
        command = shlex.join(["telechat-mindie", "build", f"{path.resolve().name}-mindie", "--checkpoint", str(path)])
        advice = f"Build a model directory of it: {command}"
        return "model-dir", path, f"{message}, but a checkpoint's config.json and weights", advice
    return "manifest", path, message, "Make one with `telechat-mindie build MODEL_PATH --checkpoint DIR`."


def _for_atb(path: Path, manifest: Mapping[str, Any]) -> tuple[str, str]:
    """What to say of a directory of the other backend, and how its model is served on a CPU."""
    message = "was built for backendType atb of MindIE 3.0: no MindSpore loads it"
    source = f"--checkpoint {shlex.quote(str(path))}"
    if manifest.get("dtype") not in WEIGHT_DTYPES:
        message += f", and {manifest.get('dtype')} computes on NPUs alone"
        source = "--checkpoint DIR of the checkpoint that was quantised"
    return (
        message,
        f"Build it for ms to serve it here: telechat-mindie build OTHER {source}; telechat-mindie serve OTHER",
    )
