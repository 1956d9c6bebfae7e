"""`check`: everything about a model directory and its service config that can be known without an NPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from telechat_mindie.errors import ConfigError, ModelDirError
from telechat_mindie.findings import Report
from telechat_mindie.model_dir.inspect import inspect
from telechat_mindie.model_dir.layout import ModelDir
from telechat_mindie.model_dir.modes import fix_modes
from telechat_mindie.model_dir.parts import Parts
from telechat_mindie.service.check.adapters import check_adapters
from telechat_mindie.service.check.environment import check_environment
from telechat_mindie.service.check.isolated import check_by_running
from telechat_mindie.service.check.options import CheckOptions
from telechat_mindie.service.check.service_file import check_config, check_service_file
from telechat_mindie.service.facts import model_facts
from telechat_mindie.service.options import ModelFacts
from telechat_mindie.service.schema.service import model_of

__all__ = ["CheckOptions", "check", "check_config"]


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
        repairs += fix_modes(path.resolve())
        if options.service_config is not None:
            repairs += fix_modes(options.service_config)
    seen = inspect(path, options.user, full=options.full, on_hash=on_hash)
    findings = list(seen.findings)
    if seen.importable is not None:
        findings += check_by_running(seen.parts, seen.importable, options)
    config = None
    if options.service_config is not None:
        of_config, config = check_service_file(options.service_config, _facts(seen.parts), options)
        findings += of_config
    if path.is_dir():
        findings += check_adapters(path, config, options)
    findings += check_environment(config, seen.parts.tp, options)
    return Report.of(findings, repairs)


def _facts(parts: Parts) -> ModelFacts | None:
    try:
        return model_facts(ModelDir.of(parts))
    except (ConfigError, ModelDirError):
        return None  # the inspection tells why
