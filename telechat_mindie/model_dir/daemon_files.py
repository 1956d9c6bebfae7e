"""config.json and generation_config.json as MindIE's daemon itself reads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from telechat_mindie.findings import Finding, error, warning
from telechat_mindie.model_dir.manifest import REBUILD
from telechat_mindie.model_dir.modes import file_status
from telechat_mindie.model_dir.parts import Parts, attempt
from telechat_mindie.reading import depth, read_json
from telechat_mindie.units import UINT32_MAX

MAX_JSON_DEPTH = 10  # MindIE-LLM v3.0.0.beta.2 src/utils/safe_io.cpp:23
TOP_K_LIMIT = 1000
"""maxTopK where generation_config.json names none (src/config_manager/model_deploy_config.cpp): MindIE clamps a
request's top_k to it, and warms up with it."""


def check_config_json(parts: Parts) -> Iterator[Finding]:
    """torch_dtype, model_type and vocab_size: src/config_manager/model_deploy_config.cpp:55-91 of MindIE-LLM
    v3.0.0.beta.2. It starts without them, and then serves every model as float16 without a vocabulary check."""
    data, where = parts.config_json, parts.path / "config.json"
    if data is None:
        return
    for key in ("torch_dtype", "model_type"):
        if not isinstance(data.get(key), str):
            yield error("config-field", where, f"{key} is {data.get(key)!r}, where MindIE reads a text", REBUILD)
    sizes = (data.get("vocab_size"), data.get("padded_vocab_size"))
    if not any(type(size) is int and 0 < size <= UINT32_MAX for size in sizes):
        yield error("config-field", where, "has no vocab_size that MindIE can read", REBUILD)
    yield from check_depth(where, data)


def check_depth(where: Path, data: Mapping[str, Any]) -> Iterator[Finding]:
    """A config.json that MindIE's parser cuts."""
    if (levels := depth(data)) > MAX_JSON_DEPTH:
        # Its parser drops what is deeper (src/utils/safe_io.cpp:40-65); nothing there is of use to it.
        message = f"is nested {levels} deep, and MindIE drops what is deeper than {MAX_JSON_DEPTH}"
        yield warning("config-depth", where, message, "Nothing to do, unless something that MindIE reads is there.")


def check_generation_json(parts: Parts) -> Iterator[Finding]:
    """top_k of generation_config.json is the daemon's cap on every request's top_k."""
    where = parts.path / "generation_config.json"
    problems: list[Finding] = []
    data = None
    if file_status(where) is not None:
        data = attempt(problems, "generation-json", where, lambda: read_json(where))
    yield from problems
    limit = (data or {}).get("top_k", TOP_K_LIMIT)
    if type(limit) is not int:
        yield error("top-k", where, f"top_k is {limit!r}, where MindIE reads an integer", "Write one, such as 1000.")
        return
    vocab_size = parts.config.vocab_size if parts.config else None
    if vocab_size is not None and limit > vocab_size:
        yield error(
            "top-k",
            where,
            f"top_k, MindIE's limit, is {limit}, and the vocabulary has {vocab_size} tokens: its warm-up may ask for "
            "more tokens than there are",
            f'Set "top_k" to {min(TOP_K_LIMIT, vocab_size)} there.',
        )
    default = parts.model_config.get("top_k")
    if type(default) is int and limit < default:
        yield warning(
            "top-k",
            where,
            f"top_k caps every request at {limit}, below the {default} that the yaml gives a request by default",
            f'Set "top_k" to {TOP_K_LIMIT} there; it is a limit, the default is in the yaml.',
        )
