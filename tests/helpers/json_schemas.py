"""What commands print with --json against its published schema, docs/json/NAME.schema.json."""

from __future__ import annotations

import json
from functools import cache
from typing import Any, TypeVar

import jsonschema_rs

from helpers import ROOT

FOLDER = ROOT / "docs" / "json"

Data = TypeVar("Data")


def checked(name: str, data: Data) -> Data:
    """`data`, which must be what the schema says and nothing beyond it: a key that is new has to be written down."""
    faults = [
        f"{'/'.join(map(str, fault.instance_path))}: {fault.message}" for fault in _strict(name).iter_errors(data)
    ]
    assert not faults, f"{name}: {faults}"
    return data


@cache
def _strict(name: str) -> jsonschema_rs.Validator:
    schema = json.loads((FOLDER / f"{name}.schema.json").read_text(encoding="utf-8"))
    return jsonschema_rs.validator_for(_closed(schema))


def _closed(schema: Any) -> Any:
    """The schema with every object closed that lists its keys: users' programs are told to pass over new ones."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    return closed | {"additionalProperties": False} if isinstance(schema.get("properties"), dict) else closed
