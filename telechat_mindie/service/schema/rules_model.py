"""Rules of a ModelConfig entry: what reaches the worker, LoRA, and the MindSpore backend. Sources as in `base`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from telechat_mindie.service.schema.base import INT32_MAX
from telechat_mindie.service.schema.settings import BACKEND, DEPLOY, Rule, Settings, model_location
from telechat_mindie.service.schema.violations import Violation, error, show, warning

DUMPED = ("plugin_params", "models")  # handed on as JSON text: model_deploy_config.cpp:209-218
KEPT_BY_SERVICE = (
    "modelInstanceType",
    "modelName",
    "modelWeightPath",
    "worldSize",
    "cpuMemSize",
    "npuMemSize",
    "backendType",
    "trustRemoteCode",
)  # model_deploy_config.cpp:192-194


def handed_on(settings: Settings) -> Iterator[Violation]:
    """Numbers pass through int32 on their way to the worker, and lists and objects do not arrive at all
    (model_deploy_config.cpp:198-217)."""
    for index, entry in enumerate(_raw_entries(settings)):
        for name, value in entry.items():
            if name in KEPT_BY_SERVICE or name in DUMPED or isinstance(value, str):
                continue
            here = model_location(index, name)
            if isinstance(value, float) or (isinstance(value, int) and not -INT32_MAX - 1 <= value <= INT32_MAX):
                yield warning(
                    here,
                    "truncated",
                    expected="a string, or an integer of 32 bits",
                    found=show(value),
                    repair=f'Write it as a string, "{value}": MindIE casts numbers to int32.',
                )
            elif value is None or isinstance(value, (list, dict)):
                yield warning(
                    here,
                    "dropped",
                    expected="a string, a number or a boolean",
                    found=show(value),
                    repair="Write it as a string: MindIE hands on no list, object or null.",
                )


def parallel_sizes(settings: Settings) -> Iterator[Violation]:
    """dp, sp and cp are at least 1 (model_deploy_config.cpp:93-125); MindSpore workers have 1 of each
    (mindie_llm/modeling/model_wrapper/ms/mf_model_wrapper.py:46-49)."""
    for index, entry in enumerate(settings.models):
        for name in ("dp", "sp", "cp"):
            value = entry.get(name)
            if value is None:
                continue
            size = _integer_prefix(value)
            if size is None or size < 1:
                yield error(
                    model_location(index, name),
                    "parallel-size",
                    expected="an integer of at least 1",
                    found=show(value),
                    repair=f"Set it to 1, or remove {name}.",
                )
            elif size > 1 and entry.get("backendType") == "ms":
                yield error(
                    model_location(index, name),
                    "ms-parallel",
                    expected="1 with backendType ms",
                    found=show(value),
                    repair="Remove it: the MindSpore backend splits by tensor only, over worldSize cards.",
                )


def lora(settings: Settings) -> Iterator[Violation]:
    """Adapters name a served model (model_deploy_config.cpp:503); MindSpore workers have no adapter manager
    (mindie_llm/modeling/model_wrapper/ms/mf_model_wrapper.py has none)."""
    modules = settings.deploy.get("LoraModules") or []
    names = [entry.get("modelName") for entry in settings.models]
    for index, module in enumerate(modules):
        base = module.get("baseModelName")
        if base is not None and None not in names and base not in names:
            yield error(
                (*DEPLOY, "LoraModules", index, "baseModelName"),
                "lora-base",
                expected=f"one of {show(names)}",
                found=show(base),
                repair="Name the modelName of the entry that the adapter belongs to.",
            )
    if modules and any(entry.get("backendType") == "ms" for entry in settings.models):
        yield warning(
            (*DEPLOY, "LoraModules"),
            "ms-lora",
            expected="no adapters with backendType ms",
            found=f"{len(modules)} adapters",
            repair="Merge the adapter into the weights before they are converted.",
        )


def npu_memory(settings: Settings) -> Iterator[Violation]:
    """-1 lets the worker size the KV cache (doc:127). MindSpore workers do so only where prefill and decode share an
    instance (mindie_llm/text_generator/adapter/generator_ms.py:50), and the runner of mindformers only for classes
    that it lists (mindformers r1.5.0 mindformers/model_runner.py)."""
    for index, entry in enumerate(settings.models):
        if entry.get("backendType") != "ms" or entry.get("npuMemSize") != -1:
            continue
        here = model_location(index, "npuMemSize")
        if settings.server.get("inferMode") == "dmi":
            yield error(
                here,
                "ms-npu-mem",
                expected="1 GB or more with backendType ms and inferMode dmi",
                found="-1",
                repair="Set the GB of KV cache for a card.",
            )
        else:
            yield warning(
                here,
                "ms-npu-mem",
                expected="1 GB or more, unless the runner of this package serves the model",
                found="-1",
                repair="Set the GB of KV cache for a card; mindformers' own runner refuses -1 for TeleChat2.",
            )


def kv_pool(settings: Settings) -> Iterator[Violation]:
    """A pool is opened with the worker's device, which MindSpore workers do not have, as soon as prefix_cache or a
    decode instance wants it (mindie_llm/text_generator/generator.py:389-401, plugins/prefix_cache/
    prefix_cache_plugin.py:89)."""
    pool = settings.backend.get("kvPoolConfig") or {}
    on_mindspore = any(entry.get("backendType") == "ms" for entry in settings.models)
    if pool.get("backend") and pool.get("configPath") and on_mindspore:
        yield warning(
            (*BACKEND, "kvPoolConfig", "backend"),
            "ms-kv-pool",
            expected='"" with backendType ms',
            found=show(pool["backend"]),
            repair='Set backend and configPath to "".',
        )


def model_path(settings: Settings) -> Iterator[Violation]:
    """A relative path starts where the daemon was started (src/utils/safe_path.cpp:147)."""
    for index, entry in enumerate(settings.models):
        path = entry.get("modelWeightPath")
        if path and not path.startswith(("/", "~/")):
            yield warning(
                model_location(index, "modelWeightPath"),
                "relative-path",
                expected="an absolute path",
                found=show(path),
                repair="Write the whole path: MindIE starts from the folder that its daemon was started in.",
            )


def _raw_entries(settings: Settings) -> list[dict[str, Any]]:
    """The entries as the file has them, unknown keys included; {} for one that is no object."""
    value: Any = settings.raw
    for step in (*DEPLOY, "ModelConfig"):
        value = value.get(step) if isinstance(value, Mapping) else None
    return [entry if isinstance(entry, dict) else {} for entry in value] if isinstance(value, list) else []


def _integer_prefix(value: Any) -> int | None:
    """What C++ std::stoi makes of the text that MindIE hands on."""
    if isinstance(value, str):
        match = re.match(r"\s*[+-]?\d+", value)
        return int(match[0]) if match else None
    return int(value) if isinstance(value, (int, float)) else None


RULES: tuple[Rule, ...] = (handed_on, parallel_sizes, lora, npu_memory, kv_pool, model_path)
