"""A sequence of tokens as the scheduler and the block manager see it."""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Iterable

import numpy as np

_DIGEST_BYTES = 16  # blake2b: two different prefixes never meet, not even made on purpose


class Status(enum.Enum):
    WAITING = "waiting"  # holds no blocks
    RUNNING = "running"  # holds device blocks
    SWAPPED = "swapped"  # holds host blocks
    FINISHED = "finished"  # holds no blocks


class Sequence:
    """Prompt and answer so far, and how much of them the cache holds.

    Args:
        sequence_id: unique among the sequences of a scheduler.
        prompt_ids: the prompt's tokens.
        order: (priority, arrival number); the smallest is the most urgent.
    """

    __slots__ = (
        "_digests",
        "id",
        "num_cached",
        "num_computed",
        "num_published",
        "order",
        "prompt_len",
        "row",
        "status",
        "token_ids",
    )

    def __init__(self, sequence_id: str, prompt_ids: Iterable[int], order: tuple[int, int] = (0, 0)) -> None:
        self.id = sequence_id
        self.order = order
        self.token_ids = list(prompt_ids)
        self.prompt_len = len(self.token_ids)
        self.status = Status.WAITING
        self.num_computed = 0  # tokens whose keys and values are in the cache
        self.num_cached = 0  # of these, found in the prefix cache on the last admission
        self.num_published = 0  # full blocks that the prefix cache knows
        self.row = -1  # of the block manager's tables, while running
        self._digests: list[bytes] = []

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.prompt_len

    @property
    def num_uncomputed(self) -> int:
        return len(self.token_ids) - self.num_computed

    @property
    def is_decoding(self) -> bool:
        """Only the last token of the answer is not yet in the cache."""
        return self.num_computed == len(self.token_ids) - 1 >= self.prompt_len

    def digest(self, index: int, block_size: int) -> bytes:
        """Hash of the tokens of full block `index` and of all before it: equal digests mean equal keys and values."""
        while len(self._digests) <= index:
            start = len(self._digests) * block_size
            parent = self._digests[-1] if self._digests else b""
            tokens = np.array(self.token_ids[start : start + block_size], np.int64).tobytes()
            self._digests.append(hashlib.blake2b(parent + tokens, digest_size=_DIGEST_BYTES).digest())
        return self._digests[index]
