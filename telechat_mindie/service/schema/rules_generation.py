"""Rules that tell the generations of MindIE apart: older layouts, keys that a release misses, and what is known."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

from telechat_mindie.mindie import GENERATIONS, is_since
from telechat_mindie.service.schema.files import default_config
from telechat_mindie.service.schema.service import model_of
from telechat_mindie.service.schema.settings import SERVER, Rule, Settings, model_location
from telechat_mindie.service.schema.structure import walk_fields
from telechat_mindie.service.schema.violations import (
    NOTHING,
    Location,
    Violation,
    Words,
    error,
    json_path,
    show,
    value_at,
    warning,
)

OLDER_OBJECTS = ("OtherParam", "WorkFlowParam", "ModelDeployParam", "ScheduleParam")
"""The top of conf/config.json in 1.0.RC1 and 1.0.RC2, as public deployment scripts of that time write it."""

EXPECTED: dict[Location, str] = {
    (*SERVER, "tokenTimeout"): "2.1",
    (*SERVER, "e2eTimeout"): "2.1",
    (*SERVER, "distDPServerEnabled"): "2.1",
    ("EnableDynamicAdjustTimeoutConfig",): "2.3",
}
"""Keys that a file may lack by its types, and since when MindIE misses them.

2.0.RC1's file has none of the first three. The last is looked up each second, and its absence written to the log each
time (src/config_manager/config_dynamic_handler.cpp:105-128; v3.0.0 says so once).
"""

FROM_CODE_ALONE = frozenset(
    {
        *("inter-node-tls", "layerwise", "ms-npu-mem", "ms-parallel", "multi-node-instances", "parallel-size"),
        *("partial-prefills", "path", "planes", "plugin-parameter", "port-clash", "splitfuse-chunk"),
    }
)
"""Rules that only the C++ of 3.0.0.beta tells: no document of an older generation has them."""


DOCUMENTED = frozenset(
    {
        "$.BackendConfig.ModelDeployConfig.speculationGamma",
        "$.BackendConfig.ModelDeployConfig.ModelConfig.plugin_params",
    }
)
"""Fields that no generation ships and all document."""


def older_layout(data: Mapping[str, Any]) -> Violation | None:
    """The one thing to say of a file of 1.0.RC1 or 1.0.RC2, whose every key is elsewhere now."""
    found = [name for name in OLDER_OBJECTS if name in data]
    if not found or "ServerConfig" in data or "BackendConfig" in data:
        return None
    repair = "Render a new file: telechat-mindie service-config MODEL_PATH. Values cannot be taken over key by key."
    expected = "ServerConfig and BackendConfig, as every MindIE since 1.0.RC3 has them"
    return error((), "layout", expected, Words(f"{', '.join(found)}: a file of MindIE 1.0.RC1 or 1.0.RC2"), repair)


def missing_keys(generation: str, data: Mapping[str, Any]) -> Iterator[tuple[Location, Any]]:
    """The keys of EXPECTED that a file lacks and its types do not ask for, with what MindIE ships for them."""
    for location, field in walk_fields(model_of(generation)):
        since = EXPECTED.get(location)
        if since is None or not is_since(generation, since) or field.is_required():
            continue
        owner = value_at(data, location[:-1])
        if isinstance(owner, Mapping) and location[-1] not in owner:
            yield location, field.default


def missing(settings: Settings) -> Iterator[Violation]:
    """`missing_keys`, told."""
    for location, value in missing_keys(settings.generation, settings.raw):
        expected = f"a value, as MindIE ships one since {EXPECTED[location]}"
        yield warning(location, "missing-key", expected, NOTHING, f'Add "{location[-1]}": {show(value)}.')


def ms_backend(settings: Settings) -> Iterator[Violation]:
    """The C++ takes ms in every release; the workers are another matter (v3.0.0
    mindie_llm/text_generator/adapter/__init__.py:17-37)."""
    if GENERATIONS[settings.generation].ms_backend:
        return
    gone = GENERATIONS[settings.generation].releases
    repair = (
        f"MindIE {gone} have no MindSpore backend: the daemon takes ms, then every worker ends with "
        "NotImplementedError. Build a directory for theirs: telechat-mindie build MODEL_PATH --checkpoint DIR "
        "--backend atb; or serve this one with MindIE 3.0.0.beta.2 or older, or without MindIE: telechat-mindie serve "
        "MODEL_PATH."
    )
    for index, entry in enumerate(settings.models):
        if entry.get("backendType") == "ms":
            yield error(model_location(index, "backendType"), "ms-backend", "atb or torch", "ms", repair)


def as_far_as_known(violation: Violation, generation: str) -> Violation:
    """An error that only another generation's C++ tells, as the warning that it is for one with a closed source."""
    if violation.severity == "error" and (
        violation.rule in FROM_CODE_ALONE or _field(violation.path) not in _known_fields(generation)
    ):
        known = f"{violation.message}, as in MindIE 3.0.0.beta; of {generation} it is not known"
        return replace(violation, severity="warning", message=known)
    return violation


@cache
def _known_fields(generation: str) -> frozenset[str]:
    """The fields of a generation's own file, and the objects around them."""
    places: list[tuple[Location, Any]] = [((), default_config(GENERATIONS[generation].known or generation))]
    for location, value in places:  # which grows
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        places.extend(((*location, step), item) for step, item in items)
    return frozenset(_field(json_path(location)) for location, _ in places) | DOCUMENTED


def _field(path: str) -> str:
    """A JSON path without the numbers in its lists."""
    return re.sub(r"\[\d+\]", "", path)


RULES: tuple[Rule, ...] = (missing, ms_backend)
