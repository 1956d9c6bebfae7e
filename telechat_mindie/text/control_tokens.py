"""The tokens that a prompt may hold beside text: which they are, and how a prompt is cut at them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from telechat_mindie.errors import TokenizerError

CONTROL_IDS = {"<_start>": 1, "<_end>": 2, "<_pad>": 3, "<_user>": 4, "<_bot>": 5, "<_system>": 6}
"""The tokens that frame turns, the same in every released size; all there is where no file names others."""


class AddedToken(NamedTuple):
    """A token of a tokenizer_config.json's `added_tokens_decoder`, with transformers' switches."""

    content: str
    id: int
    special: bool = True  # left out of a decoded text where special tokens are skipped
    single_word: bool = False  # counts only beside spaces
    lstrip: bool = False  # takes the white space on its left away
    rstrip: bool = False  # and on its right


TURN_TOKENS = tuple(AddedToken(name, index) for name, index in CONTROL_IDS.items())

_ID_DIGITS = 20  # of any id; Python itself takes 4300 for an int

PUBLISHED_TOKENS = (
    AddedToken("<_start>", 1),
    AddedToken("<_end>", 2, single_word=True),
    AddedToken("<_pad>", 3, single_word=True),
)
"""Those that the published 115B files look for; they have no `added_tokens_decoder`."""


def read_added_tokens(decoder: object, size: int) -> list[AddedToken]:
    """The tokens of an `added_tokens_decoder`; those beyond the `size` ids that have an embedding are skipped.

    Raises:
        TokenizerError: not ids and tokens, or one name for two ids.
    """
    where = "added_tokens_decoder"
    if not isinstance(decoder, Mapping):
        raise TokenizerError("is not an object", where=where, found=type(decoder).__name__)
    tokens: dict[str, AddedToken] = {}
    for key, given in decoder.items():
        fields = given if isinstance(given, Mapping) else getattr(given, "__dict__", {})
        content, index = fields.get("content"), str(key)
        is_id = index.isascii() and index.isdigit() and len(index) <= _ID_DIGITS
        if not (is_id and isinstance(content, str) and content):
            raise TokenizerError("is not an id with a token", where=f"{where}: {index[:40]}", found=repr(given))
        # transformers' own defaults (4.46, tokenization_utils_base.py, AddedToken)
        names = ("special", "single_word", "lstrip", "rstrip")
        flags = {name: fields.get(name, False) for name in names}
        if not all(isinstance(flag, bool) for flag in flags.values()):
            raise TokenizerError("has a switch that is neither true nor false", where=f"{where}: {key}", found=flags)
        if int(index) >= size:
            continue
        if content in tokens:
            found = f"{tokens[content].id} and {index}"
            raise TokenizerError("stands for two ids", where=f"{where}: {content}", found=found)
        tokens[content] = AddedToken(content, int(index), **flags)
    return list(tokens.values())


class Run(NamedTuple):
    """A stretch of a prompt: one token, or the text up to the next."""

    text: str
    token_id: int | None


class ControlTokens:
    """Finds tokens in prompts, the leftmost first, and of those the longest."""

    def __init__(self, tokens: Iterable[AddedToken]) -> None:
        self._tokens = {token.content: token for token in tokens}
        longest_first = sorted(self._tokens, key=len, reverse=True)
        self._any = re.compile(f"({'|'.join(map(re.escape, longest_first))})" if longest_first else r"(?!)()")
        turns = [name for name, token in self._tokens.items() if token.id in CONTROL_IDS.values()]
        self._any_turn = re.compile("|".join(map(re.escape, turns)) or "(?!)")

    @property
    def tokens(self) -> tuple[AddedToken, ...]:
        return tuple(self._tokens.values())

    @property
    def characters(self) -> frozenset[str]:
        """All characters of all tokens."""
        return frozenset().union(*self._tokens)

    def frames(self, text: str) -> bool:
        """Whether a token that frames a turn stands anywhere in the text."""
        return self._any_turn.search(text) is not None

    def split(self, text: str, *, single_words: bool = True) -> list[Run]:
        """The runs of a prompt, as a slow tokenizer of transformers makes them (4.46, tokenization_utils.py,
        PreTrainedTokenizer.tokenize).

        A token of the kind `single_word` whose left neighbour does not end in a space is text, and joins it; else one
        whose right neighbour does not begin with a space joins that.

        Args:
            single_words: heed that switch; without it the token always counts.
        """
        # A pattern with one group splits into text, match, text, match, ..., text.
        parts = [part for part in self._any.split(text) if part]
        for at, part in enumerate(parts):
            token = self._tokens.get(part)
            if token is None:
                continue
            right = parts[at + 1] if at + 1 < len(parts) else ""
            if token.rstrip and right:
                parts[at + 1] = right = right.lstrip()
            if token.lstrip and at:
                parts[at - 1] = parts[at - 1].rstrip()
            left = parts[at - 1] if at else ""
            if not (token.single_word and single_words):
                continue
            if left and not left.endswith(" "):
                parts[at - 1 : at + 1] = [left + part, ""]
            elif right and not right.startswith(" "):
                parts[at : at + 2] = ["", part + right]
        runs = ((part, self._tokens.get(part)) for part in parts if part)
        return [Run(part, None if token is None else token.id) for part, token in runs]
