"""A layer's activations: [T, h] flat, or with an axis of one beside the tokens, [B, 1, h] for decode, else [1, T, h].

Both helpers are parts of a graph, and leave nothing in it where there is nothing to do.
"""

from __future__ import annotations

from mindspore import Tensor, ops


def flat(x: Tensor, width: int) -> Tensor:
    """[T, width] of any layout."""
    return x if x.ndim == 2 else x.reshape(-1, width)


def laid_out(x: Tensor, like: Tensor, width: int) -> Tensor:
    """[T, width] in the layout of `like`."""
    return x if like.ndim == 2 else x.reshape(_three_axes(like.shape, width))


def _three(shape: tuple[int | None, ...], width: int) -> tuple[int, int, int]:
    # An axis of None, a size that only the call knows, is the one that is not 1.
    return (1, -1, width) if shape[0] == 1 else (-1, 1, width)


_three_axes = ops.constexpr(_three)
