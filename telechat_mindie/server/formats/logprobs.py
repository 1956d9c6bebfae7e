"""Tokens and their log probabilities as OpenAI's formats report them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from telechat_mindie.engine.sampler import TokenLogprobs
from telechat_mindie.text.tokenizer import TelechatTokenizer

_CONTEXT = 3  # tokens: a character has at most four bytes, and each may be a token


class TokenTexts:
    """The text that a token adds to the answer before it, so that the texts of all tokens are the answer's.

    A character of several tokens belongs to the last of them; the others have no text.
    """

    def __init__(self, tokenizer: TelechatTokenizer) -> None:
        self._tokenizer = tokenizer

    def of(self, token: int, before: Sequence[int]) -> str:
        context = list(before[-_CONTEXT:])
        # A slice of an array is read as a window of it: `Detokenizer.decode`.
        return self._tokenizer.decode(np.array([*context, token], np.int64)[len(context) :])


def chat_content(
    texts: TokenTexts, answer_ids: Sequence[int], reports: Sequence[TokenLogprobs]
) -> list[dict[str, object]]:
    """`logprobs.content` for the last `len(reports)` tokens of an answer."""
    content = []
    for place, report in enumerate(reports, len(answer_ids) - len(reports)):
        before = answer_ids[max(0, place - _CONTEXT) : place]
        own = _entry(texts.of(report.token_id, before), report.logprob)
        tops = [_entry(texts.of(token, before), logprob) for token, logprob in report.top]
        content.append(own | {"top_logprobs": tops})
    return content


def completion_lists(
    texts: TokenTexts, answer_ids: Sequence[int], reports: Sequence[TokenLogprobs], offset: int
) -> tuple[dict[str, object], int]:
    """`logprobs` of a completion for the last `len(reports)` tokens, and the offset behind them.

    Args:
        offset: bytes of the answer before these tokens; MindIE counts bytes, OpenAI characters.
    """
    offsets, tokens, top_logprobs = [], [], []
    for place, report in enumerate(reports, len(answer_ids) - len(reports)):
        before = answer_ids[max(0, place - _CONTEXT) : place]
        text = texts.of(report.token_id, before)
        offsets.append(offset)
        offset += len(text.encode())
        tokens.append(text)
        tops = {text: report.logprob}
        for token, logprob in report.top:
            tops.setdefault(texts.of(token, before), logprob)
        top_logprobs.append(tops)
    lists: dict[str, object] = {
        "text_offset": offsets,
        "token_logprobs": [report.logprob for report in reports],
        "tokens": tokens,
        "top_logprobs": top_logprobs,
    }
    return lists, offset


def _entry(text: str, logprob: float) -> dict[str, object]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}
