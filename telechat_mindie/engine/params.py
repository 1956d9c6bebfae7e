"""What a request may ask of its answer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from telechat_mindie.errors import InputError

if TYPE_CHECKING:
    from telechat_mindie.model_dir.layout import ServingConfig

MIN_TEMPERATURE = 1e-5
"""Below it the largest logit has all the probability that a float32 can express: the answer is greedy."""

_SAMPLING = frozenset({"temperature", "top_k", "top_p"})  # to give one of these is to ask for sampling


@dataclass(frozen=True, slots=True)
class GenerationParams:
    """How one answer is to be sampled, stopped and scheduled. The defaults give a plain greedy answer.

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
        kept_tokens: names of those that stay in it even so, such as the tags of a tool call.
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
    kept_tokens: tuple[str, ...] = ()
    logprobs: int | None = None
    priority: int = 5
    timeout: float | None = None

    def __post_init__(self) -> None:
        for name, holds, expected in (
            ("temperature", 0 <= self.temperature < math.inf, "a number from 0 on"),
            ("top_k", self.top_k >= 0, "a number from 0 on"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
            ("typical_p", 0 < self.typical_p <= 1, "above 0, at most 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "-2 to 2"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "-2 to 2"),
            ("max_new_tokens", self.max_new_tokens is None or self.max_new_tokens >= 1, "at least 1"),
            ("seed", self.seed is None or 0 <= self.seed < 2**64, "0 to 2**64 - 1"),
            ("stop", all(self.stop), "strings that are not empty"),
            ("logprobs", self.logprobs is None or self.logprobs >= 0, "a number from 0 on"),
            ("priority", 1 <= self.priority <= 5, "1 to 5"),
            ("timeout", self.timeout is None or 0 < self.timeout < math.inf, "above 0 seconds"),
        ):
            if not holds:  # NaN fails every comparison, so it ends here as well
                raise InputError("is out of range", where=name, expected=expected, found=getattr(self, name))

    @classmethod
    def with_defaults(cls, defaults: ServingConfig, **given: Any) -> GenerationParams:
        """From what a caller gives; what is None or left out is as the model directory has it, or else as above.

        As in MindIE's worker (mindie_llm/text_generator/utils/batch_context.py:440-510): who names temperature, top_k
        or top_p but not do_sample wants to sample. A top_k of -1 stands for all.

        Raises:
            InputError: a value out of its range.
        """
        values = {name: value for name, value in given.items() if value is not None}
        values.setdefault("do_sample", defaults.do_sample or not _SAMPLING.isdisjoint(values))
        for name in ("temperature", "top_k", "top_p", "repetition_penalty"):
            values.setdefault(name, getattr(defaults, name))
        return cls(**values | {"top_k": 0 if values["top_k"] == -1 else values["top_k"]})

    @property
    def greedy(self) -> bool:
        return not self.do_sample or self.temperature < MIN_TEMPERATURE

    @property
    def penalised(self) -> bool:
        """Whether the logits depend on the tokens seen so far."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0
