"""Progress: a bar for who watches, a line now and then for a log file, nothing for who wants none."""

from __future__ import annotations

import logging
import os
import pty
import subprocess
import sys
import time

import pytest

from telechat_mindie.commands import output
from telechat_mindie.units import format_bytes, format_duration

CODE = """
import logging, sys, time
from telechat_mindie.commands import messages, output
output.LINE_SECONDS = 0.1
with messages.on_stderr(), output.byte_progress("building") as start:
    advance = start(4 << 20)
    for _ in range(4):
        time.sleep(0.06)
        advance(1 << 20)
"""


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(output, "LINE_SECONDS", 0.05)


def wait_for_lines(capsys, count):
    said, give_up = "", time.monotonic() + 10
    while said.count("\n") < count and time.monotonic() < give_up:
        time.sleep(0.01)
        said += capsys.readouterr().err
    return said.splitlines()


def test_a_line_every_ten_seconds():
    assert output.LINE_SECONDS == 10


def test_a_line_now_and_then(impatient, capsys):
    with output.byte_progress("building") as start:
        start(10 << 20)(5 << 20)
        lines = wait_for_lines(capsys, 2)
    assert len(lines) >= 2
    assert all(line.startswith("building: 5.0 MiB of 10.0 MiB (50%), ") and line.endswith(" left") for line in lines)
    capsys.readouterr()
    time.sleep(0.15)
    assert capsys.readouterr().err == ""  # it ended with its block


def test_no_line_before_there_is_a_total_and_none_when_quiet(impatient, capsys, monkeypatch):
    with output.byte_progress("building"):
        time.sleep(0.12)
    monkeypatch.setattr(output.logger, "level", logging.WARNING)
    with output.byte_progress("building") as start:
        start(10)(5)
        time.sleep(0.12)
    assert capsys.readouterr().err == ""


def test_a_total_that_is_not_known():
    state = output.ProgressState("requests", str, None)
    assert str(state) == "requests: 0"
    state.advance(1234)
    assert str(state).startswith("requests: 1234, ") and str(state).endswith("/s")


def test_a_terminal_shows_a_bar_and_no_lines():
    master, slave = pty.openpty()
    done = subprocess.Popen([sys.executable, "-c", CODE], stderr=slave, env={**os.environ, "TERM": "xterm"})
    os.close(slave)
    said = b""
    while True:
        try:
            piece = os.read(master, 4096)
        except OSError:  # Linux's word for the end of a terminal
            break
        if not piece:
            break
        said += piece
    os.close(master)
    assert done.wait(30) == 0
    assert b"4.0 MiB of 4.0 MiB (100%)" in said and b"\x1b[" in said and b"building: " not in said


def test_durations_and_bytes():
    assert [format_duration(seconds) for seconds in (3, 89, 90, 5000, 9000)] == [
        "3 s",
        "89 s",
        "2 min",
        "83 min",
        "2.5 h",
    ]
    assert format_bytes(1536) == "1.5 KiB"
