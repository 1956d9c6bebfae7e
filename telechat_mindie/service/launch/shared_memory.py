"""POSIX shared memory and semaphores that a daemon leaves in /dev/shm when it is killed."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Collection
from pathlib import Path

FOLDER = Path("/dev/shm")


def names() -> set[str]:
    """What lies there now."""
    with contextlib.suppress(OSError):
        return {path.name for path in FOLDER.iterdir()}
    return set()


def remove_left(before: Collection[str], pids: Collection[int]) -> list[str]:
    """Remove what processes that have ended left behind, and say which.

    MindIE puts the daemon's pid into every name: `PID_N_execute_request`, `sem.PID_N_...`,
    `llm_tokenizer_shared_memory_PID_N` (MindIE-LLM v3.0.0.beta.2 src/executor/executor.cpp:199,
    src/server/tokenizer/infer_tokenizer.cpp:485). Only names that hold one of `pids`, are new since `before`, and
    belong to this user are removed.

    Args:
        before: names that were there before the launch.
        pids: processes of the launch, all of them dead.
    """
    removed = []
    for name in sorted(names() - set(before)):
        numbers = set(map(int, re.findall(r"\d+", name)))
        path = FOLDER / name
        with contextlib.suppress(OSError):
            if numbers & set(pids) and path.lstat().st_uid == os.geteuid():
                path.unlink()
                removed.append(name)
    return removed
