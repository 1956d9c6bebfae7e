"""MindIE's plugin_params: which speculative and caching features will drive the runner."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from telechat_mindie.errors import InputError

MAX_LENGTH = 1024
PLUGINS = ("la", "memory_decoding", "prefix_cache", "splitfuse")
"""What this runner's forward can serve. MindIE's `mtp` needs layers that TeleChat2 does not have."""

_LEAST = {"la": {"level": 3, "window": 1, "guess_set_size": 1}, "memory_decoding": {"decoding_length": 1}}


def parse_plugin_params(text: str | None) -> Mapping[str, Any]:
    """The parsed JSON; empty where no plugin is named.

    The keys and limits are those of MindIE-LLM v3.0.0.beta.2 (text_generator/plugins/plugin_utils.py).

    Raises:
        InputError: not a short JSON object, an unknown plugin, or a plugin's own setting missing or out of range.
    """
    if text is None or text == "":
        return {}
    where = "plugin_params"
    if not isinstance(text, str) or len(text) > MAX_LENGTH:
        raise InputError("must be a string", where=where, expected=f"at most {MAX_LENGTH} characters of JSON")
    try:
        params = json.loads(text)
    except (ValueError, RecursionError):
        raise InputError("is not valid JSON", where=where, found=text[:80]) from None
    if not isinstance(params, dict):
        raise InputError("holds no JSON object", where=where, found=text[:80])
    kinds = params.get("plugin_type")
    if kinds is None:
        return {}
    if not isinstance(kinds, str):
        raise InputError("must be a string", where=f"{where}: plugin_type", found=kinds)
    for kind in kinds.split(","):
        if kind.strip() not in PLUGINS:
            raise InputError(
                "is not supported", where=f"{where}: plugin_type", expected=" or ".join(PLUGINS), found=kind.strip()
            )
        for key, least in _LEAST.get(kind.strip(), {}).items():
            value = params.get(key)
            if type(value) is not int or value < least:
                raise InputError(
                    f"{kind.strip()} needs it",
                    where=f"{where}: {key}",
                    expected=f"an integer from {least}",
                    found=value,
                )
    return params
