"""The largest values of each row without sorting the rows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_HEADS_PER_WANTED = 4  # more heads give a tighter bound and cost a longer sort; 2 to 8 measure the same
_GROUP = 64  # values of a group at most
_SHORT_ROW = 1 << 14  # values that are looked at once more sooner than the groups are looked up


def top_n(scores: NDArray[np.float32], counts: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Of each row its `counts[row]` largest values in descending order; of equal values the lower index first.

    The row is dealt into groups. A group whose largest value, its head, reaches a bound has a value that does, so the
    n-th largest head is a bound that n values reach, and only the groups that reach it hold such values. One pass over
    everything and a short sort instead of a long one.

    Args:
        scores: [R, V], without NaN.
        counts: [R], at least 1; above V it means V.

    Returns:
        Values [R, W] padded with -inf, and their indices [R, W]; W is the largest count.
    """
    size, vocab_size = scores.shape
    counts = np.minimum(counts, vocab_size)
    width = int(counts.max())
    groups = min(vocab_size, max(width * _HEADS_PER_WANTED, vocab_size // _GROUP))
    dealt = vocab_size // groups * groups  # what does not fill a group is looked at by itself
    heads = scores[:, :dealt].reshape(size, -1, groups).max(axis=1)
    bounds = np.sort(heads, axis=1)[np.arange(size), groups - counts]
    row, column = _reaching(scores, heads, bounds, dealt)
    per_row = np.bincount(row, minlength=size)  # candidates
    place = np.arange(len(row)) - np.repeat(np.cumsum(per_row) - per_row, per_row)
    values = np.full((size, per_row.max()), -np.inf, scores.dtype)
    indices = np.zeros(values.shape, np.int64)
    values[row, place] = scores[row, column]
    indices[row, place] = column
    # Candidates stand in order of their index, and a stable sort keeps that order among equals.
    order = np.argsort(-values, axis=1, kind="stable")[:, :width]
    values = np.take_along_axis(values, order, axis=1)
    values[np.arange(width) >= counts[:, None]] = -np.inf
    return values, np.take_along_axis(indices, order, axis=1)


def _reaching(
    scores: NDArray[np.float32], heads: NDArray[np.float32], bounds: NDArray[np.float32], dealt: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows and columns, in their order, of the values that reach their row's bound."""
    groups = heads.shape[1]
    if scores.shape[1] <= _SHORT_ROW:
        row, column = divmod(np.flatnonzero(scores >= bounds[:, None]), scores.shape[1])
        return row, column
    row, group = np.nonzero(heads >= bounds[:, None])
    member, place = np.nonzero(scores[row[:, None], group[:, None] + np.arange(0, dealt, groups)] >= bounds[row, None])
    rest_row, rest = np.nonzero(scores[:, dealt:] >= bounds[:, None])
    rows = np.concatenate([row[member], rest_row])
    columns = np.concatenate([group[member] + place * groups, rest + dealt])
    order = np.lexsort((columns, rows))
    return rows[order], columns[order]
