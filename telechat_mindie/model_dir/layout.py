"""A model directory, opened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from telechat_mindie.config import TelechatConfig
from telechat_mindie.errors import ConfigError, ModelDirError
from telechat_mindie.model_dir.manifest import MANIFEST, Entry
from telechat_mindie.model_dir.parts import Parts
from telechat_mindie.model_dir.serving import ServingConfig

__all__ = ["MANIFEST", "ModelDir", "ServingConfig"]

_MALFORMED = ("manifest-json", "config-json", "yaml", "yaml-value")


@dataclass(frozen=True)
class ModelDir:
    """An opened model directory, whose description is complete and agrees with itself.

    Attributes:
        manifest: manifest.json as it was read; its form is sound.
        files: what the manifest says of each file, by path.
    """

    path: Path
    yaml_path: Path
    config: TelechatConfig
    serving: ServingConfig
    manifest: Mapping[str, Any]
    files: Mapping[str, Entry]

    @property
    def dtype(self) -> str:
        """Of the weights, and of keys and values."""
        return self.serving.dtype

    @property
    def tp(self) -> int:
        return int(self.manifest["tp"])

    @property
    def rank_bytes(self) -> int:
        """Bytes of the fullest rank's files."""
        return max(
            sum(entry.nbytes for name, entry in self.files.items() if name.startswith(f"rank_{rank}/"))
            for rank in range(self.tp)
        )

    def rank_folder(self, rank: int) -> Path:
        return self.path / f"rank_{rank}"

    @classmethod
    def open(cls, path: Path) -> ModelDir:
        """Read manifest.json, config.json and the one yaml of `path`; no weights.

        Raises:
            ModelDirError: the directory is absent or incomplete, holds no or several yamls, or they disagree.
            ConfigError: a file is malformed.
        """
        return cls.of(Parts.read(path))

    @classmethod
    def of(cls, parts: Parts) -> ModelDir:
        """What was read already. Raises as `open`: the first of its problems."""
        if parts.problems:
            problem = parts.problems[0]
            kind = ConfigError if problem.id in _MALFORMED else ModelDirError
            raise kind(problem.message, where=problem.where, advice=problem.advice)
        return cls(
            parts.path,
            cast(Path, parts.yaml_path),
            cast(TelechatConfig, parts.config),
            cast(ServingConfig, parts.serving),
            cast(Mapping[str, Any], parts.manifest),
            parts.files,
        )
