"""Sizes as people read them."""

from __future__ import annotations


def format_bytes(count: float) -> str:
    """`5.0 MiB`, `453.1 GiB`: binary units, one digit after the point."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
