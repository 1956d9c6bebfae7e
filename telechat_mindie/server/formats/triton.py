"""Triton's formats: POST /v2/models/{m}/infer takes tokens, generate and generate_stream take text
(single_req_triton_token_infer_interface.cpp, single_req_triton_text_infer_interface.cpp); stopInfer ends a request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from telechat_mindie.engine.output import Output
from telechat_mindie.server.answers import Answer, Renderer
from telechat_mindie.server.fields import AnyTokens, RequestBody, RequestId, Share, Tokens, Unread, validate
from telechat_mindie.server.formats.mindie import NativeParameters
from telechat_mindie.server.generation import Ended, Job
from telechat_mindie.server.http.body import parse
from telechat_mindie.server.http.errors import ApiError, dump, invalid, json_response
from telechat_mindie.server.service import Service
from telechat_mindie.units import INT32_MAX


class TritonParameters(NativeParameters):
    top_k: Annotated[int, Field(ge=0, le=INT32_MAX)] | None = None  # type: ignore[assignment]
    top_p: Share | None = None
    batch_size: Tokens | None = Field(default=None, description="accepted, without effect")


class TensorParameters(TritonParameters):
    typical_p: Unread = Field(default=None, description="not read")  # type: ignore[assignment]


class TritonInput(RequestBody):
    name: Annotated[str, Field(max_length=256)]
    shape: list[Annotated[int, Field(ge=0)]] = Field(min_length=1, max_length=2)
    datatype: Literal["UINT32"]
    data: AnyTokens
    parameters: TensorParameters = TensorParameters()


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
    text_input: str = Field(examples=["生抽与老抽的区别？"])
    parameters: TritonParameters = TritonParameters()


class StopInfer(RequestBody):
    id: RequestId


class TokenRenderer(Renderer):
    def __init__(self, name: str | None, output_name: str) -> None:
        super().__init__(id=name)
        self._output_name = output_name or "output0"

    def whole(self, answers: Sequence[Answer]) -> object:
        (answer,) = answers
        ids = answer.token_ids
        output = {"name": self._output_name, "shape": [1, len(ids)], "datatype": "UINT32", "data": ids}
        return {"id": self.id, "outputs": [output]}

    def events(self, index: int, output: Output, answers: Sequence[Answer]) -> Iterator[object]:
        return iter(())  # this format has no stream


class TextRenderer(Renderer):
    def __init__(self, service: Service, name: str | None, details: bool) -> None:
        super().__init__(service.settings.full_text, name)
        self._head = {"id": self.id, "model_name": service.settings.model_name, "model_version": None}
        self._details = details

    def whole(self, answers: Sequence[Answer]) -> object:
        (answer,) = answers
        body = self._body(answer, answer.text)
        if self._details:
            waits = list(map(_microseconds, answer.waits))
            body["details"] = {**body["details"], "batch_size": answer.batch_sizes, "queue_wait_time": waits}
        return body

    def events(self, index: int, output: Output, answers: Sequence[Answer]) -> Iterator[object]:
        answer = answers[index]
        body = self._body(answer, self.piece(answer, output))
        if self._details and output.token_ids:
            step = {"batch_size": output.batch_size, "queue_wait_time": _microseconds(output.wait)}
            body = {**body, "details": {**body["details"], **step}, **answer.step_times()}
        yield body

    def frame(self, event: object) -> bytes:
        return b"data:" + dump(event) + b"\n\n"  # no space behind the colon (:118)

    def _body(self, answer: Answer, text: str) -> dict[str, Any]:
        body: dict[str, Any] = {**self._head, "text_output": text}
        if self._details:
            ending = answer.ending()
            if not answer.is_finished:
                del ending["finish_reason"]
            body["details"] = {**ending, "first_token_cost": None, "decode_cost": None}
        return body


def _microseconds(seconds: float) -> int:
    return round(seconds * 1e6)


def read_tokens(service: Service, data: dict[str, Any]) -> Job:
    body = validate(TritonTokens, data)
    (tensor,), (output,) = body.inputs, body.outputs
    if len(tensor.shape) == 2 and tensor.shape[0] != 1:
        raise invalid("Parameter inputs.0.shape must be [tokens] or [1, tokens].")
    if tensor.shape[-1] != len(tensor.data):
        raise invalid(f"Parameter inputs.0.data must have {tensor.shape[-1]} items, got {len(tensor.data)}.")
    parameters, renderer = tensor.parameters, TokenRenderer(body.id, output.name)
    return service.job(service.cut(tensor.data), parameters, parameters.max_new_tokens, renderer, stream=False)


def read_text(service: Service, data: dict[str, Any], *, stream: bool) -> Job:
    body = validate(TritonText, data)
    parameters = body.parameters
    ids = service.encode(body.text_input, "text_input")
    renderer = TextRenderer(service, body.id, parameters.details)
    return service.job(ids, parameters, parameters.max_new_tokens, renderer, stream)


async def stop_infer(service: Service, request: Request) -> Response:
    """End another request, which then says `stop_sequence`. The answer is the body itself, as in MindIE.

    For an id that it does not know, MindIE has a 404, but its engine gives another reason than that looks for, and so
    clients get 500 (single_req_infer_interface_base.cpp, Stop).
    """
    data = parse(await service.bodies.read(request))
    generation = service.named.get(validate(StopInfer, data).id)
    if generation is None:
        raise ApiError(500, "Stop request failed, internal failed.")
    generation.cancel(Ended.STOPPED)
    return json_response(data)
