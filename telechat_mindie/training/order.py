"""In which order the rows are trained on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

BLANK = -1
"""The number of a row that only fills up the last step: it trains nothing."""


@dataclass(frozen=True)
class Order:
    """Every row once an epoch, and the epochs one behind the other, so that each step but the last has all its rows.

    It follows from these numbers alone, on any machine.

    Args:
        rows: how many there are.
        seed: of the shuffles.
        shuffle: anew for every epoch; else the rows stay in the order of the data.
        end: rows that are trained on in all; None without end.
    """

    rows: int
    seed: int
    shuffle: bool = True
    end: int | None = None

    def take(self, begin: int, count: int) -> np.ndarray:
        """The numbers of `count` rows from the `begin`-th that is trained on; BLANK behind the end."""
        places = np.arange(begin, begin + count)
        numbers = np.empty(count, np.int64)
        for epoch in np.unique(places // self.rows).tolist():
            chosen = places // self.rows == epoch
            numbers[chosen] = self._epoch(epoch)[places[chosen] % self.rows]
        if self.end is not None:
            numbers[places >= self.end] = BLANK
        return numbers

    def position(self, taken: int) -> tuple[int, int]:
        """The epoch and the row in it that comes next, once `taken` rows were trained on; both from 0."""
        return divmod(taken, self.rows)

    def _epoch(self, epoch: int) -> np.ndarray:
        return _shuffled(self.rows, self.seed, epoch) if self.shuffle else np.arange(self.rows)


@lru_cache(maxsize=2)
def _shuffled(rows: int, seed: int, epoch: int) -> np.ndarray:
    # numpy keeps the stream of RandomState as it is for good, that of default_rng not (NEP 19).
    return np.random.RandomState([seed, epoch]).permutation(rows)


def held_out(rows: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of the rows to train on and, at least one and not all, of those to evaluate on; both ascending."""
    count = min(max(1, round(rows * share)), rows - 1)
    shuffled = np.random.RandomState([seed]).permutation(rows)
    return np.sort(shuffled[count:]), np.sort(shuffled[:count])
