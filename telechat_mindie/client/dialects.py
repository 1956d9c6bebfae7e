"""The two request formats of MindIE that stream server-sent events: what is sent, and what an event says.

Fields and framing as in MindIE-LLM v3.0.0.beta.2, src/server/endpoint/single_req_infer_interface/
single_req_vllm_openai_infer_interface.cpp and single_req_tgi_text_infer_interface.cpp.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from telechat_mindie.client.errors import ServiceError
from telechat_mindie.errors import InputError

Message = dict[str, str]
"""`{"role": "system" | "user" | "assistant", "content": ...}`"""

Prompt = str | Sequence[Message]
"""A conversation, or one text: a question in a chat, a bare prompt in TGI."""


_DRAWS = ("temperature", "top_k", "top_p")


@dataclass(frozen=True, slots=True)
class Sampling:
    """What a request asks of its answer; None leaves it to the service."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    ignore_eos: bool = False

    def given(self, *names: str) -> dict[str, Any]:
        """Of these fields those that are not None."""
        return {name: value for name in names if (value := getattr(self, name)) is not None}


@dataclass(frozen=True, slots=True)
class Delta:
    """What one event adds to an answer.

    Attributes:
        text: new text, which may be empty.
        thought: new text of the thought before the answer, where the service tells them apart.
        finish_reason: why the answer ended, on its last event.
        prompt_tokens: length of the prompt, where the service tells it (on the last event).
        generated_tokens: length of the answer, likewise.
    """

    text: str = ""
    thought: str = ""
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    generated_tokens: int | None = None


class Dialect(Protocol):
    """One request format."""

    path: str

    def body(self, prompt: Prompt, sampling: Sampling) -> dict[str, Any]:
        """The JSON of a request for a streamed answer."""

    def delta(self, event: str) -> Delta | None:
        """What the data of an event says; None where it only marks the end of the stream.

        Raises:
            ServiceError: it is an error, or not in this format.
        """


class OpenAIChat:
    """POST /v1/chat/completions."""

    path = "/v1/chat/completions"

    def __init__(self, model: str) -> None:
        self.model = model

    def body(self, prompt: Prompt, sampling: Sampling) -> dict[str, Any]:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        return {
            "model": self.model,
            "messages": messages,
            "stream": True,
            # MindIE reports the usage unasked and does not read this; other OpenAI services want it.
            "stream_options": {"include_usage": True},
            **sampling.given("max_tokens", *_DRAWS, "repetition_penalty", "seed"),
            **({"ignore_eos": True} if sampling.ignore_eos else {}),
        }

    def delta(self, event: str) -> Delta | None:
        if event == "[DONE]":
            return None
        data = _load(event, self.path)
        usage = data.get("usage") or {}
        choices = data.get("choices") or [{}]  # the usage may come in a chunk without choices
        try:
            delta = choices[0].get("delta") or {}
            return Delta(
                text=delta.get("content") or "",
                thought=delta.get("reasoning_content") or "",
                finish_reason=choices[0].get("finish_reason"),
                prompt_tokens=usage.get("prompt_tokens"),
                generated_tokens=usage.get("completion_tokens"),
            )
        except (AttributeError, KeyError, TypeError):
            raise _unknown(event, self.path) from None


class Tgi:
    """POST /generate_stream. The prompt is sent as it is: no chat template is applied to it."""

    path = "/generate_stream"

    def body(self, prompt: Prompt, sampling: Sampling) -> dict[str, Any]:
        if not isinstance(prompt, str):
            raise InputError("takes texts, not conversations", where="the TGI format", advice="Use --api openai.")
        if sampling.ignore_eos:
            raise InputError("cannot go on after the end of an answer", where="the TGI format")
        parameters: dict[str, Any] = {"details": True}
        if sampling.max_tokens is not None:
            parameters["max_new_tokens"] = sampling.max_tokens
        if sampling.given(*_DRAWS):
            parameters["do_sample"] = True
        return {"inputs": prompt, "parameters": parameters | sampling.given(*_DRAWS, "repetition_penalty", "seed")}

    def delta(self, event: str) -> Delta | None:
        data = _load(event, self.path)
        details = data.get("details") or {}
        ended = data.get("generated_text") is not None
        try:
            return Delta(
                text=data["token"]["text"] or "",
                finish_reason=details.get("finish_reason", "stop") if ended else None,
                prompt_tokens=details.get("prompt_tokens"),
                generated_tokens=details.get("generated_tokens"),
            )
        except (AttributeError, KeyError, TypeError):
            raise _unknown(event, self.path) from None


def error_text(data: object) -> str | None:
    """The message of an error body: MindIE's and TGI's `error`, OpenAI's `error.message`, FastAPI's `detail`."""
    if not isinstance(data, dict):
        return None
    error = data.get("error", data.get("detail", data.get("message")))
    if isinstance(error, dict):
        error = error.get("message", error)
    return None if error is None else str(error)


def _load(event: str, where: str) -> dict[str, Any]:
    try:
        data = json.loads(event)
    except (ValueError, RecursionError):
        raise _unknown(event, where) from None
    if not isinstance(data, dict):
        raise _unknown(event, where)
    if data.get("error") is not None:
        raise ServiceError(f"broke the answer off: {error_text(data)}", kind="error in the stream", where=where)
    return data


def _unknown(event: str, where: str) -> ServiceError:
    return ServiceError("sent an event of another format", kind="bad event", where=where, found=event[:200])
