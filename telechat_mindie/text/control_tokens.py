"""TeleChat2's control tokens, and how a prompt is cut at them."""

from __future__ import annotations

import re
from typing import NamedTuple

CONTROL_IDS = {"<_start>": 1, "<_end>": 2, "<_pad>": 3, "<_user>": 4, "<_bot>": 5, "<_system>": 6}
"""The control tokens that a prompt may hold; the same ids in every released size."""

PUBLISHED_IDS = {"<_start>": 1, "<_end>": 2, "<_pad>": 3}
"""Those that the published tokenizer files look for."""

_ANY = re.compile(f"({'|'.join(CONTROL_IDS)})")
_ANY_PUBLISHED = re.compile(f"({'|'.join(PUBLISHED_IDS)})")


class Run(NamedTuple):
    """A stretch of a prompt: one control token, or the text up to the next."""

    text: str
    is_control: bool


def holds_control(text: str) -> bool:
    """Whether a control token stands anywhere in the text."""
    return _ANY.search(text) is not None


def split(text: str) -> list[Run]:
    """The runs of a prompt in which each of the six control tokens counts."""
    # A pattern with one group splits into text, match, text, match, ..., text.
    return [Run(part, bool(at % 2)) for at, part in enumerate(_ANY.split(text)) if part]


def split_published(text: str) -> list[Run]:
    """The runs of a prompt as the published tokenizer_config.json has them.

    `<_end>` and `<_pad>` are marked `single_word` there. In a slow Hugging Face tokenizer that means: a token whose
    left neighbour does not end in a space is text, and joins it; else one whose right neighbour does not begin with a
    space joins that (transformers, tokenization_utils.py, PreTrainedTokenizer.tokenize).
    """
    parts = [part for part in _ANY_PUBLISHED.split(text) if part]
    for at, part in enumerate(parts):
        if part not in ("<_end>", "<_pad>"):
            continue
        left = parts[at - 1] if at else ""
        right = parts[at + 1] if at + 1 < len(parts) else ""
        if left and not left.endswith(" "):
            parts[at - 1 : at + 1] = [left + part, ""]
        elif right and not right.startswith(" "):
            parts[at : at + 2] = ["", part + right]
    return [Run(part, part in PUBLISHED_IDS) for part in parts if part]
