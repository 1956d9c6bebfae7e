"""Repetition, presence and frequency penalties."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from telechat_mindie.engine.params import GenerationParams


class TokenCounts:
    """The distinct tokens of a prompt and its answer, and how often each is in the answer."""

    def __init__(self, prompt_ids: ArrayLike) -> None:
        self._ids: NDArray[np.int64] = np.unique(np.asarray(prompt_ids, np.int64))
        self._counts = np.zeros(len(self._ids), np.float32)
        self._places = {token: place for place, token in enumerate(self._ids.tolist())}

    def add(self, token: int) -> None:
        """One more token of the answer."""
        place = self._places.setdefault(token, len(self._places))
        if place == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros(max(8, place), np.int64)])
            self._counts = np.concatenate([self._counts, np.zeros(max(8, place), np.float32)])
        self._ids[place] = token
        self._counts[place] += 1

    @property
    def ids(self) -> NDArray[np.int64]:
        """[distinct tokens]"""
        return self._ids[: len(self._places)]

    @property
    def counts(self) -> NDArray[np.float32]:
        """[distinct tokens], 0 for tokens of the prompt alone."""
        return self._counts[: len(self._places)]


def penalise(
    logits: NDArray[np.float32], rows: Sequence[int], params: Sequence[GenerationParams], counts: Sequence[TokenCounts]
) -> NDArray[np.float32]:
    """A copy of `logits` with penalties on the given rows.

    A seen token's logit is divided by repetition_penalty where positive and multiplied where negative (Keskar et al.,
    "CTRL", 2019, in the form of transformers' RepetitionPenaltyLogitsProcessor: prompt and answer count). Then
    `frequency_penalty * count + presence_penalty * (count > 0)` is subtracted, over the answer alone (OpenAI's API
    reference). The same order and scopes as MindIE-LLM's ms_handlers.py.

    Args:
        logits: [B, V].
        rows: the R rows to change, with the params and seen tokens of each.
    """
    logits = logits.copy()
    sizes = [len(seen.ids) for seen in counts]
    row = np.repeat(rows, sizes)
    token = np.concatenate([seen.ids for seen in counts])
    count = np.concatenate([seen.counts for seen in counts])
    repetition = np.repeat(np.array([one.repetition_penalty for one in params], np.float32), sizes)
    frequency = np.repeat(np.array([one.frequency_penalty for one in params], np.float32), sizes)
    presence = np.repeat(np.array([one.presence_penalty for one in params], np.float32), sizes)
    values = logits[row, token]
    values = np.where(values < 0, values * repetition, values / repetition)
    logits[row, token] = values - frequency * count - presence * (count > 0)
    return logits
