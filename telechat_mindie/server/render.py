"""How an answer looks in one of MindIE's formats, whole or as a stream."""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

from telechat_mindie.engine.output import Output
from telechat_mindie.server.answers import Answer
from telechat_mindie.server.http.errors import dump


class Renderer(ABC):
    """One request's format. A new one for each request, since a stream may have state."""

    media_type = "text/event-stream"  # of a stream, also of vLLM's, which is none
    end: bytes = b""  # behind the last event of a stream

    def __init__(self, full_text: bool = False) -> None:
        self._full_text = full_text

    @abstractmethod
    def whole(self, answers: Sequence[Answer]) -> object:
        """The JSON of the finished answers, best first."""

    @abstractmethod
    def events(self, index: int, output: Output, answers: Sequence[Answer]) -> Iterator[object]:
        """The JSON of each event for an output of answer `index`, which includes it."""

    def frame(self, event: object) -> bytes:
        """An event, or the error that ends a stream, as bytes."""
        return b"data: " + dump(event) + b"\n\n"

    def piece(self, answer: Answer, output: Output) -> str:
        """The text that a stream shows of an output: the new one, or with fullTextEnabled all so far."""
        return answer.text if self._full_text else output.text


def milliseconds(seconds: float) -> int:
    return round(seconds * 1000)


def request_id() -> str:
    """The `id` of an answer."""
    return f"endpoint_common_{uuid.uuid4().hex}"


def openai_reason(answer: Answer) -> str | None:
    """OpenAI's word for why an answer ended."""
    reason = answer.finish_reason
    return "stop" if reason in ("eos_token", "stop_sequence") else reason
