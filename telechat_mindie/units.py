"""Sizes: units, the limits of integers, and bytes as people read them."""

from __future__ import annotations

GB = 1 << 30
"""Bytes of what MindIE and npu-smi call a GB (npuMemSize; MindIE-LLM v3.0.0.beta.2 kvcache_settings.py)."""

INT32_MAX = 2**31 - 1
UINT32_MAX = 2**32 - 1


def format_duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def format_bytes(count: float) -> str:
    """`5.0 MiB`, `453.1 GiB`: binary units, one digit after the point."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
