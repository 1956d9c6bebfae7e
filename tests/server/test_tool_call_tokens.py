"""Tool calls whose tags are special tokens of the vocabulary: from a client's tools to `tool_calls`, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.checkpoints import make_checkpoint
from helpers.scripted import Scripted
from helpers.tiny_tokenizer import train_tiny_tokenizer

from telechat_mindie.model_dir.build import build

TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
ANSWER = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "北京"}}\n</tool_call>'
NAMES = ["<_start>", "<_end>", "<_pad>", "<_user>", "<_bot>", "<_system>"]
TAGS = {9: "<tool_call>", 10: "</tool_call>", 11: "<tool_response>", 12: "</tool_response>"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tags")
    make_checkpoint(root / "ckpt", seq_length=2048)
    control = ["<_user>", "<_bot>", "<_system>", "<_observation>", "<_sep>", *(f"<_control{n}>" for n in range(1, 5))]
    train_tiny_tokenizer(root / "ckpt", control_symbols=control)
    added = {str(index): {"content": name, "special": True} for index, name in (*enumerate(NAMES, 1), *TAGS.items())}
    (root / "ckpt" / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    build(root / "model", root / "ckpt")
    return root / "model"


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("stream", [True, False])
def test_a_call_and_its_history(model: Path, skip: bool, stream: bool) -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": "weather?"}]
    server = Scripted(model=model)
    found, reason = server.chat(ANSWER, stream, messages, tools=[TOOL], skip_special_tokens=skip)
    assert found["content"].strip() == ""
    assert reason == "tool_calls"
    (call,) = found["tool_calls"]
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("get_weather", {"city": "北京"})
    # The client sends it back, and the prompt has the very tokens that the model said.
    history = [*messages, {"role": "assistant", "content": None, "tool_calls": [call]}]
    ids = server.tokenizer.apply_chat_template(history, [TOOL])
    said = server.tokenizer.encode(f"{ANSWER}<_end>", bare_prompt="raw")
    assert ids[-len(said) - 2 :][: len(said)] == said


def test_without_tools_they_are_skipped_like_the_others(model: Path) -> None:
    found, _ = Scripted(model=model).chat(ANSWER, stream=False, skip_special_tokens=True)
    assert "get_weather" in found["content"] and "tool_call>" not in found["content"] and found["tool_calls"] == []
