"""MindIE's plugin_params: which speculative and caching features will drive the runner.

`plugins/` is mindie_llm/text_generator/plugins/ of MindIE-LLM v3.0.0.beta.2.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from telechat_mindie.errors import InputError

MAX_LENGTH = 1024  # plugins/plugin_utils.py:60, 110

PARAMETERS: dict[str, dict[str, tuple[int, int]]] = {
    "la": {"level": (3, 16), "window": (1, 16), "guess_set_size": (1, 16)},  # plugins/la/decoding_policy.py:307-349
    "memory_decoding": {"decoding_length": (1, 16)},  # plugins/memory_decoding/memory_decoding_plugin.py:34-40
    "mtp": {"num_speculative_tokens": (0, 5)},  # plugins/plugin_utils.py:50-55
    "splitfuse": {},
    "prefix_cache": {},
}
"""Each plugin with the parameters it must have (plugins/plugin_utils.py:68-89) and their ranges."""

SERVED = tuple(name for name in PARAMETERS if name != "mtp")
"""What this runner's forward can serve. MindIE's `mtp` needs layers that TeleChat2 does not have."""

_WHERE = "plugin_params"


def read_plugin_params(text: str) -> dict[str, Any]:
    """The JSON object; whether there are such plugins is not asked yet.

    Raises:
        InputError: not a short JSON object, or a plugin_type that is no string.
    """
    if not isinstance(text, str) or len(text) > MAX_LENGTH:
        raise InputError("must be a string", where=_WHERE, expected=f"at most {MAX_LENGTH} characters of JSON")
    try:
        params = json.loads(text)
    except (ValueError, RecursionError):
        raise InputError("is not valid JSON", where=_WHERE, found=text[:80]) from None
    if not isinstance(params, dict):
        raise InputError("holds no JSON object", where=_WHERE, found=text[:80])
    kinds = params.get("plugin_type")
    if kinds is not None and not isinstance(kinds, str):
        raise InputError("must be a string", where=f"{_WHERE}: plugin_type", found=kinds)
    return params


def plugin_names(params: Mapping[str, Any]) -> tuple[str, ...]:
    """The plugins that parsed plugin_params turn on."""
    kinds = params.get("plugin_type") or ""
    return tuple(name for name in re.split(r",\s*", kinds) if name)  # plugins/plugin_utils.py:120-121


def parse_plugin_params(text: str | None) -> Mapping[str, Any]:
    """The parsed JSON; empty where no plugin is named.

    Raises:
        InputError: as `read_plugin_params`; an unknown plugin; a plugin's own setting missing or too small. MindIE
            itself lowers what is too large.
    """
    if text is None or text == "":
        return {}
    params = read_plugin_params(text)
    names = plugin_names(params)
    for name in names:
        if name not in SERVED:
            where = f"{_WHERE}: plugin_type"
            raise InputError("is not supported", where=where, expected=" or ".join(SERVED), found=name)
        for key, (least, _) in PARAMETERS[name].items():
            value = params.get(key)
            if type(value) is not int or value < least:
                where = f"{_WHERE}: {key}"
                raise InputError(f"{name} needs it", where=where, expected=f"an integer from {least}", found=value)
    return params if names else {}
