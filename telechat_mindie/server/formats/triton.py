"""Triton's formats: POST /v2/models/{m}/infer takes tokens, generate and generate_stream take text
(single_req_triton_token_infer_interface.cpp, single_req_triton_text_infer_interface.cpp); stopInfer ends a request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import Field

from telechat_mindie.engine.output import Output
from telechat_mindie.server.answers import Answer
from telechat_mindie.server.fields import RequestBody, RequestId, Share, Tokens, validate
from telechat_mindie.server.formats.mindie import NativeParameters, TokenId, text_of
from telechat_mindie.server.generation import Ended
from telechat_mindie.server.http.body import parse
from telechat_mindie.server.http.errors import ApiError, dump, invalid
from telechat_mindie.server.http.openapi import accepts
from telechat_mindie.server.limits import MAX_PROMPT_TOKENS
from telechat_mindie.server.models import check_model
from telechat_mindie.server.render import Renderer, milliseconds, request_id
from telechat_mindie.server.respond import Answering
from telechat_mindie.server.service import Job, Service
from telechat_mindie.units import INT32_MAX


class TritonParameters(NativeParameters):
    top_k: Annotated[int, Field(ge=0, le=INT32_MAX)] | None = None  # type: ignore[assignment]
    top_p: Share | None = None
    batch_size: Tokens | None = Field(default=None, description="accepted, without effect")


class TritonInput(RequestBody):
    name: Annotated[str, Field(max_length=256)]
    shape: list[Annotated[int, Field(ge=0)]] = Field(min_length=1, max_length=2)
    datatype: Literal["UINT32"]
    data: list[TokenId] = Field(min_length=1, max_length=MAX_PROMPT_TOKENS)
    parameters: TritonParameters = TritonParameters()


class TritonOutput(RequestBody):
    name: str


class TritonTokens(RequestBody):
    """POST /v2/models/{m}/infer."""

    id: RequestId | None = None
    inputs: list[TritonInput] = Field(min_length=1, max_length=1)
    outputs: list[TritonOutput] = Field(min_length=1, max_length=1)


class TritonText(RequestBody):
    """POST /v2/models/{m}/generate and generate_stream."""

    id: RequestId | None = None
    text_input: str | list[dict[str, Any]] = Field(examples=["生抽与老抽的区别？"])
    parameters: TritonParameters = TritonParameters()


class StopInfer(RequestBody):
    id: RequestId


class TokenRenderer(Renderer):
    def __init__(self, name: str | None, output_name: str) -> None:
        super().__init__()
        self._id = name or request_id()
        self._output_name = output_name or "output0"

    def whole(self, answers: Sequence[Answer]) -> object:
        (answer,) = answers
        ids = answer.token_ids
        output = {"name": self._output_name, "shape": [1, len(ids)], "datatype": "UINT32", "data": ids}
        return {"id": self._id, "outputs": [output]}

    def events(self, index: int, output: Output, answers: Sequence[Answer]) -> Iterator[object]:
        return iter(())  # this format has no stream


class TextRenderer(Renderer):
    def __init__(self, name: str | None, model: str, details: bool, full_text: bool) -> None:
        super().__init__(full_text)
        self._head = {"id": name or request_id(), "model_name": model, "model_version": None}
        self._details = details

    def whole(self, answers: Sequence[Answer]) -> object:
        (answer,) = answers
        body: dict[str, object] = {**self._head, "text_output": answer.text}
        return body | {"details": _details(answer)} if self._details else body

    def events(self, index: int, output: Output, answers: Sequence[Answer]) -> Iterator[object]:
        answer = answers[index]
        event: dict[str, object] = {**self._head, "text_output": self.piece(answer, output)}
        if self._details:
            is_first = not answer.gaps
            event["details"] = _details(answer)
            event["prefill_time"] = milliseconds(answer.first_token_seconds) if is_first else None
            event["decode_time"] = None if is_first else milliseconds(answer.gaps[-1])
        yield event

    def frame(self, event: object) -> bytes:
        return b"data:" + dump(event) + b"\n\n"  # no space behind the colon (:118)


def _details(answer: Answer) -> dict[str, object]:
    reason = {} if answer.finish_reason is None else {"finish_reason": answer.finish_reason}
    return {**reason, "generated_tokens": len(answer.token_ids), "first_token_cost": None, "decode_cost": None}


def read_tokens(service: Service, data: dict[str, Any]) -> Job:
    inputs = data.get("inputs")
    if isinstance(inputs, list):  # nulls are absent in `parameters` wherever it stands
        inputs = [
            {key: value for key, value in item.items() if value is not None} if isinstance(item, dict) else item
            for item in inputs
        ]
    body = validate(TritonTokens, data if inputs is None else data | {"inputs": inputs})
    (given,), (output,) = body.inputs, body.outputs
    if len(given.shape) == 2 and given.shape[0] != 1:
        raise invalid("Parameter inputs.0.shape must be [tokens] or [1, tokens].")
    if given.shape[-1] != len(given.data):
        raise invalid(f"Parameter inputs.0.data must have {given.shape[-1]} items, got {len(given.data)}.")
    wanted = given.parameters
    return Job(
        service.cut(given.data),
        service.params(wanted, wanted.max_new_tokens),
        TokenRenderer(body.id, output.name),
        stream=False,
        timed_by_client=wanted.timeout is not None,
        name=body.id,
    )


def read_text(service: Service, data: dict[str, Any], *, stream: bool) -> Job:
    body = validate(TritonText, data)
    wanted, settings = body.parameters, service.settings
    return Job(
        service.encode(text_of(body.text_input, "text_input"), "text_input"),
        service.params(wanted, wanted.max_new_tokens),
        TextRenderer(body.id, settings.model_name, wanted.details, settings.full_text),
        stream,
        timed_by_client=wanted.timeout is not None,
        name=body.id,
    )


def triton_routes(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v2/models/{model}", tags=["Triton"])

    @router.post("/infer", openapi_extra=accepts(TritonTokens))
    async def infer(model: str, request: Request) -> Response:
        check_model(service, model)
        return Answering(service, request, partial(read_tokens, service))

    @router.post("/generate", openapi_extra=accepts(TritonText))
    async def generate(model: str, request: Request) -> Response:
        check_model(service, model)
        return Answering(service, request, partial(read_text, service, stream=False))

    @router.post("/generate_stream", openapi_extra=accepts(TritonText))
    async def generate_stream(model: str, request: Request) -> Response:
        check_model(service, model)
        return Answering(service, request, partial(read_text, service, stream=True))

    @router.post("/stopInfer", openapi_extra=accepts(StopInfer))
    async def stop_infer(model: str, request: Request) -> Response:
        check_model(service, model)
        body = validate(StopInfer, parse(await service.bodies.read(request)))
        generation = service.named.get(body.id)
        if generation is None:
            raise ApiError(404, f"Request {body.id} not found.")
        generation.cancel(Ended.STOPPED)
        return Response(dump({"id": body.id}), media_type="application/json")

    return router
