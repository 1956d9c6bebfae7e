"""TGI's format: POST /, /generate and /generate_stream (single_req_tgi_text_infer_interface.cpp)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Request, Response
from numpy.typing import NDArray
from pydantic import Field

from telechat_mindie.engine.output import Output
from telechat_mindie.server.answers import Answer
from telechat_mindie.server.fields import RequestBody, Stop, Tokens, validate
from telechat_mindie.server.formats.mindie import Parameters, text_of
from telechat_mindie.server.formats.vllm import VllmRequest, read_vllm
from telechat_mindie.server.http.errors import invalid
from telechat_mindie.server.http.openapi import accepts
from telechat_mindie.server.render import Renderer
from telechat_mindie.server.respond import Answering
from telechat_mindie.server.service import Job, Service


class TgiParameters(Parameters):
    stop: Stop = None
    adapter_id: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_./-]{1,256}$")] | None = Field(
        default=None, description="no adapter is loaded: refused"
    )
    decoder_input_details: bool = False
    return_full_text: bool = False
    truncate: Tokens | None = Field(default=None, description="keep this many tokens of the prompt's end")


class TgiRequest(RequestBody):
    """POST /generate and /generate_stream, and with `stream` POST /."""

    inputs: str | list[dict[str, Any]] = Field(examples=["生抽与老抽的区别？"])
    stream: bool = Field(default=False, description="only read by POST /")
    parameters: TgiParameters = TgiParameters()


class TgiRenderer(Renderer):
    """Args:
    wanted: the request's parameters.
    prompt: its text.
    prompt_ids: its tokens.
    as_list: the whole answer in a list, as POST / has it.
    """

    def __init__(
        self, wanted: TgiParameters, prompt: str, prompt_ids: NDArray[np.int64], *, as_list: bool, full_text: bool
    ) -> None:
        super().__init__(full_text)
        self._wanted = wanted
        self._prompt = prompt
        self._prompt_ids = prompt_ids
        self._as_list = as_list

    def whole(self, answers: Sequence[Answer]) -> object:
        (answer,) = answers
        body: dict[str, object] = {}
        if self._wanted.details or self._wanted.decoder_input_details:
            prefill = self._prompt_ids.tolist() if self._wanted.decoder_input_details else ()
            details = self._details(answer)
            seed = details.pop("seed")
            details |= {"prefill": list(map(_token, prefill)), "seed": seed}
            body["details"] = details | {"tokens": list(map(_token, answer.token_ids))}
        body["generated_text"] = self._text(answer)
        return [body] if self._as_list else body

    def events(self, index: int, output: Output, answers: Sequence[Answer]) -> Iterator[object]:
        answer = answers[index]
        token = {"id": list(output.token_ids), "text": self.piece(answer, output), "logprob": None, "special": None}
        details = self._details(answer) if answer.is_finished and self._wanted.details else None
        yield {
            "token": token,
            "generated_text": self._text(answer) if answer.is_finished else None,
            "details": details,
        }

    def _text(self, answer: Answer) -> str:
        return f"{self._prompt} {answer.text}" if self._wanted.return_full_text else answer.text

    def _details(self, answer: Answer) -> dict[str, object]:
        return {
            "prompt_tokens": len(self._prompt_ids),
            "finish_reason": answer.finish_reason,
            "generated_tokens": len(answer.token_ids),
            "seed": answer.seed,
        }


def _token(index: int) -> dict[str, object]:
    return {"id": index, "logprob": None, "special": None, "text": None}


def read_tgi(service: Service, data: dict[str, Any], *, stream: bool | None, as_list: bool = False) -> Job:
    """`stream` None: as the body says."""
    body = validate(TgiRequest, data)
    wanted = body.parameters
    stream = body.stream if stream is None else stream
    if wanted.adapter_id is not None:
        raise invalid(f"Adapter {wanted.adapter_id} is not loaded.")
    if stream and wanted.decoder_input_details:
        raise invalid("Parameter decoder_input_details must not be true in a stream.")
    prompt = text_of(body.inputs, "inputs")
    ids = service.encode(prompt, "inputs", keep=wanted.truncate)
    renderer = TgiRenderer(wanted, prompt, ids, as_list=as_list, full_text=service.settings.full_text)
    return Job(ids, service.params(wanted, wanted.max_new_tokens), renderer, stream)


def read_generate(service: Service, data: dict[str, Any]) -> Job:
    """POST /generate speaks two formats, told apart by the prompt's name (http_wrapper/http_handler.cpp:469-483)."""
    if data.get("prompt") is not None:
        return read_vllm(service, data)
    if data.get("inputs") is not None:
        return read_tgi(service, data, stream=False)
    raise invalid("The request must have `inputs` or `prompt`.")


def tgi_routes(service: Service) -> APIRouter:
    """All of TGI, and vLLM's POST /generate."""
    router = APIRouter(tags=["TGI and vLLM"])

    @router.post("/", openapi_extra=accepts(TgiRequest))
    async def general(request: Request) -> Response:
        return Answering(service, request, partial(read_tgi, service, stream=None, as_list=True))

    @router.post("/generate", openapi_extra=accepts(TgiRequest, VllmRequest))
    async def generate(request: Request) -> Response:
        return Answering(service, request, partial(read_generate, service))

    @router.post("/generate_stream", openapi_extra=accepts(TgiRequest))
    async def generate_stream(request: Request) -> Response:
        return Answering(service, request, partial(read_tgi, service, stream=True))

    return router
