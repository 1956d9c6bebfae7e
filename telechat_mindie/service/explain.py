"""`service-config --explain`: every value of the file with where it came from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from telechat_mindie.service.derive import Origin
from telechat_mindie.service.render import RenderedConfig
from telechat_mindie.service.schema import json_path
from telechat_mindie.service.schema.service import model_of
from telechat_mindie.service.schema.structure import walk_fields
from telechat_mindie.service.schema.violations import Location


@dataclass(frozen=True, slots=True)
class Explained:
    """One value of the file.

    Attributes:
        path: its JSON path.
        value: the value; lists are whole values, objects and lists of objects are entered.
        origin: where it came from.
        reason: how it was derived, or what the field means.
        changed: whether it differs from the file that was rendered over.
    """

    path: str
    value: Any
    origin: Origin
    reason: str
    changed: bool


def explain(rendered: RenderedConfig) -> tuple[Explained, ...]:
    """Every value of a rendered file, in the file's order."""
    fields = walk_fields(model_of(rendered.options.generation))
    untouched: Origin = "MindIE default" if rendered.options.template is None else "template"
    accounts: dict[Location, tuple[Origin, str]] = {
        location: (untouched, field.description or "") for location, field in fields
    }
    accounts.update({entry.location: (entry.origin, entry.reason) for entry in rendered.derived})
    before = dict(_leaves(rendered.base, ()))
    return tuple(
        Explained(
            json_path(location),
            value,
            *accounts.get(location, (untouched, "")),
            changed=location not in before or before[location] != value,
        )
        for location, value in _leaves(rendered.config, ())
    )


def _leaves(value: Any, location: Location) -> Iterator[tuple[Location, Any]]:
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from _leaves(item, (*location, name))
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for index, item in enumerate(value):
            yield from _leaves(item, (*location, index))
    else:
        yield location, value
