"""TGI's format: POST /, /generate and /generate_stream (single_req_tgi_text_infer_interface.cpp)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from telechat_mindie.engine.output import Output
from telechat_mindie.server.answers import Answer, Renderer
from telechat_mindie.server.fields import RequestBody, TgiStop, Tokens, validate
from telechat_mindie.server.formats.mindie import Parameters
from telechat_mindie.server.formats.vllm import NO_ADAPTER, read_vllm
from telechat_mindie.server.generation import Job
from telechat_mindie.server.http.errors import invalid
from telechat_mindie.server.service import Service


class TgiParameters(Parameters):
    stop: TgiStop | None = None
    adapter_id: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_./-]{1,256}$")] | None = Field(
        default=None, description="no adapter is loaded, so only `None`, the word, is accepted"
    )
    decoder_input_details: bool = False
    return_full_text: bool = False
    truncate: Tokens | None = Field(default=None, description="keep this many tokens of the prompt's end")


class TgiRequest(RequestBody):
    """POST /generate and /generate_stream, where the path says whether the answer is a stream."""

    inputs: str = Field(examples=["生抽与老抽的区别？"])
    parameters: TgiParameters = TgiParameters()


class GeneralRequest(TgiRequest):
    """POST /."""

    stream: bool = False


class TgiRenderer(Renderer):
    """An object for each answer and event.

    Args:
        service: for its settings.
        parameters: the request's.
        prompt: its text.
        prompt_ids: its tokens.
        as_list: the whole answer in a list, as POST / has it.
    """

    def __init__(
        self, service: Service, parameters: TgiParameters, prompt: str, prompt_ids: NDArray[np.int64], as_list: bool
    ) -> None:
        super().__init__(service.settings.full_text)
        self._parameters = parameters
        self._prompt = prompt
        self._prompt_ids = prompt_ids
        self._as_list = as_list

    def whole(self, answers: Sequence[Answer]) -> object:
        (answer,) = answers
        body: dict[str, object] = {}
        if self._parameters.details or self._parameters.decoder_input_details:
            prefill = self._prompt_ids.tolist() if self._parameters.decoder_input_details else ()
            body["details"] = {
                "prompt_tokens": len(self._prompt_ids),
                **answer.ending(),
                "prefill": list(map(_token, prefill)),
                "seed": answer.seed,
                "tokens": list(map(_token, answer.token_ids)),
            }
        body["generated_text"] = self._text(answer)
        return [body] if self._as_list else body

    def events(self, index: int, output: Output, answers: Sequence[Answer]) -> Iterator[object]:
        answer, text, details = answers[index], None, None
        if answer.is_finished:
            text = self._text(answer)
            if self._parameters.details:
                details = {"prompt_tokens": len(self._prompt_ids), **answer.ending(), "seed": answer.seed}
        token = {"id": output.token_ids, "text": self.piece(answer, output), "logprob": None, "special": None}
        yield {"token": token, "generated_text": text, "details": details}

    def _text(self, answer: Answer) -> str:
        return f"{self._prompt} {answer.text}" if self._parameters.return_full_text else answer.text


def _token(index: int) -> dict[str, object]:
    return {"id": index, "logprob": None, "special": None, "text": None}


def read_tgi(service: Service, data: dict[str, Any], *, stream: bool) -> Job:
    return _job(service, validate(TgiRequest, data), stream)


def read_general(service: Service, data: dict[str, Any]) -> Job:
    body = validate(GeneralRequest, data)
    return _job(service, body, body.stream, as_list=True)


def _job(service: Service, body: TgiRequest, stream: bool, as_list: bool = False) -> Job:
    parameters = body.parameters
    if parameters.adapter_id not in (None, NO_ADAPTER):
        raise invalid(f"Adapter {parameters.adapter_id} is not loaded.")
    if stream and parameters.decoder_input_details:
        raise invalid("Parameter decoder_input_details must not be true in a stream.")
    ids = service.encode(body.inputs, "inputs", keep=parameters.truncate)
    renderer = TgiRenderer(service, parameters, body.inputs, ids, as_list)
    return service.job(ids, parameters, parameters.max_new_tokens, renderer, stream)


def read_generate(service: Service, data: dict[str, Any]) -> Job:
    """POST /generate speaks two formats, told apart by the prompt's name (http_wrapper/http_handler.cpp:469-483)."""
    if data.get("prompt") is not None:
        return read_vllm(service, data)
    if data.get("inputs") is not None:
        return read_tgi(service, data, stream=False)
    raise invalid("The request must have `inputs` or `prompt`.")
