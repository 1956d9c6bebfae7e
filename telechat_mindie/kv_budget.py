"""How a card's memory is shared out, and how much KV cache that leaves. Whoever counts blocks, tokens or sequences asks
here: `plan`, `info`, `service-config`, `check`, the server and the model runner.

    card = reserve + weights + logits + KV cache in whole GB (npuMemSize)
    KV cache = blocks of `block_size` tokens, the last of which is reserved

A GB is 2^30 bytes, as MindIE counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from telechat_mindie.errors import InputError
from telechat_mindie.units import GB

RESERVE_SHARE = 0.2
"""Of a card, kept free: what MindIE leaves with NPU_MEMORY_FRACTION 0.8, the default (MindIE-LLM v3.0.0.beta.2
mindie_llm/model_wrapper/utils/env.py:88)."""

RESERVED_BLOCKS = 1
"""The last block of a cache is for dummy batches and never handed out: MindIE-LLM v3.0.0.beta.2
mindie_llm/connector/common/input_metadata_builder.py:155. The embedded engine does the same."""

FULL_BATCH = 200
"""Sequences of a decode batch for which logits are counted: maxBatchSize as every generation of MindIE ships it."""

LOGIT_BYTES = 4
"""The sampler's own copy of the logits is float32 (MindIE-LLM v3.0.0.beta.2
mindie_llm/text_generator/samplers/token_selectors/ms_selectors.py:125)."""


@dataclass(frozen=True, slots=True)
class CacheShape:
    """What a block of the KV cache takes on one rank.

    Attributes:
        token_bytes: keys and values of a token, all layers (`TelechatConfig.kv_bytes_per_token`).
        block_size: tokens of a block.
    """

    token_bytes: int
    block_size: int

    @property
    def block_bytes(self) -> int:
        return self.token_bytes * self.block_size

    def blocks_in(self, nbytes: float) -> int:
        """Blocks that memory holds, by MindIE's own formula (MindIE-LLM v3.0.0.beta.2
        mindie_llm/text_generator/utils/kvcache_settings.py); the reserved one counts."""
        return int(nbytes // self.block_bytes)

    def usable_blocks_in(self, nbytes: float) -> int:
        """Blocks that sequences can have."""
        return max(0, self.blocks_in(nbytes) - RESERVED_BLOCKS)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that one sequence takes."""
        return -(-tokens // self.block_size)

    def sequences(self, blocks: int, tokens: int) -> int:
        """Sequences of `tokens` that `blocks` hold; no block serves two of them."""
        return blocks // self.blocks_for(tokens)


@dataclass(frozen=True, slots=True)
class Room:
    """What one card's KV cache holds."""

    blocks: int  # without the reserved one
    tokens: int
    sequences: int  # of the greatest length


@dataclass(frozen=True, slots=True)
class CardBudget:
    """One card, shared out. All in GB.

    Attributes:
        card: the whole memory.
        reserve: kept free for activations, communication buffers and the system.
        weights: of one rank.
        logits: of a full batch.

    Raises:
        InputError: a card without memory, or all of it kept free.
    """

    card: float
    reserve: float
    weights: float
    logits: float

    @classmethod
    def of(cls, card: float, weight_bytes: int, vocab_size: int, reserve: float | None = None) -> CardBudget:
        """The budget of a card of `card` GB; without a `reserve` in GB, RESERVE_SHARE of it is kept free."""
        logits = FULL_BATCH * vocab_size * LOGIT_BYTES
        return cls(card, card * RESERVE_SHARE if reserve is None else reserve, weight_bytes / GB, logits / GB)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.card) and 0 <= self.reserve < self.card):
            raise InputError(
                "must be positive, and the reserve less than the card",
                where="--device-mem, --reserve",
                found=f"{self.card:g} GB, {self.reserve:g} GB",
            )

    @property
    def left(self) -> float:
        """For the KV cache."""
        return self.card - self.reserve - self.weights - self.logits

    @property
    def cache(self) -> int:
        """For the KV cache in whole GB, as npuMemSize has it."""
        return max(0, math.floor(self.left))

    def __str__(self) -> str:
        return (
            f"{self.card:g} GB card - {self.reserve:g} reserve - {self.weights:.1f} weights - {self.logits:.1f} logits"
        )

    def room(self, shape: CacheShape, longest: int, cache: float | None = None) -> Room:
        """What a KV cache of `cache` GB holds; by default the one that the budget leaves.

        Args:
            longest: tokens of the longest sequence.

        Raises:
            InputError: not one longest sequence, or more than the card has beside the weights; with the numbers.
        """
        given = max(0.0, self.cache if cache is None else cache)
        blocks, needed = shape.usable_blocks_in(given * GB), shape.blocks_for(longest)
        if blocks < needed or self.weights + given > self.card:
            raise InputError(
                "the memory of a card does not hold the weights and the KV cache of one request",
                where=f"{longest} tokens on a card of {self.card:g} GB",
                expected=f"{needed} KV blocks of {shape.block_size} tokens ({needed * shape.block_bytes / GB:.1f} GB), "
                f"hence a card of at least {self._least_card(shape, needed):.1f} GB",
                found=f"{blocks} in {given:.1f} GB: {self}",
                advice="Choose a larger --tp when building, a smaller --max-seq-len or a 16-bit dtype, or correct "
                "--device-mem and the reserve.",
            )
        return Room(blocks, blocks * shape.block_size, shape.sequences(blocks, longest))

    def _least_card(self, shape: CacheShape, blocks: int) -> float:
        """The smallest card, in tenths of a GB, with the same share kept free that holds so many usable blocks."""
        cache = math.ceil((blocks + RESERVED_BLOCKS) * shape.block_bytes / GB)
        kept_share = self.reserve / self.card
        return math.ceil((cache + self.weights + self.logits) / (1 - kept_share) * 10) / 10


def block_count(gigabytes: int, token_bytes: int, block_size: int, name: str) -> int:
    """Blocks of the model runner's cache: as many as MindIE counts, so that none is handed out that is not there.

    Args:
        name: the argument that says how many `gigabytes`, for the message.

    Raises:
        InputError: not even one fits.
    """
    shape = CacheShape(token_bytes, block_size)
    count = shape.blocks_in(gigabytes * GB)
    if count < 1:
        raise InputError(
            "is too small for one block",
            where=name,
            expected=f"at least {shape.block_bytes} bytes",
            found=f"{gigabytes} GB",
        )
    return count
