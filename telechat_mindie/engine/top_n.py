"""The largest values of each row without sorting the rows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_HEADS_PER_WANTED = 4  # more heads give a tighter bound and cost a longer sort; 2 to 8 measure the same


def top_n(scores: NDArray[np.float32], counts: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Of each row its `counts[row]` largest values in descending order; of equal values the lower index first.

    Args:
        scores: [R, V], without NaN.
        counts: [R], at least 1; at most V are found.

    Returns:
        Values [R, W] padded with -inf, and their indices [R, W]; W is the largest count.
    """
    counts = np.minimum(counts, scores.shape[1])
    width = int(counts.max())
    row, column = divmod(np.flatnonzero(scores >= _bounds(scores, counts, width)[:, None]), scores.shape[1])
    found = np.bincount(row, minlength=len(scores))
    place = np.arange(len(row)) - np.repeat(np.cumsum(found) - found, found)
    values = np.full((len(scores), found.max()), -np.inf, scores.dtype)
    indices = np.zeros(values.shape, np.int64)
    values[row, place] = scores[row, column]
    indices[row, place] = column
    # Candidates stand in order of their index, and a stable sort keeps that order among equals.
    order = np.argsort(-values, axis=1, kind="stable")[:, :width]
    values = np.take_along_axis(values, order, axis=1)
    values[np.arange(width) >= counts[:, None]] = -np.inf
    return values, np.take_along_axis(indices, order, axis=1)


def _bounds(scores: NDArray[np.float32], counts: NDArray[np.int64], width: int) -> NDArray[np.float32]:
    """[R] a value that at least `counts[row]` values of the row reach, and few more.

    The row is dealt into groups; a group whose largest value reaches the bound has a value that does, so the n-th
    largest of the groups' largest values is such a bound. One pass and a short sort instead of a long one.
    """
    groups = min(scores.shape[1], width * _HEADS_PER_WANTED)
    depth = scores.shape[1] // groups
    heads = scores[:, : depth * groups].reshape(len(scores), depth, groups).max(axis=1)
    heads.sort(axis=1)
    bounds: NDArray[np.float32] = heads[np.arange(len(scores)), groups - counts]
    return bounds
