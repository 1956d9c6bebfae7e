"""The calls of MindIE's ms wrapper, mode by mode, on sequences whose every token is known beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mindspore as ms
import numpy as np

from helpers.driver import Driver

MASKED = -65504.0  # lookahead's float16 mask; memory_decoding's is the smallest float32


@dataclass
class Sequence_:
    """A sequence in the cache: `ids` are all its tokens, of which `done` have been computed."""

    ids: np.ndarray
    table: np.ndarray
    done: int = 0


class MindIECalls:
    """Builds forward's arguments as mindie-contract 1a has them and returns the logits rows."""

    def __init__(self, driver: Driver, rng: np.random.Generator, **caches: object) -> None:
        self._driver = driver
        self._rng = rng
        self._caches = caches

    def run(
        self,
        sequences: Sequence[Sequence_],
        lengths: Sequence[int],
        *,
        prefill: bool,
        q_seq_lens: list[int] | None,
        spec_mask: object = None,
        tokens: np.ndarray | None = None,
        positions: np.ndarray | None = None,
    ) -> np.ndarray:
        """Compute the next `lengths[i]` tokens of each sequence; their `done` is left to the caller."""
        wide = self._rng.integers(2)  # MindIE's plugins turn some of its int32 arguments into int64
        kind = (np.int32, np.int64)[wide]
        at = [np.arange(s.done, s.done + n) for s, n in zip(sequences, lengths, strict=True)]
        if tokens is None:
            tokens = np.concatenate([s.ids[places] for s, places in zip(sequences, at, strict=True)])
        slots = np.concatenate([self._driver.slots(s.table, places) for s, places in zip(sequences, at, strict=True)])
        input_ids = tokens.astype(np.int64)
        if self._rng.integers(2):  # the legacy shapes
            input_ids = input_ids.reshape((1, -1) if prefill else (-1, 1))
        return self._driver.forward(
            input_ids=input_ids,
            valid_length_each_example=np.array([places[-1] + 1 for places in at], kind),
            block_tables=self._driver.tables([s.table for s in sequences]),
            slot_mapping=slots.astype(kind),
            prefill=prefill,
            position_ids=(np.concatenate(at) if positions is None else positions).astype(kind),
            adapter_ids=None if q_seq_lens else [None] * len(sequences),
            prefill_head_indices=np.cumsum(lengths, dtype=np.int64) - 1 if prefill else None,
            spec_mask=spec_mask,
            q_seq_lens=q_seq_lens,
            **({"key_cache": None, "value_cache": None} | self._caches),
        )

    def prefill(self, sequences: Sequence[Sequence_], lengths: Sequence[int]) -> np.ndarray:
        return self.run(sequences, lengths, prefill=True, q_seq_lens=None)

    def decode(self, sequences: Sequence[Sequence_]) -> np.ndarray:
        return self.run(sequences, [1] * len(sequences), prefill=False, q_seq_lens=None)

    def prefix_hit(self, sequences: Sequence[Sequence_], lengths: Sequence[int], max_seq_len: int) -> np.ndarray:
        """The mask is rows [context - q, context) of a triangle (prefix_cache_plugin.py), causal as ever."""
        triangle = np.where(np.tri(max_seq_len, dtype=bool), 0.0, -10000.0)
        mask = np.concatenate([triangle[s.done : s.done + n] for s, n in zip(sequences, lengths, strict=True)])
        return self.run(sequences, lengths, prefill=True, q_seq_lens=list(lengths), spec_mask=mask)

    def splitfuse(self, sequences: Sequence[Sequence_], lengths: Sequence[int]) -> np.ndarray:
        """Decodes first, then chunks; no mask."""
        return self.run(sequences, lengths, prefill=True, q_seq_lens=list(lengths))

    def drafts(self, sequences: Sequence[Sequence_], lengths: Sequence[int], plugin: str) -> np.ndarray:
        """Guesses in a row: a row of logits for every token. lookahead brings a Tensor, memory_decoding an array."""
        width = max(s.done + n for s, n in zip(sequences, lengths, strict=True))
        rows = np.concatenate([np.arange(s.done, s.done + n) for s, n in zip(sequences, lengths, strict=True)])
        visible = np.arange(width) <= rows[:, None]
        return self.run(sequences, lengths, prefill=False, q_seq_lens=list(lengths), spec_mask=_mask(visible, plugin))

    def tree(self, sequence: Sequence_, tokens: np.ndarray, parents: Sequence[int], plugin: str) -> np.ndarray:
        """Guesses that branch: token i follows token parents[i] (-1: the cache), and sees only its own branch."""
        count, done = len(tokens), sequence.done
        visible = np.zeros((count, done + count), bool)
        visible[:, :done] = True
        depth = np.zeros(count, int)
        for row, parent in enumerate(parents):
            if parent >= 0:
                visible[row] = visible[parent]
                depth[row] = depth[parent] + 1
            visible[row, done + row] = True
        return self.run(
            [sequence],
            [count],
            prefill=False,
            q_seq_lens=[count],
            spec_mask=_mask(visible, plugin),
            tokens=tokens,
            positions=done + depth,
        )


def _mask(visible: np.ndarray, plugin: str) -> object:
    if plugin == "la":
        return ms.Tensor(np.where(visible, 0, MASKED).astype(np.float16))
    return np.where(visible, 0.0, float(np.finfo(np.float32).min))
