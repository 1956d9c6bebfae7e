"""Which numbers of which cards hold a model, and how many tokens and sequences besides."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from telechat_mindie.config import TelechatConfig
from telechat_mindie.errors import InputError
from telechat_mindie.kv_budget import CacheShape, CardBudget, Room
from telechat_mindie.units import GB

CARD_SIZES = (32, 64)
"""GB of the cards that the Ascend path is made for: Ascend910B4 has 32, Ascend910B1 to B3 and each die of an
Ascend910_93 have 64."""

USUAL_TP = (1, 2, 4, 8)
"""Tensor parallel sizes within one server of eight cards."""


@dataclass(frozen=True)
class Fit:
    """A model on `tp` cards of `card` GB.

    Attributes:
        rank_bytes: weights of each card.
        budget: how a card is shared out.
        npu_mem_size: as the service config has it, in whole GB; -1: what is left.
        longest: tokens of the longest sequence.
        room: what the KV cache holds; no sequence where it is too small for the longest.
        refusal: why it is.
    """

    tp: int
    card: float
    rank_bytes: int
    budget: CardBudget
    npu_mem_size: int
    longest: int
    room: Room
    refusal: str = ""

    @property
    def cache(self) -> float:
        """GB of KV cache."""
        return self.budget.cache_for(self.npu_mem_size)

    def __str__(self) -> str:
        tokens, sequences = self.room.tokens, self.room.sequences
        if not tokens:
            return "too small"
        return f"{tokens:,} tokens, {sequences:,} x {self.longest:,}" if sequences else f"{tokens:,} tokens, too few"

    def as_dict(self) -> dict[str, Any]:
        """For --json: the same keys whether it fits or not."""
        return {
            "tp": self.tp,
            "device_bytes": int(self.card * GB),
            "rank_bytes": self.rank_bytes,
            "reserve_bytes": int(self.budget.reserve * GB),
            "fits": self.room.sequences > 0,
            "npu_mem_gb": self.npu_mem_size,
            "kv_tokens": self.room.tokens,
            "sequences": self.room.sequences,
            "refusal": self.refusal or None,
        }


@dataclass(frozen=True)
class Fitting:
    """What is asked of cards: a model's weights, and sequences of up to `longest` tokens in blocks of `block_size`.

    Attributes:
        dtype: of keys and values.
        rank_bytes: weights of each card, by how many share the model.
        allowed_tp: how many can.
        takes_what_is_left: the cache is all that a card has left, not whole GB of it.
    """

    config: TelechatConfig
    dtype: str
    block_size: int
    longest: int
    rank_bytes: Callable[[int], int]
    allowed_tp: Sequence[int]
    takes_what_is_left: bool = False

    def on(self, tp: int, cards: Iterable[float]) -> list[Fit]:
        """On `tp` cards of each of these sizes, in GB. Raises ConfigError where the model has no such ranks."""
        rank_bytes = self.rank_bytes(tp)
        shape = CacheShape(self.config.kv_bytes_per_token(self.dtype, tp), self.block_size)
        found = []
        for card in cards:
            budget = CardBudget.of(card, rank_bytes, self.config.vocab_size)
            size = -1 if self.takes_what_is_left else budget.cache
            try:
                room, refusal = budget.room(shape, self.longest, size), ""
            except InputError as error:
                blocks = shape.usable_blocks_in(budget.cache_for(size) * GB)
                room, refusal = Room(blocks, blocks * self.block_size, 0), str(error)
            found.append(Fit(tp, card, rank_bytes, budget, size, self.longest, room, refusal))
        return found

    def table(self, tp: int, cards: Sequence[float]) -> list[list[Fit]]:
        """A row for `tp` and each usual number of cards that the model can be divided over, a column for each size."""
        sizes = sorted({tp, *USUAL_TP} & {tp, *self.allowed_tp})
        return [self.on(size, cards) for size in sizes]


def smallest(table: Sequence[Sequence[Fit]]) -> Fit | None:
    """The fit on the least memory, and of those on the fewest cards; None where nothing fits."""
    fitting = [fit for row in table for fit in row if fit.room.sequences]
    return min(fitting, key=lambda fit: (fit.tp * fit.card, fit.tp), default=None)
