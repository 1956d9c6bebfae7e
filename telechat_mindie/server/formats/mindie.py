"""MindIE's own format: POST /infer and /infer_token (single_req_self_develop_infer_interface.cpp)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import Field

from telechat_mindie.engine.output import Output
from telechat_mindie.server.answers import Answer, Renderer
from telechat_mindie.server.fields import (
    OpenShare,
    Positive,
    Priority,
    RequestBody,
    Seconds,
    Seed,
    Share,
    TokenIds,
    Tokens,
    validate,
)
from telechat_mindie.server.generation import Job
from telechat_mindie.server.http.errors import invalid
from telechat_mindie.server.service import Service


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

    inputs: str | None = Field(default=None, examples=["生抽与老抽的区别？"])
    input_id: TokenIds | None = None
    stream: bool = False
    parameters: NativeParameters = NativeParameters()


class NativeRenderer(Renderer):
    def __init__(self, service: Service, details: bool) -> None:
        super().__init__(service.settings.full_text)
        self._details = details

    def whole(self, answers: Sequence[Answer]) -> object:
        (answer,) = answers
        if not self._details:
            return {"generated_text": answer.text}
        ids = {"generated_token_ids": answer.token_ids}
        return {"generated_text": answer.text, "details": {**answer.ending(), **ids, "seed": answer.seed}}

    def events(self, index: int, output: Output, answers: Sequence[Answer]) -> Iterator[object]:
        answer, event, text = answers[index], {}, None
        if answer.is_finished:
            details = {**answer.ending(), "seed": answer.seed} if self._details else None
            event = {"generated_text": answer.text, "details": details}
        else:
            text = self.piece(answer, output)
        yield {**answer.step_times(), **event, "token": {"id": output.token_ids, "text": text}}


def read_native(service: Service, data: dict[str, Any]) -> Job:
    """The one of `inputs` and `input_id` that is there; as in MindIE, one that is null is there, and is refused."""
    if ("inputs" in data) == ("input_id" in data):
        raise invalid("The request must have either inputs or input_id, and not both.")
    body = validate(NativeRequest, data)
    if body.inputs is None and body.input_id is None:
        raise invalid(f"Parameter {'inputs' if 'inputs' in data else 'input_id'} must not be null.")
    text, parameters = body.inputs, body.parameters
    prompt = service.cut(body.input_id or []) if text is None else service.encode(text, "inputs")
    renderer = NativeRenderer(service, parameters.details)
    return service.job(prompt, parameters, parameters.max_new_tokens, renderer, body.stream)
