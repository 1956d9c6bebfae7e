"""Which numbers of which cards hold a model, and how many tokens and sequences besides."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from telechat_mindie.checkpoint.mapping import Target
from telechat_mindie.checkpoint.plan import make_plan
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
        longest: tokens of the longest sequence.
        room: what the KV cache holds; no sequence where it is too small for the longest.
        refusal: why it is.
    """

    tp: int
    card: float
    rank_bytes: int
    budget: CardBudget
    longest: int
    room: Room
    refusal: str = ""

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
            "npu_mem_gb": self.budget.cache,
            "kv_tokens": self.room.tokens,
            "sequences": self.room.sequences,
            "refusal": self.refusal or None,
        }


@dataclass(frozen=True)
class Fitting:
    """What is asked of cards: a model's weights, and sequences of up to `longest` tokens in blocks of `block_size`."""

    config: TelechatConfig
    targets: Sequence[Target]
    dtype: str
    block_size: int
    longest: int

    def on(self, tp: int, cards: Iterable[float]) -> list[Fit]:
        """On `tp` cards of each of these sizes, in GB. Raises ConfigError where the model has no such ranks."""
        rank_bytes = make_plan(self.config, self.targets, self.dtype, tp).rank_bytes
        shape = CacheShape(self.config.kv_bytes_per_token(self.dtype, tp), self.block_size)
        found = []
        for card in cards:
            budget = CardBudget.of(card, rank_bytes, self.config.vocab_size)
            try:
                room, refusal = budget.room(shape, self.longest), ""
            except InputError as error:
                blocks = shape.usable_blocks_in(budget.cache * GB)
                room, refusal = Room(blocks, blocks * self.block_size, 0), str(error)
            found.append(Fit(tp, card, rank_bytes, budget, self.longest, room, refusal))
        return found

    def table(self, tp: int, cards: Sequence[float]) -> list[list[Fit]]:
        """A row for `tp` and each usual number of cards that the model can be divided over, a column for each size."""
        sizes = sorted({tp, *USUAL_TP} & {tp, *self.config.allowed_tp()})
        return [self.on(size, cards) for size in sizes]


def smallest(table: Sequence[Sequence[Fit]]) -> Fit | None:
    """The fit on the least memory, and of those on the fewest cards; None where nothing fits."""
    fitting = [fit for row in table for fit in row if fit.room.sequences]
    return min(fitting, key=lambda fit: (fit.tp * fit.card, fit.tp), default=None)
