"""Tokens and their log probabilities as OpenAI's formats report them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from telechat_mindie.engine.sampler import TokenLogprobs
from telechat_mindie.server.service import TokenText

Texts = list[tuple[str, float]]


def chat_content(
    token_text: TokenText, answer_ids: Sequence[int], reports: Sequence[TokenLogprobs]
) -> list[dict[str, object]]:
    """`logprobs.content` for the last `len(reports)` tokens of an answer."""
    return [
        _entry(text, logprob) | {"top_logprobs": [_entry(*top) for top in tops]}
        for text, logprob, tops in _texts(token_text, answer_ids, reports)
    ]


def completion_lists(
    token_text: TokenText, answer_ids: Sequence[int], reports: Sequence[TokenLogprobs], offset: int
) -> tuple[dict[str, object], int]:
    """`logprobs` of a completion for the last `len(reports)` tokens, and the offset behind them.

    Args:
        offset: bytes of the answer before these tokens; MindIE counts bytes, OpenAI characters.
    """
    offsets, tokens, logprobs, top_logprobs = [], [], [], []
    for text, logprob, tops in _texts(token_text, answer_ids, reports):
        offsets.append(offset)
        offset += len(text.encode())
        tokens.append(text)
        logprobs.append(logprob)
        texts = {text: logprob}
        for top_text, top_logprob in tops:  # tokens may have the same text: the first of them counts
            texts.setdefault(top_text, top_logprob)
        top_logprobs.append(texts)
    lists: dict[str, object] = {
        "text_offset": offsets,
        "token_logprobs": logprobs,
        "tokens": tokens,
        "top_logprobs": top_logprobs,
    }
    return lists, offset


def _texts(
    token_text: TokenText, answer_ids: Sequence[int], reports: Sequence[TokenLogprobs]
) -> Iterator[tuple[str, float, Texts]]:
    """Text and log probability of each reported token, and those of the most likely ones in its place."""
    for place, report in enumerate(reports, len(answer_ids) - len(reports)):
        tops = [(token_text(token, answer_ids, place), logprob) for token, logprob in report.top]
        yield token_text(report.token_id, answer_ids, place), report.logprob, tops


def _entry(text: str, logprob: float) -> dict[str, object]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}
