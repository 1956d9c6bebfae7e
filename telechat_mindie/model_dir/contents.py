"""The files of a model directory: all there, none too many, and what MindIE itself reads of them."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from telechat_mindie.errors import name_some
from telechat_mindie.findings import Finding, error, ok, warning
from telechat_mindie.model_dir.layout import MANIFEST
from telechat_mindie.model_dir.modes import file_status
from telechat_mindie.model_dir.parts import REBUILD, Parts
from telechat_mindie.reading import depth
from telechat_mindie.units import UINT32_MAX

REQUIRED = ("config.json", "tokenizer.model", "tokenizer_config.json")

EDITABLE = (".json", ".yaml", ".yml")
"""What a person may change after a build, within what the other rules allow."""

MAX_JSON_DEPTH = 10  # MindIE-LLM v3.0.0.beta.2 src/utils/safe_io.cpp:23
DEFAULT_TOP_K_LIMIT = 1000  # maxTopK without generation_config.json: src/config_manager/model_deploy_config.cpp


def check_contents(parts: Parts) -> Iterator[Finding]:
    """Files against the manifest, and config.json and generation_config.json as the daemon reads them."""
    found = [*_missing(parts), *_sizes(parts), *_extra(parts), *_config_json(parts), *_generation_json(parts)]
    yield from found
    if parts.manifest is not None and not found:
        yield ok("contents", parts.path, f"all {len(parts.listed_files)} files of the manifest, and no others")


def safe_entry(parts: Parts, name: str) -> Path | None:
    """The path of a manifest's file, None where the name leads out of the directory."""
    pieces = name.split("/")
    if name.startswith("/") or "\0" in name or any(piece in ("", ".", "..") for piece in pieces):
        return None
    return parts.path.joinpath(*pieces)


def _missing(parts: Parts) -> Iterator[Finding]:
    absent = []
    for name in dict.fromkeys((*REQUIRED, *parts.listed_files)):
        path = safe_entry(parts, name)
        if path is None:
            yield error("manifest", MANIFEST, f"names {name!r}, which is no file of this directory", REBUILD)
        elif file_status(path) is None and name != "config.json":  # its absence was told when it was read
            absent.append(name)
    if absent:
        yield error("missing-file", parts.path, f"lacks {name_some(absent)}", REBUILD)


def _sizes(parts: Parts) -> Iterator[Finding]:
    for name, entry in parts.listed_files.items():
        path = safe_entry(parts, name)
        size = entry.get("nbytes") if isinstance(entry, dict) else None
        if type(size) is not int:
            yield error("manifest", MANIFEST, f"does not say how large {name} is", REBUILD)
        elif path is not None and path.suffix not in EDITABLE:
            status = file_status(path)
            if status is not None and stat.S_ISREG(status.st_mode) and status.st_size != size:
                yield error("size", path, f"has {status.st_size} bytes, {size} when it was built", REBUILD)


def _extra(parts: Parts) -> Iterator[Finding]:
    if parts.manifest is None:
        return
    expected = {*parts.listed_files, MANIFEST}
    extra = [
        name
        for entry in sorted(parts.path.rglob("*"))
        if not entry.is_dir()
        and (name := str(entry.relative_to(parts.path))) not in expected
        # A second yaml has a rule of its own.
        and not (entry.parent == parts.path and entry.suffix in (".yaml", ".yml"))
    ]
    weights = [name for name in extra if name.endswith(".safetensors")]
    if weights:
        yield error(
            "extra-weights",
            parts.path,
            f"holds weights that build did not write: {name_some(weights)}",
            "Move them away: every safetensors file of a rank's folder is loaded.",
        )
    if len(extra) > len(weights):
        others = name_some(set(extra) - set(weights))
        yield warning("extra-file", parts.path, f"holds files that build did not write: {others}", "Move them away.")


def _config_json(parts: Parts) -> Iterator[Finding]:
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
    if (levels := depth(data)) > MAX_JSON_DEPTH:
        yield error("config-depth", where, f"is nested {levels} deep; MindIE reads {MAX_JSON_DEPTH}", REBUILD)


def _generation_json(parts: Parts) -> Iterator[Finding]:
    """top_k of generation_config.json is the daemon's cap on every request's top_k."""
    where = parts.path / "generation_config.json"
    limit: Any = (parts.generation_json or {}).get("top_k", DEFAULT_TOP_K_LIMIT)
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
            f'Set "top_k" to {min(DEFAULT_TOP_K_LIMIT, vocab_size)} there.',
        )
    default = parts.model_config.get("top_k")
    if type(default) is int and limit < default:
        yield warning(
            "top-k",
            where,
            f"top_k caps every request at {limit}, below the {default} that the yaml gives a request by default",
            f'Set "top_k" to {DEFAULT_TOP_K_LIMIT} there; it is a limit, the default is in the yaml.',
        )
