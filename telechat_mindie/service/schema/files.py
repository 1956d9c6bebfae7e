"""conf/config.json as a file: read with care, its default, and its JSON Schema for editors."""

from __future__ import annotations

import json
import os
import stat
from importlib import resources
from pathlib import Path
from typing import Any

from telechat_mindie.errors import ConfigError
from telechat_mindie.service.schema.service import model_of

MAX_BYTES = 10 * 1024 * 1024  # MindIE-LLM v3.0.0.beta.2 src/include/utils/file_utils.h:90, doc:6
MAX_DEPTH = 32  # ours: a file of MindIE needs 7, and Python's parser recurses


def default_config(generation: str) -> dict[str, Any]:
    """The conf/config.json that a generation ships, in its key order, as far as it is known.

    3.0.0.beta: MindIE-LLM v3.0.0.beta.2 src/server/conf/config.json. 2.0: the file that gpustack/gpustack embeds.
    1.0: the file of the MindSpore project's docs r2.6.0 (usage/mindie_deployment.md), the values it changed for its
    example set back to those that 2.0 ships.

    Raises:
        InputError: the generation is unknown.
    """
    model_of(generation)
    text = resources.files(__package__).joinpath(f"conf_{generation}.json").read_text(encoding="utf-8")
    config: dict[str, Any] = json.loads(text)
    return config


def json_schema(generation: str) -> dict[str, Any]:
    """A JSON Schema (draft 2020-12) of the file, for completion and checks in an editor.

    It holds types, ranges and names; rules between fields are left to `validate`.

    Raises:
        InputError: the generation is unknown.
    """
    schema = model_of(generation).model_json_schema()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": f"conf/config.json of MindIE {generation}",
    }


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a conf/config.json: an object, with each key once.

    Raises:
        ConfigError: the file is absent, not regular, empty or over 10 MB, not UTF-8, not JSON, too deeply nested, holds
            a key twice, or holds something other than an object.
    """
    return parse(read_text(path), where=path)


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a conf/config.json, its line ends as they are.

    Raises:
        ConfigError: as `load`, up to "not UTF-8".
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise ConfigError("file is missing", where=path, advice="Give the path of a conf/config.json.") from None
    except OSError as failure:
        raise ConfigError(f"cannot be opened: {failure.strerror}", where=path) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ConfigError("is not a regular file", where=path)
    with os.fdopen(descriptor, "rb") as file:
        content = file.read(MAX_BYTES + 1)
    if not 0 < len(content) <= MAX_BYTES:
        raise ConfigError(
            "has a size that MindIE refuses",
            where=path,
            expected=f"1 to {MAX_BYTES} bytes",
            found="0 bytes" if not content else "more",
        )
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as failure:
        raise ConfigError(
            "is not UTF-8", where=path, found=f"byte 0x{content[failure.start]:02x} at {failure.start}"
        ) from None


def parse(text: str, where: object = Path("conf/config.json")) -> dict[str, Any]:
    """Parse the text of a conf/config.json.

    Raises:
        ConfigError: as `load`, from "not JSON" on.
    """
    text = text.removeprefix("\ufeff")  # nlohmann::json skips a byte order mark too
    if (depth := _depth(text)) > MAX_DEPTH:
        raise ConfigError("is nested too deeply", where=where, expected=f"at most {MAX_DEPTH} levels", found=depth)
    try:
        data = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except json.JSONDecodeError as failure:
        raise ConfigError(
            f"is not JSON: {failure.msg}",
            where=f"{where}:{failure.lineno}:{failure.colno}",
            advice="JSON has no comments, no single quotes and no comma after the last item.",
        ) from None
    except ValueError as failure:
        raise ConfigError(str(failure), where=where) from None
    if not isinstance(data, dict):
        raise ConfigError("holds no JSON object", where=where, expected="{...}", found=type(data).__name__)
    return data


def _depth(text: str) -> int:
    """The deepest nesting of brackets outside of strings."""
    depth = deepest = 0
    in_string = escaped = False
    for character in text:
        if in_string:
            if escaped:
                escaped = False
            elif character == "\\":
                escaped = True
            elif character == '"':
                in_string = False
        elif character == '"':
            in_string = True
        elif character in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in "]}":
            depth -= 1
    return deepest


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f'holds the key "{twice}" twice in one object, of which MindIE would take the last')
    return data


def _refuse_constant(name: str) -> None:
    raise ValueError(f"holds {name}, which is not JSON")
