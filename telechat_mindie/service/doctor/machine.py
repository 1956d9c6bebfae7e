"""The machine as the probes see it: what a test stages in a folder and a PATH is here the real one."""

from __future__ import annotations

import importlib.machinery
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

PROBE_SECONDS = 15.0  # npu-smi answers in a second or two; with a hung driver it never does


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
        timeout: seconds that one command may take.
    """

    root: Path = Path("/")
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    search_path: Sequence[str] = field(default_factory=lambda: tuple(sys.path))
    uid: int = field(default_factory=os.geteuid)
    timeout: float = PROBE_SECONDS

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

    def run(self, *command: str) -> str | None:
        """What a command prints; None if it is missing, fails, or does not end in time."""
        found = self.which(command[0])
        if found is None:
            return None
        try:
            done = subprocess.run(
                [found, *command[1:]],
                env=dict(self.environment),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=self.timeout,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.decode(errors="replace") if done.returncode == 0 else None

    def read(self, absolute: str, limit: int = 1 << 16) -> str | None:
        """The beginning of a text file, None if it cannot be read."""
        try:
            with open(self.path(absolute), "rb") as file:
                return file.read(limit).decode(errors="replace")
        except OSError:
            return None
