"""What a check is told beside the model directory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from telechat_mindie.mindie import certificate_home
from telechat_mindie.model_dir.modes import SKIP_VARIABLE, User
from telechat_mindie.service import DEFAULT_GENERATION


@dataclass(frozen=True)
class CheckOptions:
    """How to check.

    Attributes:
        service_config: the conf/config.json that will serve the directory; None checks the directory alone.
        generation: the generation of MindIE, a key of `schema.GENERATIONS`.
        device_mem_gb: memory of one card, in GB of 2^30 bytes; None asks npu-smi for the cards of the service config.
        full: hash every file and compare with the manifest.
        fix: repair modes before looking.
        uid: the user that MindIE will run as; MindIE's file rules depend on it.
        environment: the environment that MindIE will run in.
        mindie_home: where the certificates are looked up; None looks for MindIE as `launch` does.
        timeout: seconds that the clean subprocess may take.
    """

    service_config: Path | None = None
    generation: str = DEFAULT_GENERATION
    device_mem_gb: float | None = None
    full: bool = False
    fix: bool = False
    uid: int = field(default_factory=os.geteuid)
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    mindie_home: Path | None = None
    timeout: float = 300

    @property
    def user(self) -> User:
        """Whom MindIE's file rules are applied for."""
        return User(self.uid, exempt=self.environment.get(SKIP_VARIABLE) == "0")

    @property
    def home(self) -> Path | None:
        """MindIE's home; None where there is none."""
        return certificate_home(self.environment, self.mindie_home)
