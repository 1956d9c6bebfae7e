"""Rules of plugin_params: the plugins named in it, their parameters and their companions. Sources as in `base`.

`plugins/` is mindie_llm/text_generator/plugins/, `feature/` is docs/zh/user_guide/feature/.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from typing import Any, NamedTuple

from telechat_mindie.backend.plugins import MAX_LENGTH, PARAMETERS, plugin_names, read_plugin_params
from telechat_mindie.errors import InputError
from telechat_mindie.mindie import is_since
from telechat_mindie.service.schema.settings import DEPLOY, SCHEDULE, SERVER, Rule, Settings, model_location
from telechat_mindie.service.schema.violations import NOTHING, Location, Violation, Words, error, warning

NPU_USAGE: Location = (*SERVER, "HealthCheckConfig", "npuUsageThreshold")
SCHEDULER_CHARACTERS = 256  # src/include/utils/check_utils.h:20: beyond, the scheduler takes every plugin as off

CLAMPED = {"la": (False, True), "memory_decoding": (True, True), "mtp": (False, False)}
"""Whether a value below, or above, the range is replaced by the nearest allowed one; else the worker dies."""

EXCLUSIVE = ("la", "memory_decoding", "mtp", "splitfuse")
"""At most one of these at a time (feature/speculative_decoding.md:30, 35; feature/splitFuse.md:31)."""

SLOTS: dict[str, Callable[[Mapping[str, Any]], int]] = {
    "la": lambda p: (p["level"] - 1) * (p["window"] + p["guess_set_size"]),
    "memory_decoding": lambda p: p["decoding_length"],
}
"""Guessed tokens need KV slots: speculationGamma of them (plugins/plugin_utils.py:46-75). MindIE sets it by itself for
mtp (model_deploy_config.cpp:127-157)."""


class Plugins(NamedTuple):
    """The plugin_params of one ModelConfig entry, parsed."""

    location: Location
    names: tuple[str, ...]
    parameters: Mapping[str, Any]


def plugins(settings: Settings) -> Iterator[Violation]:
    """Every rule of plugin_params, entry by entry."""
    for index, entry in enumerate(settings.models):
        if entry.get("pluginParams"):
            here, repair = model_location(index, "pluginParams"), "Rename it to plugin_params: nothing reads this name."
            yield warning(here, "plugin-params-name", "the key plugin_params", entry["pluginParams"], repair)
        found = yield from _read(model_location(index, "plugin_params"), entry.get("plugin_params", ""))
        yield from _each(found)
        yield from _speculation(settings, found)
        yield from _together(settings, found)
        if entry.get("backendType") == "ms" and "mtp" in found.names:
            # mindie_llm/text_generator/plugins has an mtp plugin for ATB only.
            repair = "Take mtp out: TeleChat2 has no layers for it."
            yield warning(found.location, "ms-mtp", "la or memory_decoding with backendType ms", "mtp", repair)
        yield from _switches(settings, found.names)


def _read(location: Location, value: Any) -> Generator[Violation, None, Plugins]:
    """The plugins in a plugin_params value: none where it is empty, or where it is wrong as a whole."""
    text = value if isinstance(value, str) else json.dumps(value)  # model_deploy_config.cpp:209-213
    try:
        parameters = read_plugin_params(text) if text else {"plugin_type": ""}
    except InputError:
        parameters = {}
    names = plugin_names(parameters)
    if parameters.get("plugin_type") is None:
        expected = f'at most {MAX_LENGTH} characters of JSON: an object with a string "plugin_type"'
        repair = 'Write one, such as {"plugin_type": "prefix_cache"}, or remove plugin_params.'
        yield error(location, "plugin-params", expected, value, repair)
    size = len(value if isinstance(value, str) else json.dumps(value, separators=(",", ":")))
    if size > SCHEDULER_CHARACTERS and {"splitfuse", "prefix_cache"} & set(names):
        expected = f"at most {SCHEDULER_CHARACTERS} characters"
        repair = "Shorten it: the scheduler passes over a longer one and leaves the plugins off."
        yield warning(location, "plugin-length", expected, Words(f"{size} characters"), repair)
    return Plugins(location, names, parameters)


def _each(found: Plugins) -> Iterator[Violation]:
    """Every name is one that MindIE knows, and has its parameters."""
    for name in found.names:
        if name not in PARAMETERS:
            repair = "Correct the name, or take it out."
            yield error(found.location, "plugin-type", f"one of {', '.join(PARAMETERS)}", name, repair)
        for parameter, (low, high) in PARAMETERS.get(name, {}).items():
            value = found.parameters.get(parameter, NOTHING)
            if type(value) is not int or not low <= value <= high:
                report = warning if type(value) is int and CLAMPED[name][value > high] else error
                expected, repair = f"{parameter} from {low} to {high} for {name}", f"Set {parameter} in plugin_params."
                yield report(found.location, "plugin-parameter", expected, value, repair)


def _speculation(settings: Settings, found: Plugins) -> Iterator[Violation]:
    gamma = settings.deploy.get("speculationGamma", 0)
    for name in [name for name in SLOTS if name in found.names]:
        sound = all(type(found.parameters.get(parameter)) is int for parameter in PARAMETERS[name])
        if sound and (least := SLOTS[name](found.parameters)) > gamma:
            here = (*DEPLOY, "speculationGamma")
            yield error(here, "speculation-gamma", f"at least {least} for {name}", gamma, f"Set it to {least}.")
        # feature/speculative_decoding.md:34
        here, repair = NPU_USAGE, "Set it to 0: the health check is not supported together with guessed tokens."
        if threshold := settings.get(here):
            yield warning(here, "speculation-health", f"0 with {name}", threshold, repair)


def _together(settings: Settings, found: Plugins) -> Iterator[Violation]:
    exclusive = [name for name in EXCLUSIVE if name in found.names]
    if len(exclusive) > 1:
        expected, repair = f"one of {', '.join(EXCLUSIVE)}", "Choose one of them; prefix_cache goes with each."
        yield error(found.location, "plugin-conflict", expected, Words(", ".join(exclusive)), repair)
    # src/llm_manager_v2/impl/llm_manager_impl.cpp:547-555
    template, chunk = (*SCHEDULE, "templateType"), (*SCHEDULE, "splitChunkTokens")
    if "splitfuse" in found.names and settings.get(template) == "Standard":
        repair = "Set templateType to Mix, or take splitfuse out of plugin_params."
        yield error(template, "splitfuse-template", "Mix, since plugin_params names splitfuse", "Standard", repair)
    if "splitfuse" in found.names and settings.get(chunk) == 0:
        repair = "Set the tokens of a chunk, or remove the key for 512."
        yield error(chunk, "splitfuse-chunk", "1 or more with splitfuse", 0, repair)


def _switches(settings: Settings, names: Collection[str]) -> Iterator[Violation]:
    """The switches in ScheduleConfig that went with a plugin (schedule_config.cpp:142-146, 184-191: ignored now;
    feature/prefix_cache.md:43: needed in older releases)."""
    if settings.schedule.get("templateType") == "Mix" and "splitfuse" not in names:
        # feature/splitFuse.md:42 demands it; the C++ starts without, and then mixes no batches.
        here, expected = (*SCHEDULE, "templateType"), "Standard, or splitfuse in plugin_params"
        repair = 'Set templateType to Standard, or plugin_params to {"plugin_type": "splitfuse"}.'
        yield warning(here, "mix-without-splitfuse", expected, "Mix", repair)
    for switch, plugin in (("enablePrefixCache", "prefix_cache"), ("enableSplit", "splitfuse")):
        here, given = (*SCHEDULE, switch), settings.given(*SCHEDULE, switch)
        value = settings.get(here)
        if is_since(settings.generation, "3.0.0.beta"):
            if given:
                repair = f"Remove it: {plugin} is turned on in plugin_params alone."
                yield warning(here, "ignored-switch", f"{plugin} in plugin_params", value, repair)
        elif plugin in names and value is False:
            expected = f"true, since plugin_params names {plugin}"
            repair = f"Add {switch}: true, which releases before 3.0 need as well."
            yield warning(here, "plugin-switch", expected, value if given else NOTHING, repair)


RULES: tuple[Rule, ...] = (plugins,)
