"""A sequence of tokens as the scheduler and the block manager see it."""

from __future__ import annotations

import enum
import hashlib

import numpy as np
from numpy.typing import ArrayLike, NDArray

_DIGEST_BYTES = 16  # blake2b: two different prefixes never meet, not even made on purpose
_LEAST_ROOM = 64  # tokens by which a sequence's buffer grows at least


class Status(enum.Enum):
    WAITING = "waiting"  # holds no blocks
    RUNNING = "running"  # holds device blocks
    SWAPPED = "swapped"  # holds host blocks
    FINISHED = "finished"  # holds no blocks


class Sequence:
    """Prompt and answer so far, and how much of them the cache holds.

    Args:
        sequence_id: unique among the sequences of a scheduler.
        prompt_ids: the prompt's tokens, at least one.
        order: (priority, arrival number); the smallest is the most urgent.
    """

    __slots__ = (
        "_buffer",
        "_digests",
        "id",
        "last_token",
        "num_cached",
        "num_computed",
        "num_published",
        "num_tokens",
        "order",
        "prompt_len",
        "row",
        "status",
    )

    def __init__(self, sequence_id: str, prompt_ids: ArrayLike, order: tuple[int, int] = (0, 0)) -> None:
        self._buffer = np.array(prompt_ids, np.int64)  # as `forward` wants them; a copy, for the answer grows in it
        self.id = sequence_id
        self.order = order
        self.num_tokens = self.prompt_len = len(self._buffer)
        self.last_token = int(self._buffer[-1])
        self.status = Status.WAITING
        self.num_computed = 0  # tokens whose keys and values are in the cache
        self.num_cached = 0  # of these, taken from the prefix cache on the last admission
        self.num_published = 0  # full blocks that the prefix cache knows
        self.row = -1  # of the block manager's tables, while running
        self._digests: list[bytes] = []

    @property
    def token_ids(self) -> NDArray[np.int64]:
        """[num_tokens], a view."""
        return self._buffer[: self.num_tokens]

    def append(self, token: int) -> None:
        """Add a token of the answer."""
        if self.num_tokens == len(self._buffer):  # doubled, so that appending costs the same however long it gets
            room = np.empty(max(_LEAST_ROOM, self.num_tokens), np.int64)
            self._buffer = np.concatenate([self._buffer, room])
        self._buffer[self.num_tokens] = self.last_token = token
        self.num_tokens += 1

    @property
    def num_generated(self) -> int:
        return self.num_tokens - self.prompt_len

    @property
    def num_uncomputed(self) -> int:
        return self.num_tokens - self.num_computed

    @property
    def is_decoding(self) -> bool:
        """Only the last token of the answer is not yet in the cache."""
        return self.num_computed == self.num_tokens - 1 >= self.prompt_len

    def digest(self, index: int, block_size: int) -> bytes:
        """Hash of the tokens of full block `index` and of all before it: equal digests mean equal keys and values."""
        while len(self._digests) <= index:
            start = len(self._digests) * block_size
            parent = self._digests[-1] if self._digests else b""
            tokens = self._buffer[start : start + block_size].tobytes()
            self._digests.append(hashlib.blake2b(parent + tokens, digest_size=_DIGEST_BYTES).digest())
        return self._digests[index]
