"""What a request may ask of its answer."""

from __future__ import annotations

import math
from dataclasses import dataclass

from telechat_mindie.errors import InputError

MIN_TEMPERATURE = 1e-5
"""Below it the largest logit has all the probability that a float32 can express: the answer is greedy."""


@dataclass(frozen=True, slots=True)
class GenerationParams:
    """Sampling, stopping and scheduling wishes of one request. The defaults give a plain greedy answer.

    Args:
        max_new_tokens: tokens of the answer; None for as many as the engine allows.
        do_sample: draw tokens at random; otherwise each is the most likely one.
        temperature: divides the logits before a draw; 0 means greedy.
        top_k: draw among the k most likely tokens only; 0 for all.
        top_p: draw among the fewest most likely tokens whose probabilities reach top_p together.
        typical_p: draw among the tokens whose surprise is nearest to the expected one, up to that probability.
        repetition_penalty: divides positive and multiplies negative logits of tokens seen in prompt or answer.
        presence_penalty: subtracted from the logits of tokens seen in the answer.
        frequency_penalty: the same, once for each time.
        seed: of the draws; None for a random one.
        stop: strings that end the answer.
        stop_token_ids: tokens that end the answer, beside the model's end of sequence.
        ignore_eos: go on after the model's end of sequence.
        include_stop_str_in_output: leave the stop string or the last token's text in the answer.
        skip_special_tokens: leave control tokens out of the text.
        logprobs: how many most likely tokens to report with each token of the answer; None to report nothing.
        priority: 1 (most urgent) to 5.
        timeout: seconds from arrival after which the answer is cut; None for no limit.

    Raises:
        InputError: a value out of its range.
    """

    max_new_tokens: int | None = None
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    priority: int = 5
    timeout: float | None = None

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, "a number from 0 on", 0 <= self.temperature < math.inf)
        _check("top_k", self.top_k, "a number from 0 on", self.top_k >= 0)
        _check("top_p", self.top_p, "above 0, at most 1", 0 < self.top_p <= 1)
        _check("typical_p", self.typical_p, "above 0, at most 1", 0 < self.typical_p <= 1)
        _check("repetition_penalty", self.repetition_penalty, "above 0", 0 < self.repetition_penalty < math.inf)
        _check("presence_penalty", self.presence_penalty, "-2 to 2", -2 <= self.presence_penalty <= 2)
        _check("frequency_penalty", self.frequency_penalty, "-2 to 2", -2 <= self.frequency_penalty <= 2)
        _check("priority", self.priority, "1 to 5", 1 <= self.priority <= 5)
        if self.max_new_tokens is not None:
            _check("max_new_tokens", self.max_new_tokens, "at least 1", self.max_new_tokens >= 1)
        if self.seed is not None:
            _check("seed", self.seed, "0 to 2**64 - 1", 0 <= self.seed < 2**64)
        if self.logprobs is not None:
            _check("logprobs", self.logprobs, "a number from 0 on", self.logprobs >= 0)
        if self.timeout is not None:
            _check("timeout", self.timeout, "above 0 seconds", 0 < self.timeout < math.inf)
        _check("stop", self.stop, "strings that are not empty", all(self.stop))

    @property
    def greedy(self) -> bool:
        return not self.do_sample or self.temperature < MIN_TEMPERATURE

    @property
    def penalised(self) -> bool:
        """Whether the logits depend on the tokens seen so far."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


def _check(name: str, value: object, expected: str, holds: bool) -> None:
    if not holds:  # NaN fails every comparison, so it ends here as well
        raise InputError("is out of range", where=name, expected=expected, found=value)
