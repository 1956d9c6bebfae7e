"""All that the files of a directory for atb tell about it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from telechat_mindie.findings import Finding, error, ok, warning
from telechat_mindie.model_dir.atb.layout import CONFIG, AtbParts
from telechat_mindie.model_dir.daemon_files import check_depth
from telechat_mindie.model_dir.files import check_files, check_hashes
from telechat_mindie.model_dir.modes import User, check_tree

TOKENIZERS = ("tokenizer.json", "tokenizer.model")


@dataclass(frozen=True)
class AtbInspection:
    """What was found."""

    parts: AtbParts
    findings: list[Finding]


def inspect_atb(
    path: Path,
    user: User | None = None,
    *,
    full: bool = False,
    on_hash: Callable[[int], Callable[[int], object]] | None = None,
) -> AtbInspection:
    """Look at everything in a directory for atb; whatever is damaged becomes a finding. Arguments as of `inspect`."""
    parts = AtbParts.read(path)
    found = [
        *check_tree(path, user or User(os.geteuid())),
        *parts.problems,
        *(check_files(parts, (CONFIG,)) if parts.manifest is not None else ()),
        *check_depth(path / CONFIG, parts.config_json or {}),
        *_tokenizer(parts),
        *_weights(parts),
    ]
    if full:
        progress = on_hash(sum(entry.nbytes for entry in parts.files.values())) if on_hash else None
        found += check_hashes(parts, progress)
    return AtbInspection(parts, found)


def _tokenizer(parts: AtbParts) -> Iterator[Finding]:
    """atb_llm takes the fast tokenizer that transformers finds (models/base/router.py:572-581)."""
    if not any((parts.path / name).is_file() for name in TOKENIZERS):
        message = f"lacks {' and '.join(TOKENIZERS)}"
        yield error("tokenizer", parts.path, message, "Copy the tokenizer's files from the checkpoint into it.")
    elif not (parts.path / TOKENIZERS[0]).is_file():
        yield warning(
            "tokenizer",
            parts.path,
            "has no tokenizer.json: the one that transformers makes of tokenizer.model gives other ids for many texts",
            "Build the directory: telechat-mindie build MODEL_PATH --checkpoint DIR --backend atb writes one.",
        )


def _weights(parts: AtbParts) -> Iterator[Finding]:
    """What is right: told only where no rule about weights was broken."""
    if parts.tensors and not any(problem.severity == "error" for problem in parts.problems):
        model = parts.quantised
        kind = "float16" if model is None else f"{model.kind}, float16 in {', '.join(model.layers(quantised=False))}"
        yield ok("weights", parts.path, f"{len(parts.tensors)} tensors as atb_llm looks for them: {kind}")
