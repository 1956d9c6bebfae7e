"""MindIE's own format: POST /infer and /infer_token (single_req_self_develop_infer_interface.cpp)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import Field

from telechat_mindie.engine.output import Output
from telechat_mindie.server.answers import Answer
from telechat_mindie.server.fields import (
    OpenShare,
    Positive,
    Priority,
    RequestBody,
    Seconds,
    Seed,
    Share,
    Tokens,
    validate,
)
from telechat_mindie.server.http.errors import invalid
from telechat_mindie.server.http.openapi import accepts
from telechat_mindie.server.limits import MAX_PROMPT_TOKENS
from telechat_mindie.server.render import Renderer, milliseconds
from telechat_mindie.server.respond import Answering
from telechat_mindie.server.service import Job, Service

TokenId = Annotated[int, Field(ge=0, le=MAX_PROMPT_TOKENS)]


class Parameters(RequestBody):
    """What the older formats have in common."""

    temperature: Positive | None = None
    top_k: Tokens | None = None
    top_p: OpenShare | None = None
    typical_p: Share | None = None
    do_sample: bool | None = None
    seed: Seed | None = None
    repetition_penalty: Positive | None = None
    watermark: bool = Field(default=False, description="accepted, without effect")
    max_new_tokens: Tokens = 20
    details: bool = False


class NativeParameters(Parameters):
    priority: Priority = Field(default=5, description="1 is the most urgent")
    timeout: Seconds | None = Field(default=None, description="seconds")


class NativeRequest(RequestBody):
    """POST /infer: a text, or tokens."""

    inputs: str | list[dict[str, Any]] | None = Field(default=None, examples=["生抽与老抽的区别？"])
    input_id: Annotated[list[TokenId], Field(min_length=1, max_length=MAX_PROMPT_TOKENS)] | None = None
    stream: bool = False
    parameters: NativeParameters = NativeParameters()


class NativeRenderer(Renderer):
    def __init__(self, details: bool, full_text: bool) -> None:
        super().__init__(full_text)
        self._details = details

    def whole(self, answers: Sequence[Answer]) -> object:
        (answer,) = answers
        body: dict[str, object] = {"generated_text": answer.text}
        if self._details:
            body["details"] = {
                "finish_reason": answer.finish_reason,
                "generated_tokens": len(answer.token_ids),
                "generated_token_ids": answer.token_ids,
                "seed": answer.seed,
            }
        return body

    def events(self, index: int, output: Output, answers: Sequence[Answer]) -> Iterator[object]:
        answer = answers[index]
        is_first = not answer.gaps
        event: dict[str, object] = {
            "prefill_time": milliseconds(answer.first_token_seconds) if is_first else None,
            "decode_time": None if is_first else milliseconds(answer.gaps[-1]),
        }
        if not answer.is_finished:
            yield event | {"token": {"id": list(output.token_ids), "text": self.piece(answer, output)}}
            return
        event["generated_text"] = answer.text
        event["details"] = None
        if self._details:
            event["details"] = {
                "finish_reason": answer.finish_reason,
                "generated_tokens": len(answer.token_ids),
                "seed": answer.seed,
            }
        yield event | {"token": {"id": list(output.token_ids), "text": None}}


def text_of(value: str | list[dict[str, Any]], where: str) -> str:
    """A text, or the text parts of a list as multimodal models take it.

    MindIE hands the list as JSON text to the tokenizer; for a model of texts alone, only its texts make sense.
    """
    if isinstance(value, str):
        return value
    if not all(part.get("type") == "text" and isinstance(part.get("text"), str) for part in value):
        raise invalid(f"Parameter {where} holds something else than text, which TeleChat2 does not take.")
    return "".join(part["text"] for part in value)


def read_native(service: Service, data: dict[str, Any]) -> Job:
    body = validate(NativeRequest, data)
    if (body.inputs is None) == (body.input_id is None):
        raise invalid("The request must have either inputs or input_id.")
    text, wanted = body.inputs, body.parameters
    return Job(
        service.cut(body.input_id or []) if text is None else service.encode(text_of(text, "inputs"), "inputs"),
        service.params(wanted, wanted.max_new_tokens),
        NativeRenderer(wanted.details, service.settings.full_text),
        body.stream,
        timed_by_client=wanted.timeout is not None,
    )


def native_routes(service: Service) -> APIRouter:
    router = APIRouter(tags=["native"])

    @router.post("/infer", openapi_extra=accepts(NativeRequest))
    @router.post("/infer_token", openapi_extra=accepts(NativeRequest))
    async def infer(request: Request) -> Response:
        return Answering(service, request, partial(read_native, service))

    return router
