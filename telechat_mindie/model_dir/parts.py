"""The parts of a model directory, each read on its own, so that one broken file hides nothing of the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from telechat_mindie.checkpoint.formats.safetensors import read_safetensors
from telechat_mindie.checkpoint.formats.tensors import StoredTensor
from telechat_mindie.config import TelechatConfig
from telechat_mindie.errors import ModelDirError, TelechatMindieError
from telechat_mindie.findings import Finding, error
from telechat_mindie.model_dir.layout import MANIFEST, find_yaml
from telechat_mindie.model_dir.modes import file_status
from telechat_mindie.reading import read_json, read_yaml

REBUILD = "Build the directory again: telechat-mindie build MODEL_PATH --checkpoint DIR --force"

MAX_RANKS = 1024  # far beyond any split: tp divides the kv heads

READ_FAILURES = (TelechatMindieError, OSError, TypeError, OverflowError)
"""What reading a damaged file may end in: beside refusals, a list where a text belongs, a number beyond a float."""

T = TypeVar("T")


@dataclass
class Parts:
    """What could be read; None or empty where it could not, which `problems` then tells.

    Attributes:
        ranks: tensors of each rank_N folder by name, from the headers of its safetensors files.
    """

    path: Path
    config_json: dict[str, Any] | None = None
    generation_json: dict[str, Any] | None = None
    config: TelechatConfig | None = None
    yaml_path: Path | None = None
    yaml: dict[str, Any] = field(default_factory=dict)
    manifest: dict[str, Any] | None = None
    ranks: dict[int, dict[str, StoredTensor]] = field(default_factory=dict)
    problems: list[Finding] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Parts:
        """Read everything that is there."""
        parts = cls(path)
        parts.config_json = parts._try("config-json", lambda: read_json(path / "config.json"))
        if parts.config_json is not None:
            config_json = parts.config_json
            parts.config = parts._try("config-json", lambda: TelechatConfig.from_dict(config_json), "config.json: ")
        parts.manifest = parts._try("manifest", lambda: read_json(path / MANIFEST))
        if file_status(path / "generation_config.json") is not None:
            parts.generation_json = parts._try("generation-json", lambda: read_json(path / "generation_config.json"))
        parts._read_yaml()
        for folder in sorted(path.glob("rank_*")):
            number = folder.name[len("rank_") :]
            if number.isascii() and number.isdigit() and str(int(number)) == number and folder.is_dir():
                parts._read_rank(int(number), folder)
        return parts

    @property
    def model_config(self) -> Mapping[str, Any]:
        """The yaml's model.model_config."""
        return section(self.yaml, "model", "model_config")

    @property
    def tp(self) -> int | None:
        """Ranks, as the manifest says; None for no such number."""
        value = (self.manifest or {}).get("tp")
        return value if type(value) is int and 0 < value <= MAX_RANKS else None

    @property
    def listed_files(self) -> Mapping[str, Any]:
        """The manifest's files by path."""
        return section(self.manifest or {}, "files")

    def _read_yaml(self) -> None:
        try:
            self.yaml_path = find_yaml(self.path)
        except ModelDirError:
            names = sorted(file.name for file in self.path.iterdir() if file.suffix in (".yaml", ".yml"))
            listed = [name for name in names if name in self.listed_files]
            others = [name for name in names if name not in listed]
            advice = REBUILD
            if len(listed) == 1:
                advice = f"Move {' and '.join(others)} out of the directory; build wrote {listed[0]}."
            self.problems.append(
                error(
                    "yaml-count",
                    self.path,
                    f"holds {' and '.join(names) or 'no yaml'}, where MindIE wants exactly one yaml: of several it"
                    " takes the first that the file system happens to list",
                    advice,
                )
            )
            return
        yaml_path = self.yaml_path
        self.yaml = self._try("yaml", lambda: read_yaml(yaml_path)) or {}

    def _read_rank(self, rank: int, folder: Path) -> None:
        tensors: dict[str, StoredTensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            found = self._try("weights", lambda file=file: read_safetensors(file))  # type: ignore[misc]
            for name, tensor in (found or {}).items():
                if name in tensors:
                    self.problems.append(error("weights", file, f"{name} stands in two files", REBUILD))
                tensors[name] = tensor
        self.ranks[rank] = tensors

    def _try(self, id: str, read: Callable[[], T], prefix: str = "") -> T | None:
        try:
            return read()
        except READ_FAILURES as failure:
            self.problems.append(error(id, self.path, f"{prefix}{failure}", REBUILD))
        return None


def section(data: Mapping[str, Any], *keys: str) -> Mapping[str, Any]:
    """The mapping at a path of keys, empty where there is none."""
    value: Any = data
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, Mapping) else {}
