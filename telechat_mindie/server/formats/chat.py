"""POST /v1/chat/completions: the answer (single_req_vllm_openai_infer_interface.cpp:933-1200)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response

from telechat_mindie.engine.output import Output
from telechat_mindie.server.answers import Answer, usage
from telechat_mindie.server.fields import validate
from telechat_mindie.server.formats.chat_request import (
    ChatRequest,
    check_logprobs,
    check_messages,
    conversation,
    offered_tools,
    text_length,
)
from telechat_mindie.server.formats.logprobs import TokenTexts, chat_content
from telechat_mindie.server.formats.tool_calls import ToolCallParser, split_calls
from telechat_mindie.server.formats.vllm import check_top_k, count_sequences
from telechat_mindie.server.http.errors import invalid
from telechat_mindie.server.http.openapi import accepts
from telechat_mindie.server.render import Renderer, openai_reason, request_id
from telechat_mindie.server.respond import Answering
from telechat_mindie.server.service import Job, Service


class ChatRenderer(Renderer):
    """Args:
    service: for its settings and tokenizer.
    count: answers.
    parse_tools: look for tool calls.
    with_logprobs: report log probabilities.
    """

    end = b"data: [DONE]\n\n"

    def __init__(self, service: Service, count: int, *, parse_tools: bool, with_logprobs: bool) -> None:
        super().__init__(service.settings.full_text)
        self._head = {"id": request_id(), "object": "chat.completion", "created": int(time.time())}
        self._head["model"] = service.settings.model_name
        self._show_cached = service.engine.config.prefix_cache
        self._parse_tools = parse_tools
        self._texts = TokenTexts(service.tokenizer) if with_logprobs else None
        self._parsers = [ToolCallParser() for _ in range(count)] if parse_tools else []
        self._is_first = True

    def whole(self, answers: Sequence[Answer]) -> object:
        choices = []
        for index, answer in enumerate(answers):
            content, calls = split_calls(answer.text) if self._parse_tools else (answer.text, [])
            message = {"role": "assistant", "content": content, "tool_calls": calls}
            choices.append(
                {
                    "index": index,
                    "message": message,
                    "logprobs": self._logprobs(answer, len(answer.logprobs)),
                    "finish_reason": _reason(answer, bool(calls)),
                }
            )
        return {**self._head, "choices": choices, "usage": usage(list(answers), self._show_cached)}

    def events(self, index: int, output: Output, answers: Sequence[Answer]) -> Iterator[object]:
        if self._is_first:  # of all choices, as MindIE opens them together
            self._is_first = False
            self._head["object"] = "chat.completion.chunk"
            for choice in range(len(answers)):
                yield self._chunk(choice, {"content": ""})
        answer = answers[index]
        deltas = self._deltas(index, answer, output)
        if not deltas and not answer.is_finished:
            return
        for delta in deltas[:-1]:
            yield self._chunk(index, delta)
        last = self._chunk(index, deltas[-1] if deltas else {"content": ""})
        last["choices"][0]["logprobs"] = self._logprobs(answer, len(output.logprobs))
        if answer.is_finished:
            called = bool(self._parsers) and self._parsers[index].found
            last["choices"][0]["finish_reason"] = _reason(answer, called)
            last["usage"] = usage([answer], self._show_cached)
            if self._full_text:
                last["full_text"] = answer.text
        yield last

    def _deltas(self, index: int, answer: Answer, output: Output) -> list[dict[str, Any]]:
        if not self._parse_tools:
            return [{"content": self.piece(answer, output)}]
        parser = self._parsers[index]
        pieces = [*parser.put(output.text), *(parser.flush() if answer.is_finished else ())]
        # Behind a call, the template's line ends are no content.
        texts_and_calls = [
            piece for piece in pieces if not (isinstance(piece, str) and parser.found and piece.isspace())
        ]
        return [{"content": piece} if isinstance(piece, str) else {"tool_calls": [piece]} for piece in texts_and_calls]

    def _chunk(self, index: int, delta: dict[str, Any]) -> dict[str, Any]:
        choice = {"index": index, "delta": {"role": "assistant", **delta}, "logprobs": None, "finish_reason": None}
        return {**self._head, "choices": [choice]}

    def _logprobs(self, answer: Answer, count: int) -> dict[str, object] | None:
        """Of the answer's last `count` tokens."""
        if self._texts is None:
            return None
        reports = answer.logprobs[len(answer.logprobs) - count :]
        return {"content": chat_content(self._texts, answer.token_ids, reports)}


def _reason(answer: Answer, called: bool) -> str | None:
    reason = openai_reason(answer)
    return "tool_calls" if called and reason == "stop" else reason


def read_chat(service: Service, data: dict[str, Any]) -> Job:
    body = validate(ChatRequest, data)
    if body.model != service.settings.model_name:
        raise invalid(f"Model {body.model} not found: this is {service.settings.model_name}.")
    if body.use_beam_search:
        raise invalid("Parameter use_beam_search is not supported.")
    check_top_k(body)
    check_messages(body.messages)
    count = count_sequences(body, equal_in_streams=True)
    top_logprobs = check_logprobs(body)
    turns, tools = conversation(body.messages), offered_tools(body, data.get("tools") or [])
    options: dict[str, Any] = {"chat_template_kwargs": body.chat_template_kwargs}
    if tools:
        options["tools"] = tools
    return Job(
        service.encode_chat(turns, options, text_length(turns, tools)),
        service.params(body, body.max_tokens, count, top_logprobs),
        ChatRenderer(service, count, parse_tools=bool(tools), with_logprobs=top_logprobs is not None),
        body.stream,
        count,
    )


def chat_routes(service: Service) -> APIRouter:
    router = APIRouter(tags=["OpenAI"])

    @router.post("/v1/chat/completions", openapi_extra=accepts(ChatRequest))
    async def chat_completions(request: Request) -> Response:
        return Answering(service, request, partial(read_chat, service))

    return router
