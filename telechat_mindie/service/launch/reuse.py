"""A conf/config.json that was rendered before: where it lies, and how `launch` starts from it as it stands."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from telechat_mindie.errors import ConfigError
from telechat_mindie.service import schema
from telechat_mindie.service.check.home_file import CONFIG
from telechat_mindie.service.check.service_file import device_rows
from telechat_mindie.service.explain import explain
from telechat_mindie.service.options import ModelFacts, ServiceOptions
from telechat_mindie.service.render import RenderedConfig
from telechat_mindie.service.schema.settings import BACKEND, DEPLOY, SCHEDULE, model_location
from telechat_mindie.service.schema.violations import Location, show, typed_at

_SETTLED: tuple[tuple[Location, frozenset[str]], ...] = tuple(
    (location, frozenset(options))
    for location, options in (
        (model_location(0, "modelName"), ()),
        (model_location(0, "npuMemSize"), ("device_mem_gb", "reserve_gb")),
        ((*SCHEDULE, "maxBatchSize"), ("device_mem_gb", "reserve_gb")),
        ((*SCHEDULE, "maxPrefillBatchSize"), ("device_mem_gb", "reserve_gb")),
        ((*SCHEDULE, "maxPrefillTokens"), ("max_seq_len",)),
        ((*SCHEDULE, "maxIterTimes"), ("max_seq_len",)),
    )
)
"""Values that would be derived again, and the options of this launch that mean just that."""


def find_usual(facts: ModelFacts, mindie_home: Path | None) -> tuple[Path, dict[str, Any]] | None:
    """The first config at a usual place that was rendered for this model directory, and its content.

    They are the current folder, where docs/deploy.md has `service-config` write it, and MindIE's home.
    """
    for folder in (Path(), *filter(None, [mindie_home])):
        path = folder / CONFIG
        with contextlib.suppress(ConfigError, OSError):
            if path.is_file() and is_for(config := schema.load(path), facts):
                return path, config
    return None


def is_for(config: Mapping[str, Any], facts: ModelFacts) -> bool:
    """Whether it serves this model directory, or one of its name and tp at another place, as on another machine."""
    weights = typed_at(config, model_location(0, "modelWeightPath"), str) or ""
    if typed_at(config, model_location(0, "backendType"), str) != facts.backend:
        return False
    with contextlib.suppress(OSError, ValueError):
        if Path(weights).samefile(facts.model_path):
            return True
    same_tp = typed_at(config, model_location(0, "worldSize")) in (facts.tp, *facts.allowed_tp)
    return same_tp and Path(weights).name == Path(facts.model_path).name


def as_it_stands(
    template: Path, config: Mapping[str, Any], options: ServiceOptions, named: Collection[str]
) -> ServiceOptions:
    """The options that start from `template` and keep its values, but for what the user named for this launch.

    What follows from the model directory (worldSize, cacheBlockSize, modelWeightPath) is derived all the same.

    Args:
        template: a conf/config.json.
        config: its content.
        options: of this launch.
        named: the fields of `options` that the user gave.
    """
    kept = {
        location: value
        for location, released in _SETTLED
        if not released & set(named) and (value := _scalar(config, location)) is not None
    }
    lengths = {} if "max_seq_len" in named else _lengths(config, named)
    devices = {} if {"devices", "instances"} & set(named) else _devices(config)
    overrides = (f"{_path(location)}={_text(value)}" for location, value in kept.items())
    return replace(options, template=template, **lengths, **devices, overrides=(*overrides, *options.overrides))


def changes(rendered: RenderedConfig) -> list[str]:
    """The values that differ from the file it was rendered over: `ServerConfig.port = 1035`."""
    return [f"{row.path.removeprefix('$.')} = {show(row.value)}" for row in explain(rendered) if row.changed]


def _lengths(config: Mapping[str, Any], named: Collection[str]) -> dict[str, Any]:
    found = {"max_seq_len": typed_at(config, (*DEPLOY, "maxSeqLen"))}
    if "max_input_len" not in named:
        found["max_input_len"] = typed_at(config, (*DEPLOY, "maxInputTokenLen"))
    return found


def _devices(config: Mapping[str, Any]) -> dict[str, Any]:
    rows = device_rows(config)
    if not rows:
        return {}
    listed = ",".join(str(device) for row in rows for device in row)
    return {"devices": listed or None, "instances": typed_at(config, (*BACKEND, "modelInstanceNumber")) or len(rows)}


def _scalar(config: Mapping[str, Any], location: Location) -> int | str | None:
    value: int | str | None = typed_at(config, location)
    return typed_at(config, location, str) if value is None else value


def _path(location: Location) -> str:
    return ".".join(step for step in location if isinstance(step, str))


def _text(value: int | str) -> str:
    return value if isinstance(value, str) else json.dumps(value)
