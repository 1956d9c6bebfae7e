"""The machine as the probes see it: what a test stages in a folder and a PATH is here the real one."""

from __future__ import annotations

import importlib.machinery
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from telechat_mindie.service.cards import NPU_SMI_SECONDS, Cards, read_cards
from telechat_mindie.service.launch.rundir import cards_held, state_home


class Package(NamedTuple):
    """An installed Python package; the version is empty where none is recorded."""

    folder: Path
    version: str


@dataclass(frozen=True)
class Machine:
    """Where the probes look.

    Attributes:
        root: stands for `/`.
        environment: of the process that would start MindIE.
        search_path: folders in which Python packages are looked for.
        uid: the user.
        timeout: seconds for npu-smi to answer.
    """

    root: Path = Path("/")
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    search_path: Sequence[str] = field(default_factory=lambda: tuple(sys.path))
    uid: int = field(default_factory=os.geteuid)
    timeout: float = NPU_SMI_SECONDS

    def path(self, absolute: str) -> Path:
        """`/dev/shm` under `root`."""
        return self.root / absolute.lstrip("/")

    def package(self, name: str) -> Package | None:
        """An installed package, without importing it."""
        try:
            spec = importlib.machinery.PathFinder.find_spec(name, list(self.search_path))
        except (ImportError, OSError, ValueError):
            return None
        if spec is None or not spec.submodule_search_locations:
            return None
        folder = Path(next(iter(spec.submodule_search_locations)))
        for distribution in metadata.distributions(path=list(self.search_path)):
            recorded = (distribution.metadata["Name"] or "").lower().replace("-", "_")
            if recorded == name:
                return Package(folder, distribution.version)
        return Package(folder, "")

    def which(self, command: str) -> str | None:
        """The path of a command, None if there is none."""
        return shutil.which(command, path=self.environment.get("PATH", ""))

    @cached_property
    def cards(self) -> Cards:
        """What npu-smi says; asked once."""
        return read_cards(self.environment, root=self.root, timeout=self.timeout)

    @cached_property
    def held(self) -> Mapping[int, str]:
        """Names of this user's active launches by the cards that they hold."""
        return cards_held(state_home(self.environment))

    def read(self, absolute: str, limit: int = 1 << 16) -> str | None:
        """The beginning of a text file, None if it cannot be read."""
        try:
            with open(self.path(absolute), "rb") as file:
                return file.read(limit).decode(errors="replace")
        except OSError:
            return None
