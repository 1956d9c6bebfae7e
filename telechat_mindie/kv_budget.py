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

DEFAULT_CARD_GB = 64
"""Memory of a card where nobody says."""

RESERVE_SHARE = 0.2
"""Of a card, kept free: what MindIE leaves with NPU_MEMORY_FRACTION 0.8, the default (MindIE-LLM v3.0.0.beta.2
mindie_llm/model_wrapper/utils/env.py:88)."""

RESERVED_BLOCKS = 1
"""The last block of a cache is for dummy batches and never handed out: MindIE-LLM v3.0.0.beta.2
mindie_llm/connector/common/input_metadata_builder.py:155. The embedded engine does the same."""

BLOCK_SIZES = (16, 32, 64, 128)
"""Block sizes that an NPU's PagedAttention has a tiling for, on the custom and on the asdops kernel. The CPU takes
any."""

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
        reserve_is_share: another card keeps another `reserve` free, RESERVE_SHARE of it.

    Raises:
        InputError: a card without memory, or all of it kept free.
    """

    card: float
    reserve: float
    weights: float
    logits: float
    reserve_is_share: bool = False

    @classmethod
    def of(cls, card: float, weight_bytes: int, vocab_size: int, reserve: float | None = None) -> CardBudget:
        """The budget of a card of `card` GB; without a `reserve` in GB, RESERVE_SHARE of it is kept free."""
        logits = FULL_BATCH * vocab_size * LOGIT_BYTES
        kept = card * RESERVE_SHARE if reserve is None else reserve
        return cls(card, kept, weight_bytes / GB, logits / GB, reserve is None)

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

    def cache_for(self, npu_mem_size: float) -> float:
        """GB of KV cache that an npuMemSize stands for: with -1 the worker takes what is left."""
        return max(0.0, self.left if npu_mem_size == -1 else npu_mem_size)

    def holds(self, cache: float) -> bool:
        """Whether weights and so many GB of KV cache fit the card; that no reserve is left is the user's own choice."""
        return self.weights + cache <= self.card

    def room(self, shape: CacheShape, longest: int, npu_mem_size: float | None = None) -> Room:
        """What the KV cache holds.

        Args:
            longest: tokens of the longest sequence.
            npu_mem_size: as the config has it; None for the one that follows from the budget.

        Raises:
            InputError: not one longest sequence, or more than the card has beside the weights; with the numbers.
        """
        chosen = npu_mem_size not in (None, -1, self.cache)  # by the user, whatever the card
        cache = self.cache if npu_mem_size is None else self.cache_for(npu_mem_size)
        if chosen and not self.holds(cache):
            raise InputError(
                "is more than a card has beside the weights",
                where=f"npuMemSize {cache:g}",
                expected=f"at most {self.card - self.weights:.1f} GB",
                found=str(self),
                advice="Lower it, or leave it to be computed.",
            )
        blocks, needed = shape.usable_blocks_in(cache * GB), shape.blocks_for(longest)
        if blocks < needed:
            size = (needed + RESERVED_BLOCKS) * shape.block_bytes / GB
            whole = math.ceil(size)
            card = self._least_card(size if npu_mem_size == -1 else whole)
            least = f"an npuMemSize of at least {whole}" if chosen else f"a card of at least {card:.1f} GB"
            raise InputError(
                "the memory of a card does not hold the weights and the KV cache of one request",
                where=f"{longest} tokens on a card of {self.card:g} GB",
                expected=f"{needed} KV blocks of {shape.block_size} tokens ({size:.1f} GB), hence {least}",
                found=f"{blocks} in {cache:.1f} GB: {self}",
                advice="Choose a larger --tp when building, a smaller --max-seq-len or a 16-bit dtype, or correct "
                "--device-mem and the reserve.",
            )
        return Room(blocks, blocks * shape.block_size, shape.sequences(blocks, longest))

    def _least_card(self, cache: float) -> float:
        """The smallest card, in tenths of a GB, that leaves so many GB for the KV cache."""
        least = cache + self.weights + self.logits
        least = least / (1 - RESERVE_SHARE) if self.reserve_is_share else least + self.reserve
        return math.ceil(least * 10 + 1e-6) / 10  # rounding may not take the last byte


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
