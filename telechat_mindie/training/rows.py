"""Rows of tokens as a step takes them: what is predicted, what counts, and who sees whom."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from telechat_mindie.data.packing import IGNORED
from telechat_mindie.errors import InputError
from telechat_mindie.text.control_tokens import CONTROL_IDS

_START, _SYSTEM = CONTROL_IDS["<_start>"], CONTROL_IDS["<_system>"]


@dataclass(frozen=True)
class Batch:
    """Rows as `preprocess` writes them: [rows, L + 1] int32 each. A label is its token's own id, or IGNORED.

    Raises:
        InputError: two arrays that are not matrices of one shape with at least two columns.
    """

    input_ids: np.ndarray
    labels: np.ndarray

    def __post_init__(self) -> None:
        shape = self.input_ids.shape
        if len(shape) != 2 or shape[1] < 2 or self.labels.shape != shape or not shape[0]:
            found = f"{list(shape)} and {list(self.labels.shape)}"
            raise InputError(
                "are not rows of one length", where="input_ids, labels", expected="[rows, L + 1]", found=found
            )

    def part(self, index: int, count: int) -> Batch:
        """The `index`-th of `count` equal parts.

        Raises:
            InputError: the rows cannot be divided so.
        """
        rows = len(self.input_ids)
        if rows % count:
            raise InputError(
                "cannot be divided over the data parallel ranks",
                where="rows of a batch",
                expected=f"a multiple of {count}",
                found=rows,
            )
        share = slice(index * rows // count, (index + 1) * rows // count)
        return Batch(self.input_ids[share], self.labels[share])

    def counted(self, pad_id: int) -> np.ndarray:
        """[rows, L] bool: predictions that the loss counts: of a label, from a token that is no padding."""
        counted: np.ndarray = (self.labels[:, 1:] != IGNORED) & (self.input_ids[:, :-1] != pad_id)
        return counted

    def tokens(self, pad_id: int) -> int:
        """Predictions that the loss counts."""
        return int(self.counted(pad_id).sum())


def documents(input_ids: np.ndarray) -> np.ndarray:
    """[rows, L] int32: the number of the document of its row that each token belongs to.

    A document begins at `<_start>`, or in rows without one at `<_system>`, with which the chat template opens a
    conversation. The recipe's rows have every `<_start>` at the front, so each of them is one document.
    """
    start = input_ids == _START
    starts = np.where(start.any(1, keepdims=True), start, input_ids == _SYSTEM)
    follows = np.zeros_like(starts)
    follows[:, 1:] = starts[:, :-1]
    numbers: np.ndarray = np.cumsum(starts & ~follows, axis=1, dtype=np.int32)
    return numbers


def positions_within(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each token's position in its document, and its document's length; [rows, L] int32 both."""
    rows, length = numbers.shape
    begins = np.ones((rows, length), bool)
    begins[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    starts = np.flatnonzero(begins)  # of the rows laid end to end; every row begins one
    lengths = np.diff(np.append(starts, rows * length))
    positions = np.arange(rows * length) - np.repeat(starts, lengths)
    shape = (rows, length)
    return positions.reshape(shape).astype(np.int32), np.repeat(lengths, lengths).reshape(shape).astype(np.int32)
