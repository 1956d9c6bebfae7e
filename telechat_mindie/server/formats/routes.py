"""The routes of all request formats: which path takes what, and how it is read."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from telechat_mindie.server.formats.mindie import NativeRequest, read_native
from telechat_mindie.server.formats.openai import read_chat, read_completion
from telechat_mindie.server.formats.openai_requests import ChatRequest, CompletionRequest
from telechat_mindie.server.formats.tgi import GeneralRequest, TgiRequest, read_general, read_generate, read_tgi
from telechat_mindie.server.formats.triton import (
    StopInfer,
    TritonText,
    TritonTokens,
    read_text,
    read_tokens,
    stop_infer,
)
from telechat_mindie.server.formats.vllm import VllmRequest
from telechat_mindie.server.generation import Job
from telechat_mindie.server.http.openapi import accepts
from telechat_mindie.server.respond import Answering
from telechat_mindie.server.service import Service

Read = Callable[[Service, dict[str, Any]], Job]

_TRITON = "/v2/models/{model}"
_ROUTES: tuple[tuple[str, str, str, Read, tuple[type[BaseModel], ...]], ...] = (
    # group and name in the OpenAPI document, path, reader, bodies that it takes
    ("native", "infer", "/infer_token", read_native, (NativeRequest,)),
    ("native", "infer", "/infer", read_native, (NativeRequest,)),
    ("TGI and vLLM", "general", "/", read_general, (GeneralRequest,)),
    ("TGI and vLLM", "generate", "/generate", read_generate, (TgiRequest, VllmRequest)),
    ("TGI and vLLM", "generate_stream", "/generate_stream", partial(read_tgi, stream=True), (TgiRequest,)),
    ("OpenAI", "chat_completions", "/v1/chat/completions", read_chat, (ChatRequest,)),
    ("OpenAI", "completions", "/v1/completions", read_completion, (CompletionRequest,)),
    ("Triton", "infer", f"{_TRITON}/infer", read_tokens, (TritonTokens,)),
    ("Triton", "generate", f"{_TRITON}/generate", partial(read_text, stream=False), (TritonText,)),
    ("Triton", "generate_stream", f"{_TRITON}/generate_stream", partial(read_text, stream=True), (TritonText,)),
)


def format_routes(service: Service) -> APIRouter:
    router = APIRouter()
    for group, name, path, read, bodies in _ROUTES:
        endpoint = _answer_of_model if "{model}" in path else _answer
        router.add_api_route(
            path, endpoint(service, read), methods=["POST"], name=name, tags=[group], openapi_extra=accepts(*bodies)
        )

    @router.post(f"{_TRITON}/stopInfer", name="stop_infer", tags=["Triton"], openapi_extra=accepts(StopInfer))
    async def stop(model: str, request: Request) -> Response:
        service.check_model(model)
        return await stop_infer(service, request)

    return router


def _answer(service: Service, read: Read) -> Callable[..., Any]:
    async def answer(request: Request) -> Response:
        return Answering(service, request, partial(read, service))

    return answer


def _answer_of_model(service: Service, read: Read) -> Callable[..., Any]:
    async def answer(model: str, request: Request) -> Response:
        service.check_model(model)
        return Answering(service, request, partial(read, service))

    return answer
