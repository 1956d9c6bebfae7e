"""The one ragged call: sequences that each bring some new tokens to the context they already have."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class RaggedBatch:
    """B sequences, T new tokens in all, one sequence after the other.

    Prefill, decode, chunked prefill, a prefix hit and speculative decoding are this with different numbers.
    """

    token_ids: np.ndarray  # [T] int32
    positions: np.ndarray  # [T] int32, for the rotary embedding
    slots: np.ndarray  # [T] int32, cache row to write key and value to; -1: do not write
    query_lens: np.ndarray  # [B] int32, new tokens
    context_lens: np.ndarray  # [B] int32, tokens in the cache once the new ones are written
    block_tables: np.ndarray  # [B, W] int32, -1 where unused
    logits_rows: np.ndarray  # [R] int32, the tokens whose logits are wanted
    mask: np.ndarray | None = None  # [T, C] bool, True where a token may look; None: causal
    scratch_row: int | None = None  # cache row for what is not kept, where the cache is not the model's own

    @property
    def query_starts(self) -> np.ndarray:
        """[B] index of each sequence's first new token."""
        starts: np.ndarray = np.cumsum(self.query_lens) - self.query_lens
        return starts
