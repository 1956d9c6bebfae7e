"""`chat` in a real terminal: what keys and a paste do there."""

from __future__ import annotations

import json
import stat
import sys

import pytest
from helpers.fake_mindie import FakeMindie
from helpers.terminal import Terminal

readline = pytest.importorskip("readline")
IS_GNU = "libedit" not in (readline.__doc__ or "")
VERSION = getattr(readline, "_READLINE_LIBRARY_VERSION", "0")


@pytest.fixture
def fake():
    with FakeMindie(pieces=["好", "的"]) as fake:
        yield fake


def terminal_of(fake, state, *options):
    return Terminal([sys.executable, "-m", "telechat_mindie", "chat", fake.url, *options], "xterm", state)


def asked(fake):
    return [body["messages"][-1]["content"] for body in fake.bodies("/v1/chat/completions")]


@pytest.mark.skipif(not IS_GNU or VERSION < "8.1", reason="only GNU readline from 8.1 on knows a paste from typing")
def test_a_paste_is_one_message(fake, tmp_path):
    with terminal_of(fake, tmp_path) as terminal:
        terminal.wait_for("> ")
        terminal.paste('def f():\n\treturn "你好"\n\n/usr/bin\n')
        terminal.type("\r")
        assert "tokens/s]" in terminal.wait_for("tokens/s]")
        terminal.wait_for("> ")
        terminal.paste("/system 甲\n乙")
        terminal.type("\r")
        terminal.wait_for("the system text is set]")
        terminal.wait_for("> ")
        terminal.paste('"""/x\n"""')
        terminal.type("\r")
        terminal.wait_for("tokens/s]")
    assert asked(fake) == ['def f():\n\treturn "你好"\n\n/usr/bin', "/x"]
    assert fake.bodies("/v1/chat/completions")[-1]["messages"][0]["content"] == "甲\n乙"


def test_history_across_starts_tab_and_commands(fake, tmp_path):
    with terminal_of(fake, tmp_path) as terminal:
        terminal.wait_for("> ")
        terminal.type("一个问题\r")
        assert "好的\r\n[4 tokens in, 2 out, first after" in terminal.wait_for("tokens/s]")
        terminal.wait_for("> ")
        terminal.type("/se\t")
        terminal.wait_for("/set")
        terminal.type("temp\t0.5\r")
        assert "temperature" in terminal.wait_for("temperature 0.5]")
        terminal.wait_for("> ")
        terminal.type("/bye\r")
        assert terminal.returncode() == 0
    history = tmp_path / "telechat-mindie" / "chat_history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert [json.loads(line) for line in history.read_text().splitlines()] == [
        "一个问题",
        "/set temperature 0.5",
        "/bye",
    ]
    with terminal_of(fake, tmp_path) as terminal:
        terminal.wait_for("> ")
        terminal.type("\x1b[A" * 3)  # up, thrice
        terminal.wait_for("一个问题")
        terminal.type("\r")
        terminal.wait_for("tokens/s]")
    assert asked(fake) == ["一个问题", "一个问题"]


def test_no_history(fake, tmp_path):
    with terminal_of(fake, tmp_path, "--no-history") as terminal:
        terminal.wait_for("> ")
        terminal.type("secret\r")
        terminal.wait_for("tokens/s]")
    assert asked(fake) == ["secret"] and list(tmp_path.iterdir()) == []
