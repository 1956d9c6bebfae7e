"""`check`: everything about a model directory and its service config that can be known without an NPU."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from telechat_mindie.errors import ConfigError, ModelDirError
from telechat_mindie.findings import Report, warning
from telechat_mindie.mindie import ATB, ATB_UNKNOWN, GENERATIONS, MS
from telechat_mindie.model_dir.atb.inspect import inspect_atb
from telechat_mindie.model_dir.atb.layout import AtbDir, AtbParts, is_atb
from telechat_mindie.model_dir.inspect import inspect
from telechat_mindie.model_dir.layout import ModelDir
from telechat_mindie.model_dir.modes import fix_modes
from telechat_mindie.model_dir.parts import Parts
from telechat_mindie.service import schema
from telechat_mindie.service.check.adapters import check_adapters
from telechat_mindie.service.check.environment import check_environment
from telechat_mindie.service.check.isolated import check_by_running
from telechat_mindie.service.check.options import CheckOptions
from telechat_mindie.service.check.service_file import check_config, check_service_file
from telechat_mindie.service.facts import atb_facts, model_facts
from telechat_mindie.service.options import ModelFacts
from telechat_mindie.service.schema.service import model_of
from telechat_mindie.service.schema.settings import model_location
from telechat_mindie.service.schema.violations import typed_at

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
        repairs += fix_modes(Path(os.path.realpath(path)))
        if options.service_config is not None:
            repairs += fix_modes(options.service_config)
    backend, tp = MS, None
    if is_atb(path, options.generation):
        found = inspect_atb(path, options.user, full=options.full, on_hash=on_hash)
        findings, facts, backend = found.findings, _atb_facts(found.parts, options), ATB
        if not GENERATIONS[options.generation].is_public:
            advice = "Serve it with MindIE 3.0.0, or build a directory for backendType ms."
            findings.append(warning("atb-generation", path, f"MindIE {options.generation} {ATB_UNKNOWN}", advice))
    else:
        seen = inspect(path, options.user, full=options.full, on_hash=on_hash)
        findings, facts, tp = list(seen.findings), _facts(seen.parts), seen.parts.tp
        if seen.importable is not None:
            findings += check_by_running(seen.parts, seen.importable, options)
    config = None
    if options.service_config is not None:
        of_config, config = check_service_file(options.service_config, facts, options)
        findings += of_config
    if path.is_dir():
        findings += check_adapters(path, config, options)
    findings += check_environment(config, tp, options, backend)
    return Report.of(findings, repairs)


def _facts(parts: Parts) -> ModelFacts | None:
    try:
        return model_facts(ModelDir.of(parts))
    except (ConfigError, ModelDirError):
        return None  # the inspection tells why


def _atb_facts(parts: AtbParts, options: CheckOptions) -> ModelFacts | None:
    """Those for the cards of the config, where the model can be shared by so many."""
    world_size = None
    with contextlib.suppress(ConfigError):
        if options.service_config is not None:
            world_size = typed_at(schema.load(options.service_config), model_location(0, "worldSize"))
    try:
        directory = AtbDir.of(parts)
    except (ConfigError, ModelDirError):
        return None
    return atb_facts(directory, world_size if world_size in directory.allowed_tp else directory.tp)
