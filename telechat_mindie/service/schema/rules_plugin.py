"""Rules of plugin_params: the plugins named in it, their parameters and their companions. Sources as in `base`.

`plugins/` is mindie_llm/text_generator/plugins/, `feature/` is docs/zh/user_guide/feature/.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from telechat_mindie.service.schema.settings import SCHEDULE, SERVER, Rule, Settings, model_location
from telechat_mindie.service.schema.violations import Location, Violation, error, show, warning

WORKER_CHARACTERS = 1024  # plugins/plugin_utils.py:60, 110
SCHEDULER_CHARACTERS = 256  # src/include/utils/check_utils.h:20: beyond, the scheduler takes every plugin as off

RANGES: dict[str, dict[str, tuple[int, int]]] = {
    "la": {"level": (3, 16), "window": (1, 16), "guess_set_size": (1, 16)},  # plugins/la/decoding_policy.py:307-349
    "memory_decoding": {"decoding_length": (1, 16)},  # plugins/memory_decoding/memory_decoding_plugin.py:34-40
    "mtp": {"num_speculative_tokens": (0, 5)},  # plugins/plugin_utils.py:50-55
    "splitfuse": {},
    "prefix_cache": {},
}
"""Each plugin with the parameters it must have (plugins/plugin_utils.py:68-89) and their ranges."""

CLAMPED = {"la": (False, True), "memory_decoding": (True, True), "mtp": (False, False)}
"""Whether a value below, or above, the range is replaced by the nearest allowed one; else the worker dies."""

EXCLUSIVE = ("la", "memory_decoding", "mtp", "splitfuse")
"""At most one of these at a time (feature/speculative_decoding.md:30, 35; feature/splitFuse.md:31)."""


@dataclass(frozen=True)
class Plugins:
    """The plugin_params of one ModelConfig entry, parsed."""

    location: Location
    names: tuple[str, ...]
    parameters: Mapping[str, Any]


def parse(location: Location, value: Any) -> Plugins | Violation | None:
    """The plugins in a plugin_params value, what is wrong with it as a whole, or None where it is empty."""

    def broken(expected: str, repair: str) -> Violation:
        return error(location, "plugin-params", expected=expected, found=show(value), repair=repair)

    text = value if isinstance(value, str) else json.dumps(value)  # model_deploy_config.cpp:209-213
    if not text:
        return None
    if len(text) > WORKER_CHARACTERS:
        return broken(f"at most {WORKER_CHARACTERS} characters", "Shorten it.")
    try:
        parameters = json.loads(text)
    except ValueError:
        return broken("JSON", 'Write an object: {"plugin_type": "prefix_cache"}.')
    if not isinstance(parameters, dict) or not isinstance(parameters.get("plugin_type"), str):
        return broken('an object with a string "plugin_type"', "Name the plugins there, or remove plugin_params.")
    names = tuple(name for name in re.split(r",\s*", parameters["plugin_type"]) if name)  # plugin_utils.py:120-121
    return Plugins(location, names, parameters)


def plugins(settings: Settings) -> Iterator[Violation]:
    """Every rule of plugin_params, entry by entry."""
    for index, entry in enumerate(settings.models):
        if entry.get("pluginParams"):
            yield warning(
                model_location(index, "pluginParams"),
                "plugin-params-name",
                expected="the key plugin_params",
                found=show(entry["pluginParams"]),
                repair="Rename it to plugin_params: nothing reads pluginParams.",
            )
        parsed = parse(model_location(index, "plugin_params"), entry.get("plugin_params", ""))
        if isinstance(parsed, Violation):
            yield parsed
        if not isinstance(parsed, Plugins):
            names: tuple[str, ...] = ()
        else:
            names = parsed.names
            yield from _each(parsed)
            yield from _speculation(settings, parsed)
            yield from _together(settings, parsed, entry.get("backendType"))
            raw = entry["plugin_params"]
            size = len(raw if isinstance(raw, str) else json.dumps(raw, separators=(",", ":")))
            if size > SCHEDULER_CHARACTERS and {"splitfuse", "prefix_cache"} & set(names):
                yield warning(
                    parsed.location,
                    "plugin-length",
                    expected=f"at most {SCHEDULER_CHARACTERS} characters",
                    found=f"{size} characters",
                    repair="Shorten it: the scheduler passes over a longer one and leaves the plugins off.",
                )
        yield from _switches(settings, names)


def _each(found: Plugins) -> Iterator[Violation]:
    for name in found.names:
        if name not in RANGES:
            yield error(
                found.location,
                "plugin-type",
                expected=f"one of {', '.join(RANGES)}",
                found=show(name),
                repair="Correct the name, or take it out.",
            )
        for parameter, (low, high) in RANGES.get(name, {}).items():
            value = found.parameters.get(parameter)
            if type(value) is not int or not low <= value <= high:
                clamped = type(value) is int and CLAMPED[name][value > high]
                report = warning if clamped else error
                yield report(
                    found.location,
                    "plugin-parameter",
                    expected=f"{parameter} from {low} to {high} for {name}",
                    found=show(value) if parameter in found.parameters else "nothing",
                    repair=f"Set {parameter} within plugin_params.",
                )


def _speculation(settings: Settings, found: Plugins) -> Iterator[Violation]:
    """Guessed tokens need KV slots: speculationGamma of them (plugins/plugin_utils.py:46-75). MindIE sets it by itself
    for mtp (model_deploy_config.cpp:127-157)."""
    needs: dict[str, Callable[[Mapping[str, Any]], int]] = {
        "la": lambda p: (p["level"] - 1) * (p["window"] + p["guess_set_size"]),
        "memory_decoding": lambda p: p["decoding_length"],
    }
    gamma = settings.deploy.get("speculationGamma", 0)
    for name, need in needs.items():
        numbers = [found.parameters.get(parameter) for parameter in RANGES[name]]
        if name not in found.names or not all(type(number) is int for number in numbers):
            continue
        if (least := need(found.parameters)) > gamma:
            yield error(
                ("BackendConfig", "ModelDeployConfig", "speculationGamma"),
                "speculation-gamma",
                expected=f"at least {least} for {name}",
                found=show(gamma),
                repair=f"Set it to {least}.",
            )


def _together(settings: Settings, found: Plugins, backend: str | None) -> Iterator[Violation]:
    exclusive = [name for name in EXCLUSIVE if name in found.names]
    if len(exclusive) > 1:
        yield error(
            found.location,
            "plugin-conflict",
            expected=f"one of {', '.join(EXCLUSIVE)}",
            found=", ".join(exclusive),
            repair="Choose one of them; prefix_cache goes with each.",
        )
    if "splitfuse" in found.names:
        # src/llm_manager_v2/impl/llm_manager_impl.cpp:547-555
        if settings.schedule.get("templateType") == "Standard":
            yield error(
                (*SCHEDULE, "templateType"),
                "splitfuse-template",
                expected="Mix, since plugin_params names splitfuse",
                found='"Standard"',
                repair="Set templateType to Mix, or take splitfuse out of plugin_params.",
            )
        if settings.schedule.get("splitChunkTokens") == 0:
            yield error(
                (*SCHEDULE, "splitChunkTokens"),
                "splitfuse-chunk",
                expected="1 or more with splitfuse",
                found="0",
                repair="Set the tokens of a chunk, or remove the key for 512.",
            )
    speculative = [name for name in found.names if name in ("la", "memory_decoding")]
    if speculative and (settings.server.get("HealthCheckConfig") or {}).get("npuUsageThreshold"):
        # feature/speculative_decoding.md:34
        yield warning(
            (*SERVER, "HealthCheckConfig", "npuUsageThreshold"),
            "speculation-health",
            expected=f"0 with {speculative[0]}",
            found=show(settings.server["HealthCheckConfig"]["npuUsageThreshold"]),
            repair="Set it to 0: the health check is not supported together with guessed tokens.",
        )
    if backend == "ms" and "mtp" in found.names:
        # mindie_llm/text_generator/plugins has an mtp plugin for ATB only.
        yield warning(
            found.location,
            "ms-mtp",
            expected="la or memory_decoding with backendType ms",
            found="mtp",
            repair="Take mtp out: TeleChat2 has no layers for it.",
        )


def _switches(settings: Settings, names: tuple[str, ...]) -> Iterator[Violation]:
    """The switches in ScheduleConfig that went with a plugin (schedule_config.cpp:142-146, 184-191: ignored now;
    feature/prefix_cache.md:43: needed in older releases)."""
    template = settings.schedule.get("templateType")
    if template == "Mix" and "splitfuse" not in names:
        # feature/splitFuse.md:42 demands it; the C++ starts without, and then mixes no batches.
        yield warning(
            (*SCHEDULE, "templateType"),
            "mix-without-splitfuse",
            expected="Standard, or splitfuse in plugin_params",
            found='"Mix"',
            repair='Set templateType to Standard, or plugin_params to {"plugin_type": "splitfuse"}.',
        )
    for switch, plugin in (("enablePrefixCache", "prefix_cache"), ("enableSplit", "splitfuse")):
        if settings.generation == "3.0.0.beta":
            if settings.given(*SCHEDULE, switch):
                yield warning(
                    (*SCHEDULE, switch),
                    "ignored-switch",
                    expected=f"{plugin} in plugin_params",
                    found=show(settings.schedule.get(switch)),
                    repair=f"Remove it: {plugin} is turned on in plugin_params alone.",
                )
        elif plugin in names and settings.schedule.get(switch) is False:
            yield warning(
                (*SCHEDULE, switch),
                "plugin-switch",
                expected=f"true, since plugin_params names {plugin}",
                found="false" if settings.given(*SCHEDULE, switch) else "nothing",
                repair=f"Add {switch}: true, which releases before 3.0 need as well.",
            )


RULES: tuple[Rule, ...] = (plugins,)
