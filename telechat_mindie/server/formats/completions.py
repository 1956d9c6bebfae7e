"""POST /v1/completions (single_req_vllm_openai_completions_infer_interface.cpp)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import Field

from telechat_mindie.engine.output import Output
from telechat_mindie.server.answers import Answer, usage
from telechat_mindie.server.fields import validate
from telechat_mindie.server.formats.chat_request import Filled
from telechat_mindie.server.formats.logprobs import TokenTexts, completion_lists
from telechat_mindie.server.formats.mindie import TokenId
from telechat_mindie.server.formats.vllm import VllmSampling, check_top_k, count_sequences
from telechat_mindie.server.http.errors import invalid
from telechat_mindie.server.http.openapi import accepts
from telechat_mindie.server.limits import MAX_PROMPT_TOKENS
from telechat_mindie.server.render import Renderer, openai_reason, request_id
from telechat_mindie.server.respond import Answering
from telechat_mindie.server.service import Job, Service


class CompletionRequest(VllmSampling):
    model: Filled
    prompt: Filled | Annotated[list[TokenId], Field(min_length=1, max_length=MAX_PROMPT_TOKENS)] = Field(
        examples=["生抽与老抽的区别？"]
    )
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    use_beam_search: bool = Field(default=False, description="refused: the engine has no beam search")


class CompletionRenderer(Renderer):
    end = b"data: [DONE]\n\n"

    def __init__(self, service: Service, count: int, with_logprobs: bool) -> None:
        super().__init__(service.settings.full_text)
        self._head = {"id": request_id(), "object": "text_completion", "created": int(time.time())}
        self._head["model"] = service.settings.model_name
        self._show_cached = service.engine.config.prefix_cache
        self._texts = TokenTexts(service.tokenizer) if with_logprobs else None
        self._offsets = [0] * count

    def whole(self, answers: Sequence[Answer]) -> object:
        choices = []
        for index, answer in enumerate(answers):
            logprobs = None
            if self._texts is not None:
                logprobs, _ = completion_lists(self._texts, answer.token_ids, answer.logprobs, 0)
            choices.append(_choice(index, answer.text, logprobs, openai_reason(answer)))
        return {**self._head, "choices": choices, "usage": usage(list(answers), self._show_cached)}

    def events(self, index: int, output: Output, answers: Sequence[Answer]) -> Iterator[object]:
        answer, logprobs = answers[index], None
        if self._texts is not None:
            logprobs, self._offsets[index] = completion_lists(
                self._texts, answer.token_ids, output.logprobs, self._offsets[index]
            )
        choice = _choice(index, self.piece(answer, output), logprobs, openai_reason(answer))
        event: dict[str, object] = {**self._head, "choices": [choice]}
        if answer.is_finished:
            event["usage"] = usage([answer], self._show_cached)
        yield event


def _choice(index: int, text: str, logprobs: object, reason: str | None) -> dict[str, object]:
    return {"index": index, "text": text, "logprobs": logprobs, "stop_reason": None, "finish_reason": reason}


def read_completion(service: Service, data: dict[str, Any]) -> Job:
    body = validate(CompletionRequest, data)
    if body.model != service.settings.model_name:
        raise invalid(f"Model {body.model} not found: this is {service.settings.model_name}.")
    if body.use_beam_search:
        raise invalid("Parameter use_beam_search is not supported.")
    check_top_k(body)
    count = count_sequences(body, equal_in_streams=True)
    prompt = service.encode(body.prompt, "prompt") if isinstance(body.prompt, str) else service.cut(body.prompt)
    return Job(
        prompt,
        service.params(body, body.max_tokens, count, body.logprobs),
        CompletionRenderer(service, count, body.logprobs is not None),
        body.stream,
        count,
    )


def completion_routes(service: Service) -> APIRouter:
    router = APIRouter(tags=["OpenAI"])

    @router.post("/v1/completions", openapi_extra=accepts(CompletionRequest))
    async def completions(request: Request) -> Response:
        return Answering(service, request, partial(read_completion, service))

    return router
