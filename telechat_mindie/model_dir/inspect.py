"""All that a model directory's files tell about it; none of its code is run."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from telechat_mindie.findings import Finding, error
from telechat_mindie.model_dir.daemon_files import check_config_json, check_generation_json
from telechat_mindie.model_dir.files import check_files, check_hashes
from telechat_mindie.model_dir.modes import User, check_tree, linked
from telechat_mindie.model_dir.modules import check_modules
from telechat_mindie.model_dir.parts import Parts
from telechat_mindie.model_dir.weights import check_weights


@dataclass(frozen=True)
class Inspection:
    """What was found.

    Attributes:
        importable: the `module.Class` names of the yaml that are safe to import; None where nothing of the directory
            may be run.
    """

    parts: Parts
    findings: list[Finding] = field(default_factory=list)
    importable: list[str] | None = None


def inspect(
    path: Path,
    user: User | None = None,
    *,
    full: bool = False,
    on_hash: Callable[[int], Callable[[int], object]] | None = None,
) -> Inspection:
    """Look at everything in a model directory; whatever is damaged becomes a finding.

    Args:
        user: whom MindIE's rules for owners and modes are applied for; None: this process's.
        full: also hash every file.
        on_hash: called with the number of bytes before they are hashed; gives the progress callback.
    """
    user = user or User(os.geteuid())
    if path.is_dir() and not os.access(path, os.R_OK | os.X_OK):
        unreadable = error("unreadable", path, "cannot be read by this user", "Run the check as its owner.")
        return Inspection(Parts(path, problems=[unreadable]), [*check_tree(path, user), unreadable])
    parts = Parts.read(path)
    if not path.is_dir():
        return Inspection(parts, parts.problems)
    findings = [
        *check_tree(path, user),
        *parts.problems,
        *check_files(parts),
        *check_config_json(parts),
        *check_generation_json(parts),
        *check_weights(parts),
    ]
    importable = None
    # Behind a link, code may be run that is not the directory's own.
    if not linked(path):
        of_modules, importable = check_modules(parts)
        findings += of_modules
    if full:
        progress = on_hash(sum(entry.nbytes for entry in parts.files.values())) if on_hash else None
        findings += check_hashes(parts, progress)
    return Inspection(parts, findings, importable)
