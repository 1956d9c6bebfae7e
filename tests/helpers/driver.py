"""Calls ModelRunner.forward as MindIE does: numpy, flat, slots from block tables."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class Driver:
    """Sequences over shuffled blocks of a runner's cache."""

    def __init__(self, runner, block_size: int, num_blocks: int, seed: int = 0) -> None:
        self.runner = runner
        self.block_size = block_size
        self._free = list(np.random.default_rng(seed).permutation(num_blocks - 1))

    def table(self, tokens: int) -> np.ndarray:
        """[W] blocks for a sequence of at most `tokens`."""
        return np.array([self._free.pop() for _ in range(-(-tokens // self.block_size))], np.int32)

    def release(self, table: np.ndarray) -> None:
        self._free.extend(table)

    def slots(self, table: np.ndarray, positions: np.ndarray) -> np.ndarray:
        return (table[positions // self.block_size] * self.block_size + positions % self.block_size).astype(np.int32)

    def tables(self, tables: Sequence[np.ndarray]) -> np.ndarray:
        out = np.full((len(tables), max(map(len, tables))), -1, np.int32)
        for row, table in zip(out, tables, strict=True):
            row[: len(table)] = table
        return out

    def forward(self, **arguments) -> np.ndarray:
        logits = self.runner.forward(**arguments)
        return logits.asnumpy() if hasattr(logits, "asnumpy") else logits

    def prefill(self, prompts: Sequence[np.ndarray], tables: Sequence[np.ndarray], **changes) -> np.ndarray:
        """Logits [B, vocabulary] of each prompt's last token."""
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        positions = [np.arange(length, dtype=np.int32) for length in lengths]
        slots = [self.slots(table, at) for table, at in zip(tables, positions, strict=True)]
        arguments = {
            "input_ids": np.concatenate(prompts).astype(np.int64),
            "valid_length_each_example": lengths,
            "block_tables": self.tables(tables),
            "slot_mapping": np.concatenate(slots),
            "prefill": True,
            "position_ids": np.concatenate(positions),
            "adapter_ids": [None] * len(prompts),
            "prefill_head_indices": np.cumsum(lengths, dtype=np.int64) - 1,
            "key_cache": None,
            "value_cache": None,
            "spec_mask": None,
            "q_seq_lens": None,
        }
        return self.forward(**(arguments | changes))

    def decode(
        self, tokens: Sequence[int], positions: Sequence[int], tables: Sequence[np.ndarray], **changes
    ) -> np.ndarray:
        """Logits [B, vocabulary] after one more token each, at the given positions."""
        at = np.asarray(positions, np.int32)
        slots = [self.slots(table, at[row : row + 1]) for row, table in enumerate(tables)]
        arguments = {
            "input_ids": np.asarray(tokens, np.int64),
            "valid_length_each_example": at + 1,
            "block_tables": self.tables(tables),
            "slot_mapping": np.concatenate(slots),
            "prefill": False,
            "position_ids": at,
            "adapter_ids": [None] * len(tables),
            "prefill_head_indices": None,
            "key_cache": None,
            "value_cache": None,
            "spec_mask": None,
            "q_seq_lens": None,
        }
        return self.forward(**(arguments | changes))
