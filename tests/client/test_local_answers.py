"""The embedded engine's answers, where a thought's tags are special tokens, behind which a text begins with a space."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.scripted import Scripted

from telechat_mindie.client.answers import LocalAnswers
from telechat_mindie.client.dialects import Sampling
from telechat_mindie.commands.generate import generate
from telechat_mindie.engine.local import LocalEngine
from telechat_mindie.text.thoughts import Piece

TEMPLATE = "{% for m in messages %}<_user>{{ m.content }}{% endfor %}<_bot>{# <think> #}"
TAGS = {"9": {"content": "<think>", "special": True}, "10": {"content": "</think>", "special": True}}


@pytest.fixture
def model_path(monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory whose model thinks before it speaks."""
    server = Scripted(TEMPLATE, added_tokens_decoder=TAGS)
    server.say("<think>想</think>好")
    local = LocalEngine(server.host.directory, server.tokenizer, server.host.engine)
    monkeypatch.setattr("telechat_mindie.engine.local.open_local", lambda _: local)
    return server.host.directory.path


def test_a_chat_tells_the_thought_apart(model_path: Path) -> None:
    pieces: list[Piece] = []
    LocalAnswers(model_path, Sampling()).answer([{"role": "user", "content": "你好"}], pieces.append)
    assert "".join(piece.text for piece in pieces if piece.is_thought) == " 想"
    assert "".join(piece.text for piece in pieces if not piece.is_thought) == " 好"


def test_generate_leaves_the_tags_between_thought_and_answer(
    model_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generate(model_path, "你好", raw=False, as_json=True)
    assert json.loads(capsys.readouterr().out)["text"] == "<think> 想</think> 好"


def test_the_sampling_that_a_user_names_reaches_the_engine(model_path: Path) -> None:
    given = {"temperature": 0.5, "top_k": 3, "top_p": 0.5, "repetition_penalty": 1.5, "seed": 7, "ignore_eos": True}
    params = LocalAnswers(model_path, Sampling(max_tokens=9, **given))._params
    assert {name: getattr(params, name) for name in given} == given
    assert params.max_new_tokens == 9 and params.do_sample
