"""Weights are the pages of their files, which all processes share, and the system is asked for them ahead."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import time
from pathlib import Path

import pytest
from helpers.server import nano_directory

from telechat_mindie.backend.multi_rank import read_ahead


def mapped(name: str) -> list[tuple[int, int]]:
    """[begin, end) of what this process has mapped of files of that name."""
    pattern = re.compile(rf"([0-9a-f]+)-([0-9a-f]+) .*/{re.escape(name)}$", re.M)
    return [(int(begin, 16), int(end, 16)) for begin, end in pattern.findall(Path("/proc/self/maps").read_text())]


def test_a_runner_computes_with_the_files_own_pages():
    from telechat_mindie import ModelRunner
    from telechat_mindie.model.kv_cache import address_of

    runner = ModelRunner(str(nano_directory()), 0, 0, 16, num_blocks=4)
    pages = mapped("model-00001-of-00001.safetensors")
    weights = [parameter for parameter in runner.model.get_parameters() if parameter.name.startswith(("model.", "lm_"))]
    assert len(weights) > 30
    for weight in weights:
        assert any(begin <= address_of(weight) < end for begin, end in pages), weight.name


def is_cached(file: Path) -> bool:
    """Whether all of the file is in the system's page cache (mincore asks without reading)."""
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY) as pages:
        resident = (ctypes.c_ubyte * -(-len(pages) // mmap.PAGESIZE))()
        start = ctypes.c_char.from_buffer(pages)
        libc = ctypes.CDLL(None, use_errno=True)
        failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(len(pages)), resident)
        del start  # or the map could not be closed
    assert not failed
    return all(resident)


def test_files_are_read_ahead(tmp_path):
    file = tmp_path / "weights"
    with file.open("wb") as opened:
        opened.write(os.urandom(4 << 20))
        opened.flush()
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if is_cached(file):
        pytest.skip("this file system keeps all it has in memory")
    read_ahead([tmp_path / "absent", file])
    deadline = time.monotonic() + 30
    while not is_cached(file) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert is_cached(file)
