"""Examples put together into rows of one length."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from telechat_mindie.data.examples import Example
from telechat_mindie.text.control_tokens import CONTROL_IDS

IGNORED = -100
"""The label of a token that trains nothing."""

PADDING = CONTROL_IDS["<_pad>"]

WINDOW = 256
"""Rows that are open at a time. More fills 8,192-token rows no better; each takes 64 KB."""


@dataclass
class Row:
    """`token_ids` and `labels`, [row length] int32 each; a label is the token's own id, the model shifts them."""

    length: int
    examples: list[Example] = field(default_factory=list)

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        token_ids = np.full(self.length, PADDING, np.int32)
        labels = np.full(self.length, IGNORED, np.int32)
        at = 0
        for example in self.examples:
            end = at + len(example)
            token_ids[at:end] = example.token_ids
            labels[at:end] = np.where(example.trained, example.token_ids, IGNORED)
            at = end
        return token_ids, labels


class Packer:
    """Best fit over a bounded window: an example goes into the open row that it fills best.

    Where none has room a row is opened, and the fullest is given out once WINDOW are open. The same examples in the
    same order give the same rows.
    """

    def __init__(self, length: int, window: int = WINDOW) -> None:
        self._length = length
        self._window = window
        self._open: list[tuple[int, int, Row]] = []  # (room, serial number, row), the fullest first
        self._opened = 0

    def add(self, example: Example) -> Iterator[Row]:
        """Rows that are complete with this example, which must not be longer than a row."""
        at = bisect_left(self._open, (len(example),))
        if at < len(self._open):
            room, number, row = self._open.pop(at)
        else:
            room, number, row = self._length, self._opened, Row(self._length)
            self._opened += 1
        row.examples.append(example)
        room -= len(example)
        if not room:
            yield row
            return
        insort(self._open, (room, number, row))
        if len(self._open) > self._window:
            yield self._open.pop(0)[2]

    def rest(self) -> Iterator[Row]:
        """The rows that are still open, in the order in which they were opened."""
        for _, _, row in sorted(self._open, key=lambda entry: entry[1]):
            yield row
        self._open.clear()
