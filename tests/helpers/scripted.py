"""The server's own routes, without a socket, over a model that says what a test wants."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx

from helpers.null_model import EOS_ID, NullRunner
from helpers.server import nano_directory
from telechat_mindie.engine.engine import Engine
from telechat_mindie.model_dir.layout import ModelDir
from telechat_mindie.server.app import Plane, make_app
from telechat_mindie.server.host import EngineHost
from telechat_mindie.server.service import Service
from telechat_mindie.server.settings import plain_settings
from telechat_mindie.text.tokenizer import TelechatTokenizer


class Scripted:
    """Serves for one call of `send`, `ask` or `chat`.

    Args:
        template: chat template in place of the directory's.
        model: a model directory; None for nano.
        full_text: fullTextEnabled.
        tokenizer_settings: of the tokenizer, over those of the directory.

    Attributes:
        prompt: the text that the model was asked with.
    """

    def __init__(
        self, template: object = None, model: Path | None = None, full_text: bool = False, **tokenizer_settings: Any
    ) -> None:
        directory = ModelDir.open(model or nano_directory())
        if template is not None:
            tokenizer_settings["chat_template"] = template
        self.tokenizer = TelechatTokenizer.from_pretrained(directory.path, **tokenizer_settings)
        self.settings = replace(plain_settings(directory), full_text=full_text)
        self.runner = NullRunner(
            400, block_size=self.settings.engine.block_size, vocab_size=directory.config.vocab_size
        )
        self.host = EngineHost(directory, self.tokenizer, Engine(self.runner, self.tokenizer, self.settings.engine))
        self.prompt = ""

    def say(self, text: str, ends: bool = True) -> None:
        """Let the model answer the next request with these tokens, and the end of sequence."""
        script = [*self.tokenizer.encode(text, bare_prompt="raw"), *([EOS_ID] if ends else [])]
        start: int | None = None

        def write(arguments: dict[str, Any], logits: Any) -> None:
            nonlocal start
            (length,) = arguments["valid_length_each_example"].tolist()
            if start is None:
                start = length
                self.prompt = self.tokenizer.decode(arguments["input_ids"].tolist())
            logits[:] = -1.0
            logits[:, script[length - start]] = 1.0

        self.runner.after_forward = write

    def send(
        self,
        *requests: tuple[str, str, object],
        prepare: Callable[[Service], object] = lambda service: None,
        headers: Mapping[str, str] | None = None,
    ) -> list[httpx.Response]:
        """The answers to requests (method, path, body), one after the other.

        Args:
            prepare: called with the service before the first of them, when the model is warm.
            headers: of all of them.
        """

        async def run() -> list[httpx.Response]:
            service = Service(self.settings, self.host)
            prepare(service)
            transport = httpx.ASGITransport(make_app(service, Plane, is_local=True), raise_app_exceptions=False)
            address = "http://127.0.0.1"
            async with httpx.AsyncClient(transport=transport, base_url=address, headers=headers) as client:
                answers = [await client.request(method, path, json=body) for method, path, body in requests]
            service.close()
            return answers

        try:
            self.host.start()
            return asyncio.run(run())
        finally:
            self.host.stop()

    def ask(self, text: str, path: str = "/v1/chat/completions", ends: bool = True, **body: Any) -> httpx.Response:
        """The answer to a request that the model answers with `text`."""
        (answer,) = self.send(("POST", path, body), prepare=lambda _: self.say(text, ends))
        assert answer.status_code == 200, answer.text
        return answer

    def chat(
        self,
        text: str,
        stream: bool,
        messages: Sequence[Mapping[str, Any]] = ({"role": "user", "content": "你好"},),
        **body: Any,
    ) -> tuple[dict[str, Any], str | None]:
        """The message and the reason why it ended; of a stream, put together."""
        body = {"model": self.settings.model_name, "messages": list(messages), "stream": stream, **body}
        answer = self.ask(text, **body, ends="max_tokens" not in body)
        if not stream:
            (choice,) = answer.json()["choices"]
            return choice["message"], choice["finish_reason"]
        found: dict[str, Any] = {"role": "assistant", "content": ""}
        reason = None
        for line in answer.text.split("\n\n")[:-2]:
            (choice,) = json.loads(line.removeprefix("data: "))["choices"]
            for name, value in choice["delta"].items():
                if name != "role":
                    found[name] = found[name] + value if name in found and not self.settings.full_text else value
            assert reason is None
            reason = choice["finish_reason"]
        calls = [{key: value for key, value in call.items() if key != "index"} for call in found.pop("tool_calls", [])]
        return {**found, "tool_calls": calls}, reason
