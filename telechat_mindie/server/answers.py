"""What a request has got so far, one answer for each of its sequences, and how a format shows it."""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from telechat_mindie.engine.output import FinishReason, Output
from telechat_mindie.engine.sampler import TokenLogprobs
from telechat_mindie.server.http.errors import dump

_REASONS = {FinishReason.EOS: "eos_token", FinishReason.LENGTH: "length", FinishReason.MAX_SEQ: "length"}


@dataclass(slots=True)
class Answer:
    """One sequence's answer, as it grows."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    intervals: list[float] = field(default_factory=list)  # seconds between tokens
    batch_sizes: list[int] = field(default_factory=list)  # answers that got a token in the same step
    waits: list[float] = field(default_factory=list)  # seconds before each token's step without work for it
    lengths: list[int] = field(default_factory=list)  # characters of the text with each token
    last: Output | None = None

    def add(self, output: Output) -> None:
        if output.token_ids:
            if self.last is not None:
                self.intervals.append(output.timings.now - self.last.timings.now)
            self.token_ids += output.token_ids
            self.logprobs += output.logprobs
            self.batch_sizes.append(output.batch_size)
            self.waits.append(output.wait)
        self.text += output.text
        self.lengths += [len(self.text)] * len(output.token_ids)
        self.last = output

    @property
    def total_logprob(self) -> float:
        return sum(report.logprob for report in self.logprobs)

    @property
    def is_finished(self) -> bool:
        return self.last is not None and self.last.finish_reason is not None

    @property
    def seed(self) -> int | None:
        return None if self.last is None else self.last.seed

    @property
    def first_token_seconds(self) -> float:
        """From the request's arrival in the engine."""
        timings = None if self.last is None else self.last.timings
        return 0.0 if timings is None or timings.first_token is None else timings.first_token - timings.arrival

    @property
    def finish_reason(self) -> str | None:
        """MindIE's word for it (endpoint_def.cpp:86-100).

        Its worker reports a stop string as 2 and a stop token as 3 (mindie_llm/text_generator/utils/config.py:333-339),
        for which the server's word is the same as for a request that was stopped from outside.
        """
        if self.last is None or self.last.finish_reason is None:
            return None
        return _REASONS.get(self.last.finish_reason, "stop_sequence")

    def ending(self) -> dict[str, object]:
        """How it ended and how long it is, as all formats but OpenAI's begin their details."""
        return {"finish_reason": self.finish_reason, "generated_tokens": len(self.token_ids)}

    def step_times(self) -> dict[str, int | None]:
        """Milliseconds of the last step, in a stream of MindIE's own format and of Triton's."""
        if not self.intervals:
            return {"prefill_time": round(self.first_token_seconds * 1000), "decode_time": None}
        return {"prefill_time": None, "decode_time": round(self.intervals[-1] * 1000)}


class Renderer(ABC):
    """One request's format. A new one for each request, since a stream may have state.

    Args:
        full_text: each event of a stream repeats the whole text (fullTextEnabled).
        id: the client's own name of the request. By its id another request can stop this one.
    """

    media_type = "text/event-stream"  # of a stream, also of vLLM's, which is none
    end: bytes = b""  # behind the last event of a stream

    def __init__(self, full_text: bool = False, id: str | None = None) -> None:
        self.id = id or f"endpoint_common_{uuid.uuid4().hex}"
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
        """The text that a stream shows of an output: the new one, or all so far."""
        return answer.text if self._full_text else output.text
