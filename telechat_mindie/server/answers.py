"""What a request has got so far: one answer for each of its sequences."""

from __future__ import annotations

from dataclasses import dataclass, field

from telechat_mindie.engine.output import FinishReason, Output
from telechat_mindie.engine.sampler import TokenLogprobs

_REASONS = {FinishReason.EOS: "eos_token", FinishReason.LENGTH: "length", FinishReason.MAX_SEQ: "length"}


@dataclass(slots=True)
class Answer:
    """One sequence's answer, as it grows."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)  # seconds between tokens
    last: Output | None = None

    def add(self, output: Output) -> None:
        if output.token_ids:
            if self.last is not None:
                self.gaps.append(output.timings.now - self.last.timings.now)
            self.token_ids += output.token_ids
            self.logprobs += output.logprobs
        self.text += output.text
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


def usage(answers: list[Answer], show_cached: bool) -> dict[str, object]:
    """OpenAI's count of tokens; `cached_tokens` only where there is a prefix cache, as in MindIE."""
    last = answers[0].last
    prompt = 0 if last is None else last.prompt_tokens
    generated = sum(len(answer.token_ids) for answer in answers)
    counted: dict[str, object] = {"prompt_tokens": prompt}
    if show_cached:
        counted["prompt_tokens_details"] = {"cached_tokens": 0 if last is None else last.cached_tokens}
    return counted | {"completion_tokens": generated, "total_tokens": prompt + generated}
