"""The calls of MindIE's ms wrapper, mode by mode, on sequences whose every token is known beforehand.

Shapes, dtypes and masks are those that MindIE-LLM v3.0.0.beta.2 builds (text_generator/plugins, text_generator/utils).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import mindspore as ms
import numpy as np

from helpers.driver import Driver

LOOKAHEAD_MASKED = -65504.0  # the smallest float16, whatever the mask is then cast to
MASKED = float(np.finfo(np.float32).min)


@dataclass(eq=False)
class Sequence_:
    """A sequence in the cache: `ids` are all its tokens, of which `done` have been computed.

    `call_lens` holds for each of these the context of the call that computed it: the L of Dynamic NTK.
    """

    ids: np.ndarray
    table: np.ndarray
    done: int = 0
    call_lens: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.call_lens = np.zeros(len(self.ids), int)


@dataclass(frozen=True)
class Draft:
    """Guesses after a sequence's cache: token i follows token parents[i], or the cache where that is -1."""

    tokens: np.ndarray
    parents: Sequence[int]

    def path(self, row: int) -> list[int]:
        """The rows that token `row` may see, itself the last."""
        rows = [row]
        while self.parents[rows[0]] >= 0:
            rows.insert(0, self.parents[rows[0]])
        return rows


class MindIECalls:
    """Builds forward's arguments as MindIE does and returns the logits rows. `done` is left to the caller."""

    def __init__(self, driver: Driver, rng: np.random.Generator, **caches: object) -> None:
        self._driver = driver
        self._rng = rng
        self._caches = caches

    def prefill(self, sequences: Sequence[Sequence_], lengths: Sequence[int]) -> np.ndarray:
        return self._next(sequences, lengths, prefill=True)

    def decode(self, sequences: Sequence[Sequence_]) -> np.ndarray:
        return self._next(sequences, [1] * len(sequences), prefill=False)

    def splitfuse(self, sequences: Sequence[Sequence_], lengths: Sequence[int]) -> np.ndarray:
        """Decodes first, then chunks; no mask."""
        return self._next(sequences, lengths, prefill=True, adapter_ids=None, q_seq_lens=list(lengths))

    def prefix_hit(self, sequences: Sequence[Sequence_], lengths: Sequence[int]) -> np.ndarray:
        """Prompts of which blocks are in the cache (prefix_cache_preprocess.py): int64 positions and slots, and as a
        mask rows [context - q, context) of a triangle as wide as the longest context."""
        width = max(s.done + n for s, n in zip(sequences, lengths, strict=True))
        triangle = np.where(np.tri(width, dtype=bool), 0.0, MASKED)
        mask = np.concatenate([triangle[s.done : s.done + n] for s, n in zip(sequences, lengths, strict=True)])
        return self._next(
            sequences, lengths, prefill=True, wide=True, q_seq_lens=list(lengths), spec_mask=mask, context=np.int32
        )

    def memory_decoding(self, sequences: Sequence[Sequence_], lengths: Sequence[int]) -> np.ndarray:
        """Guesses in a row, a row of logits for each: a float64 triangle, int64 lengths and positions, int32 slots."""
        width = max(s.done + n for s, n in zip(sequences, lengths, strict=True))
        rows = np.concatenate([np.arange(s.done, s.done + n) for s, n in zip(sequences, lengths, strict=True)])
        mask = np.where(np.arange(width) <= rows[:, None], 0.0, MASKED)
        return self._next(
            sequences,
            lengths,
            prefill=False,
            wide=True,
            adapter_ids=None,
            q_seq_lens=list(lengths),
            spec_mask=mask,
            slots=np.int32,
        )

    def lookahead(self, sequences: Sequence[Sequence_], drafts: Sequence[Draft], dtype: ms.dtype) -> np.ndarray:
        """Guesses that branch (la/decoding_policy.py): the mask is a Tensor of the runner's dtype, [T, C] with C the
        longest context; positions are depths, so that tokens of two branches share one."""
        counts = [len(draft.tokens) for draft in drafts]
        width = max(s.done + n for s, n in zip(sequences, counts, strict=True))
        visible = np.zeros((sum(counts), width), bool)
        positions, start = [], 0
        for sequence, draft, count in zip(sequences, drafts, counts, strict=True):
            for row in range(count):
                path = draft.path(row)
                visible[start + row, : sequence.done] = True
                visible[start + row, sequence.done + np.array(path)] = True
                positions.append(sequence.done + len(path) - 1)
            start += count
        mask = ms.Tensor(np.where(visible, 0, LOOKAHEAD_MASKED).astype(np.float16)).astype(dtype)
        return self._next(
            sequences,
            counts,
            prefill=False,
            q_seq_lens=counts,
            spec_mask=mask,
            input_ids=np.concatenate([draft.tokens for draft in drafts]).astype(np.int64),
            position_ids=np.array(positions, np.int64),
        )

    def _next(
        self,
        sequences: Sequence[Sequence_],
        lengths: Sequence[int],
        *,
        prefill: bool,
        wide: bool = False,
        context: type | None = None,
        slots: type | None = None,
        **changes: object,
    ) -> np.ndarray:
        """The next `lengths[i]` tokens of each sequence: int32, or int64 where `wide` but for `context` and `slots`."""
        kind = np.int64 if wide else np.int32
        at = [np.arange(s.done, s.done + n) for s, n in zip(sequences, lengths, strict=True)]
        for sequence, places in zip(sequences, at, strict=True):
            sequence.call_lens[places] = places[-1] + 1
        arguments: dict[str, object] = {
            "input_ids": np.concatenate([s.ids[places] for s, places in zip(sequences, at, strict=True)]),
            "valid_length_each_example": np.array([places[-1] + 1 for places in at], context or kind),
            "block_tables": self._driver.tables([s.table for s in sequences]),
            "slot_mapping": np.concatenate(
                [self._driver.slots(s.table, places) for s, places in zip(sequences, at, strict=True)]
            ).astype(slots or kind),
            "prefill": prefill,
            "position_ids": np.concatenate(at).astype(kind),
            "adapter_ids": [None] * len(sequences),
            "prefill_head_indices": np.cumsum(lengths, dtype=np.int64) - 1 if prefill else None,
            "key_cache": None,
            "value_cache": None,
            "spec_mask": None,
            "q_seq_lens": None,
        }
        arguments |= self._caches | changes
        if self._rng.integers(2):  # the legacy shapes, which MindIE uses where use_legacy is not False
            arguments["input_ids"] = np.reshape(arguments["input_ids"], (1, -1) if prefill else (-1, 1))
        return self._driver.forward(**arguments)
