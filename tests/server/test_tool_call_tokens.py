"""Tool calls whose tags are special tokens of the vocabulary: from a client's tools to `tool_calls`, and back."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from helpers.checkpoints import make_checkpoint
from helpers.null_model import NullRunner
from helpers.tiny_tokenizer import train_tiny_tokenizer

from telechat_mindie.engine.engine import Engine
from telechat_mindie.model_dir.build import build
from telechat_mindie.model_dir.layout import ModelDir
from telechat_mindie.server.app import Plane, make_app
from telechat_mindie.server.host import EngineHost
from telechat_mindie.server.service import Service
from telechat_mindie.server.settings import plain_settings
from telechat_mindie.text.tokenizer import TelechatTokenizer

TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
ANSWER = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "北京"}}\n</tool_call><_end>'
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


def ask(model: Path, body: dict[str, Any]) -> tuple[str, TelechatTokenizer]:
    """The answer of a model that says ANSWER, through the server's own routes."""
    directory, tokenizer = ModelDir.open(model), TelechatTokenizer.from_pretrained(model)
    settings = dataclasses.replace(plain_settings(directory), model_name="scripted")
    runner = NullRunner(400, block_size=settings.engine.block_size, vocab_size=directory.config.vocab_size)
    host = EngineHost(directory, tokenizer, Engine(runner, tokenizer, settings.engine))
    host.start()
    script = iter(tokenizer.encode(ANSWER, bare_prompt="raw"))

    def say(_: dict[str, Any], logits: Any) -> None:
        logits[:, next(script)] = 1000

    runner.after_forward = say

    async def post() -> str:
        service = Service(settings, host)
        transport = httpx.ASGITransport(make_app(service, [Plane.BUSINESS], True))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            response = await client.post("/v1/chat/completions", json={"model": "scripted", "max_tokens": 200, **body})
        service.close()
        assert response.status_code == 200, response.text
        return response.text

    try:
        return asyncio.run(post()), tokenizer
    finally:
        host.stop()


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("stream", [True, False])
def test_a_call_and_its_history(model: Path, skip: bool, stream: bool) -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": "weather?"}]
    body = {"messages": messages, "tools": [TOOL], "stream": stream, "skip_special_tokens": skip}
    text, tokenizer = ask(model, body)
    if stream:
        events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        deltas = [event["choices"][0]["delta"] for event in events]
        calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
        content, reason = "".join(delta.get("content") or "" for delta in deltas), events[-1]["choices"][0]
    else:
        reason = json.loads(text)["choices"][0]
        content, calls = reason["message"]["content"], reason["message"]["tool_calls"]
    assert content.strip() == ""
    assert reason["finish_reason"] == "tool_calls"
    (call,) = calls
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("get_weather", {"city": "北京"})
    # The client sends it back, and the prompt has the very tokens that the model said.
    history = [*messages, {"role": "assistant", "content": None, "tool_calls": [call]}]
    ids = tokenizer.apply_chat_template(history, [TOOL])
    said = tokenizer.encode(ANSWER, bare_prompt="raw")
    assert ids[-len(said) - 2 :][: len(said)] == said


def test_without_tools_they_are_skipped_like_the_others(model: Path) -> None:
    body = {"messages": [{"role": "user", "content": "?"}], "skip_special_tokens": True}
    assert "tool_call>" not in ask(model, body)[0]
