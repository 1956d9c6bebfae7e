"""What text that grows has to wait for."""

from __future__ import annotations


def overlap(text: str, tag: str) -> int:
    """Length of the longest end of `text` with which `tag` begins, but is not complete."""
    longest = min(len(text), len(tag) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(tag[:size])), 0)
