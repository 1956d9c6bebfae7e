"""A request from its arrival to its last token."""

from __future__ import annotations

from collections.abc import Callable, Collection

from telechat_mindie.engine.answer_text import AnswerText
from telechat_mindie.engine.output import FinishReason, Output, Timings
from telechat_mindie.engine.params import GenerationParams
from telechat_mindie.engine.sampler import SamplingState, TokenLogprobs
from telechat_mindie.engine.sequence import Sequence


class Request:
    """One answer in the making; the scheduler knows its `sequence`, the sampler its `sampling`.

    Args:
        sequence: the prompt.
        params: what the request asks of its answer.
        seed: of its draws.
        text: what turns its tokens into text.
        eos_ids: the model's ends of sequence.
        max_new_tokens: tokens of the answer at which its reason to end is LENGTH.
        max_seq_len: tokens of prompt and answer at which it is MAX_SEQ.
        arrival: seconds on the engine's clock.
        deliver: called with each output; must not block. If it raises, the request is cancelled.
    """

    def __init__(
        self,
        sequence: Sequence,
        params: GenerationParams,
        *,
        seed: int,
        text: AnswerText,
        eos_ids: Collection[int],
        max_new_tokens: int,
        max_seq_len: int,
        arrival: float,
        deliver: Callable[[Output], object],
    ) -> None:
        self.sequence = sequence
        self.params = params
        self.sampling = SamplingState(params, seed, sequence.token_ids)
        self.deliver = deliver
        self.arrival = arrival
        self.first_token: float | None = None
        self.cached_tokens = 0
        self._idle_since = arrival
        self.is_cancelled = False  # while its batch is being computed
        self._text = text
        self._eos_ids = () if params.ignore_eos else eos_ids
        self._max_new_tokens = max_new_tokens
        self._max_seq_len = max_seq_len

    @property
    def id(self) -> str:
        return self.sequence.id

    @property
    def deadline(self) -> float | None:
        """Seconds on the engine's clock."""
        return None if self.params.timeout is None else self.arrival + self.params.timeout

    def progressed(self, now: float) -> None:
        """A part of the prompt, but not yet a token, has been computed."""
        self._idle_since = now

    def accept(self, token: int, logprobs: TokenLogprobs | None, now: float, began: float, batch_size: int) -> Output:
        """Add a token to the answer, one of `batch_size` of a step that began and ended when it says."""
        if self.first_token is None:
            self.first_token = now
            self.cached_tokens = self.sequence.num_cached
        self.sequence.append(token)
        self.sampling.observe(token)
        reason = FinishReason.EOS if token in self._eos_ids else None
        if reason is None and token in self.params.stop_token_ids:
            reason = FinishReason.STOP_ID
        text = self._text.put([token]) if reason is None or self.params.include_stop_str_in_output else ""
        reason = reason or self._length_reason()
        if self._text.stopped:
            reason = FinishReason.STOP_STRING
        if reason is not None:
            text += self._text.flush()
        wait, self._idle_since = began - self._idle_since, now
        return self._output(
            (token,), text, reason, now, () if logprobs is None else (logprobs,), None, batch_size, wait
        )

    def end(self, reason: FinishReason, now: float, error: str | None = None) -> Output:
        """End the answer without another token. Held back text goes out if the answer stands as it is."""
        text = self._text.flush() if reason is FinishReason.DEADLINE else ""
        return self._output((), text, reason, now, error=error)

    def _length_reason(self) -> FinishReason | None:
        if self.sequence.num_generated >= self._max_new_tokens:
            return FinishReason.LENGTH
        return FinishReason.MAX_SEQ if self.sequence.num_tokens >= self._max_seq_len else None

    def _output(
        self,
        token_ids: tuple[int, ...],
        text: str,
        reason: FinishReason | None,
        now: float,
        logprobs: tuple[TokenLogprobs, ...] = (),
        error: str | None = None,
        batch_size: int = 0,
        wait: float = 0.0,
    ) -> Output:
        return Output(
            request_id=self.id,
            token_ids=token_ids,
            text=text,
            logprobs=logprobs,
            finish_reason=reason,
            error=error,
            prompt_tokens=self.sequence.prompt_len,
            cached_tokens=self.cached_tokens,
            generated_tokens=self.sequence.num_generated,
            seed=self.sampling.seed,
            timings=Timings(self.arrival, self.first_token, now),
            batch_size=batch_size,
            wait=wait,
        )
