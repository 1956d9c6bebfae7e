"""Rules of a ModelConfig entry: what reaches the worker, LoRA, and the MindSpore backend. Sources as in `base`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from telechat_mindie.service.schema.settings import BACKEND, DEPLOY, Rule, Settings, model_location
from telechat_mindie.service.schema.violations import Violation, Words, error, show, value_at, warning
from telechat_mindie.units import INT32_MAX

DUMPED = ("plugin_params", "models")  # handed on as JSON text: model_deploy_config.cpp:209-218
KEPT_BY_SERVICE = (
    *("modelInstanceType", "modelName", "modelWeightPath", "worldSize"),
    *("cpuMemSize", "npuMemSize", "backendType", "trustRemoteCode"),
)  # model_deploy_config.cpp:192-194


def handed_on(settings: Settings) -> Iterator[Violation]:
    """Numbers pass through int32 on their way to the worker, and lists and objects do not arrive at all
    (model_deploy_config.cpp:198-217)."""
    entries = value_at(settings.raw, (*DEPLOY, "ModelConfig"))  # as the file has them, unknown keys included
    for index, entry in enumerate(entries if isinstance(entries, list) else []):
        for name, value in entry.items() if isinstance(entry, dict) else ():
            here = model_location(index, name)
            if name in KEPT_BY_SERVICE or name in DUMPED or isinstance(value, str):
                continue
            if isinstance(value, float) or (isinstance(value, int) and not -INT32_MAX - 1 <= value <= INT32_MAX):
                repair = f'Write it as a string, "{value}": MindIE casts numbers to int32.'
                yield warning(here, "truncated", "a string, or an integer of 32 bits", value, repair)
            elif value is None or isinstance(value, (list, dict)):
                repair = "Write it as a string: MindIE hands on no list, object or null."
                yield warning(here, "dropped", "a string, a number or a boolean", value, repair)


def parallel_sizes(settings: Settings) -> Iterator[Violation]:
    """dp, sp and cp are at least 1 (model_deploy_config.cpp:93-125); MindSpore workers have 1 of each
    (mindie_llm/modeling/model_wrapper/ms/mf_model_wrapper.py:46-49)."""
    split = "Remove it: the MindSpore backend splits by tensor only, over worldSize cards."
    for index, entry in enumerate(settings.models):
        for name in ("dp", "sp", "cp"):
            value, here = entry.get(name), model_location(index, name)
            size = _integer_prefix(value)
            if value is not None and (size is None or size < 1):
                repair = f"Set it to 1, or remove {name}."
                yield error(here, "parallel-size", "an integer of at least 1", value, repair)
            elif size is not None and size > 1 and entry.get("backendType") == "ms":
                yield error(here, "ms-parallel", "1 with backendType ms", value, split)


def lora(settings: Settings) -> Iterator[Violation]:
    """Adapters name a served model (model_deploy_config.cpp:503); MindSpore workers have no adapter manager
    (mindie_llm/modeling/model_wrapper/ms/mf_model_wrapper.py has none)."""
    here = (*DEPLOY, "LoraModules")
    modules = settings.get(here) or []
    names = [entry.get("modelName") for entry in settings.models]
    for index, module in enumerate(modules):
        base = module.get("baseModelName")
        if base is not None and None not in names and base not in names:
            repair = "Name the modelName of the entry that the adapter belongs to."
            yield error((*here, index, "baseModelName"), "lora-base", f"one of {show(names)}", base, repair)
    if modules and settings.serves_with("ms"):
        repair = "Merge the adapter into the weights before they are converted."
        yield warning(here, "ms-lora", "no adapters with backendType ms", Words(f"{len(modules)} adapters"), repair)


def npu_memory(settings: Settings) -> Iterator[Violation]:
    """-1 lets the worker size the KV cache (doc:127). MindSpore workers do so only where prefill and decode share an
    instance (mindie_llm/text_generator/adapter/generator_ms.py:50), and the runner of mindformers only for classes
    that it lists (mindformers r1.5.0 mindformers/model_runner.py)."""
    for index, entry in enumerate(settings.models):
        if entry.get("backendType") != "ms" or entry.get("npuMemSize") != -1:
            continue
        here, repair = model_location(index, "npuMemSize"), "Set the GB of KV cache for a card"
        if settings.server.get("inferMode") == "dmi":
            expected = "1 GB or more with backendType ms and inferMode dmi"
            yield error(here, "ms-npu-mem", expected, -1, f"{repair}.")
        else:
            expected = "1 GB or more, unless the runner of this package serves the model"
            repair += "; mindformers' own runner refuses -1 for TeleChat2."
            yield warning(here, "ms-npu-mem", expected, -1, repair)


def kv_pool(settings: Settings) -> Iterator[Violation]:
    """A pool is opened with the worker's device, which MindSpore workers do not have, as soon as prefix_cache or a
    decode instance wants it (mindie_llm/text_generator/generator.py:389-401, plugins/prefix_cache/
    prefix_cache_plugin.py:89)."""
    pool = settings.backend.get("kvPoolConfig") or {}
    if pool.get("backend") and pool.get("configPath") and settings.serves_with("ms"):
        here, repair = (*BACKEND, "kvPoolConfig", "backend"), 'Set backend and configPath to "".'
        yield warning(here, "ms-kv-pool", '"" with backendType ms', pool["backend"], repair)


def model_path(settings: Settings) -> Iterator[Violation]:
    """A relative path starts where the daemon was started (src/utils/safe_path.cpp:147)."""
    repair = "Write the whole path: MindIE starts from the folder that its daemon was started in."
    for index, entry in enumerate(settings.models):
        path = entry.get("modelWeightPath")
        if path and not path.startswith(("/", "~/")):
            here = model_location(index, "modelWeightPath")
            yield warning(here, "relative-path", "an absolute path", path, repair)


def _integer_prefix(value: Any) -> int | None:
    """What C++ std::stoi makes of the text that MindIE hands on; None where it throws."""
    if isinstance(value, str):
        match = re.match(r"\s*([+-]?)0*([0-9]{1,10})(?![0-9])", value)
        number = int(match[1] + match[2]) if match else INT32_MAX + 1
        return number if -INT32_MAX - 1 <= number <= INT32_MAX else None
    if isinstance(value, float):
        return int(value) if math.isfinite(value) else None
    return value if isinstance(value, int) else None


RULES: tuple[Rule, ...] = (handed_on, parallel_sizes, lora, npu_memory, kv_pool, model_path)
