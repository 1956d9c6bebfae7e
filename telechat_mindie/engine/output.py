"""What the engine tells of a request, step by step."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from telechat_mindie.engine.sampler import TokenLogprobs


class FinishReason(enum.Enum):
    """Why an answer ended."""

    EOS = "eos"  # the model's end of sequence
    STOP_STRING = "stop_string"
    STOP_ID = "stop_id"
    LENGTH = "length"  # max_new_tokens, or the engine's max_iter_times
    MAX_SEQ = "max_seq"  # prompt and answer fill max_seq_len, or the cache
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds on the engine's clock (monotonic unless it was given another one)."""

    arrival: float
    first_token: float | None  # None before it
    now: float  # of this output


@dataclass(frozen=True, slots=True)
class Output:
    """What one step added to one answer.

    Attributes:
        request_id: whose answer.
        token_ids: new tokens; empty where the request ended without one.
        text: new text. It may lag behind the tokens, by incomplete characters and by what may become a stop string.
        logprobs: one a new token, where the request wants them.
        finish_reason: why the answer ended, on the last output only.
        error: one sentence, where the reason is ERROR.
        prompt_tokens: length of the prompt.
        cached_tokens: of the prompt, found in the prefix cache.
        generated_tokens: length of the answer so far.
        seed: of the request's draws.
        timings: when it came, and when its first token was there.
    """

    request_id: str
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: FinishReason | None
    error: str | None
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    seed: int
    timings: Timings
