"""conf/config.json as a file: read with care, its default, and its JSON Schema for editors."""

from __future__ import annotations

import json
import os
from importlib import resources
from typing import Any

from telechat_mindie import reading
from telechat_mindie.errors import ConfigError
from telechat_mindie.mindie import generation_named
from telechat_mindie.service.schema.service import model_of

MAX_BYTES = 10 * 1024 * 1024  # MindIE-LLM v3.0.0.beta.2 src/include/utils/file_utils.h:90, doc:6
MAX_DEPTH = 32  # ours: a file of MindIE needs 7


def default_config(generation: str) -> dict[str, Any]:
    """The conf/config.json that a generation ships, in its key order, as far as it is known.

    3.0: MindIE-LLM v3.0.0 src/server/conf/config.json. 3.0.0.beta: the same of v3.0.0.beta.2. 2.0: the file that
    gpustack/gpustack embeds, with what 2.0.RC1 lacks. 2.3, and 2.1 and 2.2 with it: that of 2.0 with what MindIE 2.3's
    parameter reference (hiascend.com document/detail/en/mindie/230/LLMframe/llmdev/mindie_service0285.html) adds, in
    the order of 3.0.0.beta. 1.0: the file of the MindSpore project's docs r2.6.0 (usage/mindie_deployment.md), the
    values it changed for its example set back to those that 2.0 ships.

    Raises:
        InputError: the generation is unknown.
    """
    shipped = generation_named(generation).shipped
    text = resources.files(__package__).joinpath(f"conf_{shipped}.json").read_text(encoding="utf-8")
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
        ConfigError: the file is absent, not regular or over 10 MB, not UTF-8, not JSON (half of a surrogate pair
            included), too deeply nested, holds a key twice (MindIE would take the last), or holds something other than
            an object.
    """
    return parse(read_text(path), where=path)


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a conf/config.json, its line ends as they are.

    Raises:
        ConfigError: as `load`, up to "not UTF-8".
    """
    return reading.read_text(path, MAX_BYTES)


def parse(text: str, where: object = "conf/config.json") -> dict[str, Any]:
    """Parse the text of a conf/config.json.

    Raises:
        ConfigError: as `load`, from "not JSON" on.
    """
    data = reading.parse_json(text, where, MAX_DEPTH)
    try:
        json.dumps(data, ensure_ascii=False).encode()
    except UnicodeEncodeError as failure:
        half = failure.object[failure.start].encode("unicode_escape").decode()
        raise ConfigError(
            f"is not valid JSON: {half} is half of a character",
            where=where,
            advice="MindIE's parser refuses it; Python's does not. Write the character itself.",
        ) from None
    return data
