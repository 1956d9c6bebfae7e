"""Checks that each value has its type and range: pydantic's errors, told in MindIE's terms."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from telechat_mindie.service.schema.base import Forgiven, MindieObject
from telechat_mindie.service.schema.service import MODELS
from telechat_mindie.service.schema.violations import (
    NOTHING,
    Location,
    Violation,
    error,
    json_path,
    show,
    value_at,
    warning,
)

TYPE_NAMES = {
    "int_type": "an integer",
    "bool_type": "true or false",
    "string_type": "a string",
    "list_type": "a list",
    "model_type": "an object",
}
"""pydantic's name of a type error: the JSON type that belongs there."""

RULES = {
    "greater_than_equal": "range",
    "less_than_equal": "range",
    "literal_error": "choice",
    "string_pattern_mismatch": "pattern",
    "string_too_long": "length",
}
"""pydantic's name of an error: ours. Errors of our own validators carry our name already."""


def child_model(field: FieldInfo) -> type[MindieObject] | None:
    """The model of the object, or of each object of the list, that a field holds; None for anything else."""
    kind: Any = field.annotation
    if get_origin(kind) is list:
        (kind,) = get_args(kind)
    return kind if isinstance(kind, type) and issubclass(kind, MindieObject) else None


def object_at(root: type[MindieObject], location: Location) -> type[MindieObject] | None:
    """The model of the object at a location, None where there is none."""
    model: type[MindieObject] | None = root
    for step in location:
        if isinstance(step, int):
            continue
        field = model.model_fields.get(step) if model else None
        model = child_model(field) if field else None
    return model


def walk_fields(root: type[MindieObject], location: Location = ()) -> Iterator[tuple[Location, FieldInfo]]:
    """Every field of the file with its location; a list of objects is entered as its item 0."""
    for name, field in root.model_fields.items():
        here = (*location, name)
        yield here, field
        if child := child_model(field):
            yield from walk_fields(child, (*here, 0) if get_origin(field.annotation) is list else here)


def check_structure(
    generation: str, data: Mapping[str, Any], shipped: Mapping[str, Any]
) -> dict[Location, list[Violation]]:
    """Every value of the wrong type, form or range, every missing and every unknown key.

    Args:
        generation: a key of `service.MODELS`.
        data: the file's content.
        shipped: the content of the file that MindIE ships, from which repairs of missing keys are taken.

    Returns:
        The violations by location.
    """
    root = MODELS[generation]
    found: dict[Location, list[Violation]] = {}
    try:
        root.model_validate(dict(data))
    except ValidationError as failure:
        for details in failure.errors(include_url=False):
            location: Location = details["loc"]
            if details["type"] == "missing":
                violation = _missing(location, shipped)
            elif details["type"] == "extra_forbidden":
                violation = _unknown(generation, location, details["input"])
            else:
                violation = _wrong(root, details)
            found.setdefault(location, []).append(violation)
    return found


def _missing(location: Location, shipped: Mapping[str, Any]) -> Violation:
    value = value_at(shipped, tuple(0 if isinstance(step, int) else step for step in location), {})
    ship = f'Add "{location[-1]}": {show(value)}, which is what MindIE ships.'
    return error(location, "compulsory", "a value", NOTHING, "Add it." if isinstance(value, dict) else ship)


def _wrong(root: type[MindieObject], details: ErrorDetails) -> Violation:
    location, kind, value = details["loc"], details["type"], details["input"]
    owner = object_at(root, location[:-1])
    field = owner.model_fields.get(str(location[-1])) if owner else None
    metadata = list(field.metadata) if field else []
    report = warning if any(isinstance(mark, Forgiven) for mark in metadata) else error
    rule = RULES.get(kind, kind)
    if kind in TYPE_NAMES or (kind == "literal_error" and not isinstance(value, str)):
        rule, expected = "type", TYPE_NAMES.get(kind, "a string")
        repair = f"Write {expected}."
        if expected == "an integer" and isinstance(value, str) and value.strip().lstrip("-").isdigit():
            repair = f"Write {value.strip()} without quotes."
        elif expected == "true or false" and isinstance(value, str) and value.lower() in ("true", "false"):
            repair = f"Write {value.lower()} without quotes."
    else:
        expected = _expected(rule, metadata, details["msg"], details.get("ctx", {}))
        repair = f"Set it to {expected}."
    return report(location, rule, expected, value, repair)


def _expected(rule: str, metadata: list[Any], message: str, context: Mapping[str, Any]) -> str:
    bounds = {name: getattr(mark, name) for mark in metadata for name in ("ge", "le") if hasattr(mark, name)}
    if rule == "range" and len(bounds) == 2:
        return f"{bounds['ge']} to {bounds['le']}"
    if rule == "range" and "ge" in context:  # an item of a list, whose bounds are not the field's
        return f"{context['ge']} or more"
    if rule == "pattern":
        return f"text that matches {context['pattern']}"
    if rule == "length":
        return f"at most {context['max_length']} characters"
    # Messages of our own validators are the expectation itself; pydantic's begin with these words.
    return message.removeprefix("Input should be ").replace("'", '"')


def _unknown(generation: str, location: Location, value: Any) -> Violation:
    name, root = str(location[-1]), MODELS[generation]
    owner = object_at(root, location[:-1])
    readers = [
        other
        for other, model in MODELS.items()
        if (same := object_at(model, location[:-1])) is not None and name in same.model_fields
    ]
    elsewhere = [json_path(place) for place, _ in walk_fields(root) if place[-1] == name]
    similar = difflib.get_close_matches(name, owner.model_fields if owner else (), n=1, cutoff=0.8)
    if readers:
        listed = ", ".join(readers[:-1]) + " and " if readers[1:] else ""
        repair = f"Remove it: only MindIE {listed}{readers[-1]} would read it."
    elif elsewhere:
        repair = f"Move it to {elsewhere[0]}."
    elif similar:
        repair = f'Write "{similar[0]}", if that was meant.'
    elif location[:-2] == ("BackendConfig", "ModelDeployConfig", "ModelConfig"):
        repair = "Remove it, unless a worker of yours reads it: MindIE hands it on as a string."
    else:
        repair = "Remove it, unless the installed MindIE is newer than this schema and reads it."
    return warning(location, "unknown-key", "a key that MindIE reads", value, repair)
