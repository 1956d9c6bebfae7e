"""Sizes inside a training step that both its graph and the estimate of its memory go by. No framework is imported."""

from __future__ import annotations

STRETCH = 128
"""Queries that attend together at least; a row is cut into at most MAX_STRETCHES, for the graph grows with them."""

MAX_STRETCHES = 8


def stretches(length: int) -> list[tuple[int, int]]:
    """[begin, end) of the queries of a row that attend together, to the keys before `end`."""
    size = max(STRETCH, -(-length // MAX_STRETCHES))
    return [(begin, min(begin + size, length)) for begin in range(0, length, size)]


def capacity(tokens: int, chosen: int, experts: int, factor: float) -> int:
    """Choices that an expert takes of those that `tokens` make."""
    return min(tokens, -int(-(chosen * tokens * factor) // experts))
