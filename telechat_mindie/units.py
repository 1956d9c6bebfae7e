"""Sizes: units, the limits of integers, and bytes as people read them."""

from __future__ import annotations

GB = 1 << 30
"""Bytes of what MindIE and npu-smi call a GB (npuMemSize; MindIE-LLM v3.0.0.beta.2 kvcache_settings.py)."""

INT32_MAX = 2**31 - 1
UINT32_MAX = 2**32 - 1


def format_bytes(count: float) -> str:
    """`5.0 MiB`, `453.1 GiB`: binary units, one digit after the point."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def format_seconds(seconds: float) -> str:
    """`48 s`, `7:05 min`, `3:20 h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02} h"
