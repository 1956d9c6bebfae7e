"""`check`: everything about a model directory and its service config that can be known without an NPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from telechat_mindie.errors import ConfigError
from telechat_mindie.findings import Finding, Report, error
from telechat_mindie.model_dir.contents import check_contents
from telechat_mindie.model_dir.hashes import check_hashes, hashed_bytes
from telechat_mindie.model_dir.layout import ModelDir
from telechat_mindie.model_dir.modes import check_file, check_files, fix_modes, link_findings
from telechat_mindie.model_dir.parts import READ_FAILURES, Parts
from telechat_mindie.model_dir.weights import check_weights
from telechat_mindie.service import schema
from telechat_mindie.service.check.environment import check_environment
from telechat_mindie.service.check.isolated import check_modules_and_tokenizer
from telechat_mindie.service.check.options import CheckOptions
from telechat_mindie.service.check.service_file import check_config, check_service_file
from telechat_mindie.service.facts import model_facts
from telechat_mindie.service.options import ModelFacts
from telechat_mindie.service.schema.service import model_of

__all__ = ["CheckOptions", "check", "check_config", "check_environment", "check_file", "check_files"]


def check(
    model_path: Path,
    options: CheckOptions | None = None,
    on_hash: Callable[[int], Callable[[int], None]] | None = None,
) -> Report:
    """Check a model directory, and the service config if one is given. Whatever is damaged becomes a finding.

    Args:
        model_path: the directory.
        options: how to check.
        on_hash: called with the number of bytes before they are hashed; gives the progress callback.

    Raises:
        InputError: the generation is unknown.
    """
    options = options or CheckOptions()
    model_of(options.generation)
    path = Path(os.path.abspath(model_path))  # noqa: PTH100 - resolve() would follow a link
    repairs: list[str] = []
    if options.fix:
        repairs += fix_modes(path)
        if options.service_config is not None:
            repairs += fix_modes(options.service_config)
    findings: list[Finding] = []
    facts: ModelFacts | None = None
    tp: int | None = None
    if not path.is_dir():
        findings.append(
            error("model-dir", path, "is a file" if path.exists() else "does not exist", "Name a model directory.")
        )
    elif not os.access(path, os.R_OK | os.X_OK):
        findings += check_files(path, options)
        findings.append(error("unreadable", path, "cannot be read by this user", "Run the check as its owner."))
    else:
        parts = Parts.read(path)
        facts, tp = _facts(path), parts.tp
        findings += check_files(path, options)
        findings += parts.problems
        findings += check_contents(parts)
        findings += check_weights(parts)
        # Behind a link, code may be run that is not the directory's own.
        if not any(link_findings([path, *path.iterdir()])):
            findings += check_modules_and_tokenizer(parts, options)
        if options.full:
            progress = on_hash(hashed_bytes(parts)) if on_hash else None
            findings += check_hashes(parts, progress) if progress else check_hashes(parts)
    config = None
    if options.service_config is not None:
        findings += check_service_file(options.service_config, facts, options)
        try:
            config = schema.load(options.service_config)
        except ConfigError:
            config = None  # told above
    findings += check_environment(config, tp, options)
    return Report.of(findings, repairs)


def _facts(path: Path) -> ModelFacts | None:
    try:
        return model_facts(ModelDir.open(path))
    except READ_FAILURES:
        return None  # the rules tell why
