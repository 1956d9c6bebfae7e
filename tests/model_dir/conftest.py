"""Quantised directories, made once: tests change copies."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.atb import make_w8a8_directory, make_w8a8sc_directory


@pytest.fixture(scope="session")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("w8a8") / "source"
    make_w8a8_directory(path)
    return path


@pytest.fixture(scope="session")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("w8a8sc") / "source"
    make_w8a8sc_directory(path)
    return path
