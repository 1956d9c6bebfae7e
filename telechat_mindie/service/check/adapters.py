"""LoRA adapters that the daemon would look at before it starts: LoraModules, else the directory's lora_adapter.json.

No MindSpore worker loads one, but a fault in either keeps the service down (src/config_manager/model_deploy_config.cpp:
160-185, 361-376, 494-507 and param_checker.cpp:164-195 of MindIE-LLM v3.0.0.beta.2).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from telechat_mindie.errors import ConfigError
from telechat_mindie.findings import Finding, error, warning
from telechat_mindie.mindie import GENERATIONS
from telechat_mindie.model_dir.modes import path_fault, permission_findings
from telechat_mindie.reading import read_json
from telechat_mindie.service.check.options import CheckOptions
from telechat_mindie.service.schema.base import MODEL_NAME
from telechat_mindie.service.schema.files import MAX_BYTES
from telechat_mindie.service.schema.settings import DEPLOY
from telechat_mindie.service.schema.violations import json_path, value_at

ADAPTERS = "lora_adapter.json"
MERGE = "Merge adapters into the weights instead (build --adapter), and remove the entry."


def check_adapters(model: Path, config: Mapping[str, Any] | None, options: CheckOptions) -> Iterator[Finding]:
    """The adapters of a model directory, or of the config where it has LoraModules: then the file is not read.

    Of the config's entries the schema has judged types and names already.
    """
    modules = value_at(config, (*DEPLOY, "LoraModules"))
    if modules is None:
        yield from _file(model / ADAPTERS, options)
    for index, module in enumerate(modules if isinstance(modules, list) else ()):
        where = f"{options.service_config}: {json_path((*DEPLOY, 'LoraModules', index, 'path'))}"
        if isinstance(path := value_at(module, ("path",)), str):
            yield from _folder(path, where, options)


def _file(path: Path, options: CheckOptions) -> Iterator[Finding]:
    if not path.exists():
        return
    if path.is_symlink():
        yield error("lora-adapter", path, "is a symbolic link, which MindIE refuses", f"rm {path}")
        return
    user = replace(options.user, strict=GENERATIONS[options.generation].is_public)
    yield from permission_findings([path], user)
    try:
        adapters = read_json(path, MAX_BYTES)
    except ConfigError as failure:
        yield error(
            "lora-adapter", path, f"{str(failure).removeprefix(f'{path}: ')}; MindIE does not start with it", MERGE
        )
        return
    for name, folder in adapters.items():
        if not re.fullmatch(MODEL_NAME, name):
            yield error("lora-adapter", path, f"names an adapter {name!r}, expected {MODEL_NAME}", MERGE)
        if isinstance(folder, str):
            yield from _folder(folder, f"{path}: {name}", options)
        else:
            yield error("lora-adapter", f"{path}: {name}", f"is {folder!r}, expected the path of a folder", MERGE)
    if adapters:
        message = "names adapters, and MindSpore workers load none"
        yield warning("lora-adapter", path, message, MERGE)


def _folder(text: str, where: str, options: CheckOptions) -> Iterator[Finding]:
    """SafePath for a folder that may be read, as for modelWeightPath: links are resolved first."""
    path = Path(text).expanduser()
    if not path.is_dir():
        yield error("lora-adapter", where, f"names {text}, which is no folder; MindIE does not start with it", MERGE)
    elif rule := path_fault(str(path.resolve())):
        yield error("lora-adapter", where, f"names {text}; MindIE takes {rule}", MERGE)
    else:
        yield from permission_findings([path.resolve()], options.user)
