"""`--set ScheduleConfig.maxBatchSize=64`: the value in the file that is meant, and its JSON value."""

from __future__ import annotations

import difflib
import json
from typing import Any, Literal, get_origin

from pydantic.fields import FieldInfo

from telechat_mindie.errors import InputError
from telechat_mindie.reading import text_depth
from telechat_mindie.service import schema
from telechat_mindie.service.schema.files import MAX_DEPTH
from telechat_mindie.service.schema.service import model_of
from telechat_mindie.service.schema.settings import model_location
from telechat_mindie.service.schema.structure import check_structure, walk_fields
from telechat_mindie.service.schema.violations import Location

MODEL_ENTRY = model_location(0)


def parse_override(text: str, generation: str) -> tuple[Location, Any]:
    """The location and the value of a `PATH=VALUE`.

    PATH is the end of a field's path, as long as it takes to be the only one: `maxBatchSize`,
    `ScheduleConfig.maxBatchSize`, `BackendConfig.ScheduleConfig.maxBatchSize`. ModelConfig stands for its first
    entry, which also takes keys that MindIE only hands on to the worker. VALUE is JSON; for a field of text, and for
    plugin_params, it is the text itself.

    Raises:
        InputError: there is no such field, or several, or the value is not one that the field takes.
    """
    path, separator, value = text.partition("=")
    steps = tuple(path.strip().removeprefix("$.").split("."))
    if not separator or not all(steps):
        raise InputError("is not PATH=VALUE", where=f"--set {text}", expected="ScheduleConfig.maxBatchSize=64")
    location, field = _find(steps, generation, text)
    parsed = _value(value, field)
    _check(location, parsed, generation, text)
    return location, parsed


def set_value(config: dict[str, Any], location: Location, value: Any) -> None:
    """Put a value into a config, with the objects on the way to it."""
    node: Any = config
    for step in location[:-1]:
        node = node[step] if isinstance(step, int) else node.setdefault(step, {})
    node[location[-1]] = value


def _find(steps: tuple[str, ...], generation: str, text: str) -> tuple[Location, FieldInfo | None]:
    fields = list(walk_fields(model_of(generation)))
    found = [
        (location, field)
        for location, field in fields
        if tuple(step for step in location if isinstance(step, str))[-len(steps) :] == steps
        and "LoraModules" not in location[:-1]  # a list to be given as a whole: the default has no entry
    ]
    if len(found) == 1:
        return found[0]
    if not found and steps[-2:-1] == ("ModelConfig",):
        return (*MODEL_ENTRY, steps[-1]), None
    if found:
        raise InputError(
            "means several fields",
            where=f"--set {text}",
            found=", ".join(schema.json_path(location) for location, _ in found),
            advice="Write more of the path.",
        )
    similar = difflib.get_close_matches(steps[-1], {str(location[-1]) for location, _ in fields}, n=3)
    listed = "docs/mindie-conf.md tells where they are listed."
    raise InputError(
        f"is no field of MindIE {generation}",
        where=f"--set {text}",
        advice=f"Did you mean {' or '.join(similar)}?" if similar else listed,
    )


def _value(text: str, field: FieldInfo | None) -> Any:
    if field is not None and _is_text(field):
        return text
    if (depth := text_depth(text, MAX_DEPTH)) > MAX_DEPTH:
        raise InputError("is nested too deeply", where="--set", expected=f"at most {MAX_DEPTH} levels", found=depth)
    try:
        return json.loads(text)
    except ValueError:
        return text


def _is_text(field: FieldInfo) -> bool:
    kind: Any = field.annotation
    if get_origin(kind) is Literal:
        kind = type(field.annotation.__args__[0])  # type: ignore[union-attr]
    return kind is str or field.default == ""  # plugin_params: an object or text, "" by default


def _check(location: Location, value: Any, generation: str, text: str) -> None:
    config = schema.default_config(generation)
    set_value(config, location, value)
    for place, violations in check_structure(generation, config, schema.default_config(generation)).items():
        errors = [violation for violation in violations if violation.severity == "error"]
        if errors and place[: len(location)] == location:
            raise InputError(
                "is not a value that MindIE takes",
                where=f"--set {text}",
                expected=errors[0].expected,
                found=errors[0].found,
            )
