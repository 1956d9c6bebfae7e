"""vLLM's format: POST /generate with a `prompt` (single_req_vllm_infer_interface.cpp), and what OpenAI's have of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from telechat_mindie.engine.output import Output
from telechat_mindie.server.answers import Answer, Renderer
from telechat_mindie.server.fields import (
    Penalty,
    Positive,
    RequestBody,
    Seed,
    Sequences,
    Share,
    Stop,
    StopTokens,
    Temperature,
    Tokens,
    validate,
)
from telechat_mindie.server.generation import Job
from telechat_mindie.server.http.errors import dump, invalid
from telechat_mindie.server.service import Service
from telechat_mindie.units import INT32_MAX


def _not_zero(value: int) -> int:
    if value == 0:
        raise PydanticCustomError("top_k", f"must be -1, or 1 to {INT32_MAX}")
    return value


NO_ADAPTER = "None"
"""The word by which clients ask for the model itself."""

TopK = Annotated[int, Field(ge=-1, le=INT32_MAX, json_schema_extra={"not": {"const": 0}}), AfterValidator(_not_zero)]


class VllmSampling(RequestBody):
    """The fields that vLLM's and OpenAI's formats share."""

    stream: bool = False
    max_tokens: Tokens | None = Field(default=None, description="default: maxIterTimes of the service config")
    temperature: Temperature | None = None
    top_k: TopK | None = Field(default=None, description="-1: all")
    top_p: Share | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Seed | None = None
    stop: Stop | None = None
    stop_token_ids: StopTokens | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = False
    ignore_eos: bool = False
    n: Sequences | None = None
    best_of: Sequences | None = None

    @model_validator(mode="before")
    @classmethod
    def _as_far_as_read(cls, data: Any) -> Any:
        """MindIE reads `include_stop_str_in_output` only beside something to stop at, be that null
        (utils/infer_param.cpp:414-429)."""
        if isinstance(data, dict) and not {"stop", "stop_token_ids"} & data.keys():
            return {key: value for key, value in data.items() if key != "include_stop_str_in_output"}
        return data


class VllmRequest(VllmSampling):
    prompt: str = Field(examples=["生抽与老抽的区别？"])
    repetition_penalty: Positive | None = None
    model: Annotated[str, Field(min_length=1, max_length=256)] | None = Field(
        default=None, description="an adapter; none is loaded, so only the model's own name is accepted"
    )


class VllmRenderer(Renderer):
    """A stream is no SSE: each JSON object ends with a NUL byte (:318)."""

    def __init__(self, service: Service, prompt: str) -> None:
        super().__init__(service.settings.full_text)
        self._prompt = prompt

    def whole(self, answers: Sequence[Answer]) -> object:
        return {"text": [f"{self._prompt} {answer.text}" for answer in answers]}

    def events(self, index: int, output: Output, answers: Sequence[Answer]) -> Iterator[object]:
        others = [answer.text if self._full_text else "" for answer in answers]
        others[index] = self.piece(answers[index], output)
        yield {"text": others}

    def frame(self, event: object) -> bytes:
        return dump(event) + b"\0"


def count_sequences(body: VllmSampling, *, equal_in_streams: bool) -> int:
    """How many answers a request gets: best_of, else n. All of them are returned, as in MindIE.

    Args:
        equal_in_streams: OpenAI's formats want best_of to be n in a stream.

    Raises:
        ApiError: n and best_of contradict each other, or several answers would all be the same.
    """
    n, best_of = body.n, body.best_of
    if body.stream and equal_in_streams and best_of is not None and best_of != n:
        raise invalid(f"Parameter best_of must be equal to n in a stream, got {best_of} and {n}.")
    if n is not None and best_of is not None and best_of < n:
        raise invalid(f"Parameter best_of must be at least n, got {best_of} and {n}.")
    count = best_of or n or 1
    if count > 1 and not body.temperature:
        raise invalid("Parameters n and best_of must be 1 where temperature is 0 or missing.")
    return count


def read_vllm(service: Service, data: dict[str, Any]) -> Job:
    body = validate(VllmRequest, data)
    if body.model not in (None, NO_ADAPTER, service.settings.model_name):
        raise invalid(f"Adapter {body.model} is not loaded.")
    count = count_sequences(body, equal_in_streams=False)
    renderer = VllmRenderer(service, body.prompt)
    return service.job(service.encode(body.prompt, "prompt"), body, body.max_tokens, renderer, body.stream, count)
