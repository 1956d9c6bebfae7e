"""How answers are drawn, as a user of the chat names and changes it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from telechat_mindie.client.dialects import Sampling
from telechat_mindie.errors import InputError

SETTINGS: dict[str, tuple[str, type[int] | type[float]]] = {
    # name, as the command's options have it: field of Sampling, type
    "max_new_tokens": ("max_tokens", int),
    "temperature": ("temperature", float),
    "top_k": ("top_k", int),
    "top_p": ("top_p", float),
    "repetition_penalty": ("repetition_penalty", float),
    "seed": ("seed", int),
}


def described(sampling: Sampling) -> list[tuple[str, str]]:
    """Each setting and its value."""
    found = {name: getattr(sampling, field) for name, (field, _) in SETTINGS.items()}
    return [(name, "as the model has it" if value is None else str(value)) for name, value in found.items()]


def changed(sampling: Sampling, name: str, text: str) -> Sampling:
    """`sampling` with one setting from its text; an empty one is for the model's own.

    Raises:
        InputError: no such setting, or no number. Whether it is in range is for who answers.
    """
    if name not in SETTINGS:
        raise InputError("is no setting", where=name, expected=" or ".join(SETTINGS))
    field, kind = SETTINGS[name]
    value: dict[str, Any] = {field: _number(name, text, kind) if text else None}
    return dataclasses.replace(sampling, **value)


def _number(name: str, text: str, kind: type[int] | type[float]) -> int | float:
    try:
        value = kind(text)
        if math.isfinite(value):
            return value
    except (ValueError, OverflowError):
        pass
    raise InputError("is no whole number" if kind is int else "is no number", where=name, found=text)
