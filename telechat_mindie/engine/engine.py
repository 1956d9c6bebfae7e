"""The engine's front: requests come from any thread, one thread computes."""

from __future__ import annotations

import dataclasses
import itertools
import secrets
import threading
import time
import uuid
from collections.abc import Callable, Generator, Iterable
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from telechat_mindie.engine.answer_text import AnswerText, Decoder
from telechat_mindie.engine.config import EngineConfig
from telechat_mindie.engine.core import EngineCore, log_fault
from telechat_mindie.engine.output import AsyncOutputStream, EngineStats, Output, OutputStream
from telechat_mindie.engine.params import GenerationParams
from telechat_mindie.engine.request import Request
from telechat_mindie.engine.runner import Runner
from telechat_mindie.engine.sequence import Sequence
from telechat_mindie.errors import InputError, TelechatMindieError
from telechat_mindie.kv_budget import RESERVED_BLOCKS


class EngineBusyError(TelechatMindieError):
    """As many requests wait as may; the same request may succeed later."""


class EngineStoppedError(TelechatMindieError):
    """The engine takes no more requests."""


class Tokenizer(Protocol):
    """`telechat_mindie.text.tokenizer.TelechatTokenizer`, as far as the engine uses it."""

    def stream_decoder(self, skip_special_tokens: bool = True, keep: Iterable[str] = ()) -> Decoder:
        """A decoder for one answer."""


class Engine:
    """Serves many requests at once on one runner.

    `start` runs it in a thread of its own; without it, a caller drives it with `step`. All other methods may be called
    from any thread at any time.

    Args:
        runner: the model, made with `config.block_size`.
        tokenizer: decodes the answers.
        config: limits; max_seq_len is lowered to what the model and its cache can hold.
        clock: seconds, for arrivals and deadlines.

    Raises:
        InputError: limits that do not fit each other or the cache.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer,
        config: EngineConfig | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        config = config or EngineConfig()
        model = runner.model_config
        capacity = (runner.npu_num_blocks - RESERVED_BLOCKS) * config.block_size
        self.config = dataclasses.replace(
            config, max_seq_len=min(config.max_seq_len, model.max_position_embedding, capacity)
        )
        self._vocab_size: int = model.vocab_size
        eos = model.eos_token_id
        self._eos_ids = frozenset([eos] if isinstance(eos, int) else eos)
        self._tokenizer = tokenizer
        self._clock = clock
        self._core = EngineCore(runner, self.config, clock)
        self._arrivals = itertools.count()
        self._stepping = threading.Lock()  # held for a whole step
        self._lock = threading.RLock()  # guards the core; never held while the model computes
        self._changed = threading.Condition(self._lock)
        self._is_stopping = False
        self._thread: threading.Thread | None = None

    def submit(
        self,
        prompt_ids: ArrayLike,
        params: GenerationParams,
        deliver: Callable[[Output], object],
        request_id: str,
    ) -> None:
        """Queue a request.

        Args:
            prompt_ids: the prompt's tokens; an array is read once, a list becomes one.
            params: what to do with it.
            deliver: called with each output, in the thread that computes or cancels. It must not block; if it raises,
                the request is cancelled.
            request_id: unique among unfinished requests.

        Raises:
            InputError: a prompt that is empty, too long or has tokens the model does not know, or an id in use.
            EngineBusyError: the queue is full.
            EngineStoppedError: `stop` was called, or the engine died.
        """
        prompt = self._checked(prompt_ids)
        iterations = self.config.max_iter_times
        request = Request(
            Sequence(request_id, prompt, (params.priority, next(self._arrivals))),
            params,
            seed=secrets.randbits(32) if params.seed is None else params.seed,
            text=AnswerText(
                self._tokenizer.stream_decoder(params.skip_special_tokens, params.kept_tokens),
                params.stop,
                params.include_stop_str_in_output,
            ),
            eos_ids=self._eos_ids,
            max_new_tokens=min(params.max_new_tokens or iterations, iterations),
            max_seq_len=self.config.max_seq_len,
            arrival=self._clock(),
            deliver=deliver,
        )
        with self._changed:
            if self._is_stopping:
                raise EngineStoppedError("the engine is stopping", advice="Send the request to another instance.")
            if request_id in self._core.requests:
                raise InputError("is in use", where="request id", found=request_id)
            if len(self._core.scheduler.waiting) >= self.config.max_waiting:
                raise EngineBusyError(
                    "too many requests wait", expected=f"at most {self.config.max_waiting}", advice="Try again later."
                )
            self._core.add(request)
            self._changed.notify_all()

    def add(
        self, prompt_ids: ArrayLike, params: GenerationParams | None = None, request_id: str | None = None
    ) -> OutputStream:
        """Queue a request whose outputs are read in a thread; raises as `submit`."""
        stream = OutputStream(request_id or uuid.uuid4().hex)
        self.submit(prompt_ids, params or GenerationParams(), stream.deliver, stream.request_id)
        return stream

    def add_async(
        self, prompt_ids: ArrayLike, params: GenerationParams | None = None, request_id: str | None = None
    ) -> AsyncOutputStream:
        """Queue a request whose outputs are read in the running event loop; raises as `submit`."""
        stream = AsyncOutputStream(request_id or uuid.uuid4().hex)
        self.submit(prompt_ids, params or GenerationParams(), stream.deliver, stream.request_id)
        return stream

    def generate(self, prompt_ids: ArrayLike, params: GenerationParams | None = None) -> Generator[Output, None, None]:
        """Yield the outputs of one answer as they are computed, in this thread, which must be the only one that runs.

        Raises:
            InputError: as `submit`.
        """
        stream = self.add(prompt_ids, params)
        try:
            while True:
                for output in self.step():
                    if output.request_id == stream.request_id:
                        yield output
                        if output.finish_reason is not None:
                            return
        finally:
            self.cancel(stream.request_id)

    def cancel(self, request_id: str) -> bool:
        """End a request. Its blocks are free on return, or once the forward that is under way has ended.

        Returns:
            Whether there was such an unfinished request.
        """
        with self._lock:
            was_unfinished = self._core.cancel(request_id)
            self._deliver()
            return was_unfinished

    @property
    def has_work(self) -> bool:
        """Whether there are unfinished requests."""
        with self._lock:
            return bool(self._core.requests)

    def stats(self) -> EngineStats:
        with self._lock:
            return self._core.stats()

    def step(self) -> list[Output]:
        """Compute one batch and deliver what came of it; the outputs of all requests, none if there is no work."""
        with self._stepping:
            with self._lock:
                batch = self._core.begin()
                outputs = self._deliver()
            if not batch.sequences:
                return outputs
            try:
                results = self._core.compute(batch)
            except BaseException:  # an interrupt, which the caller deals with
                with self._lock:
                    self._core.abandon(batch)
                    self._deliver()
                raise
            with self._lock:
                self._core.settle(batch, results)
                return outputs + self._deliver()

    @property
    def is_running(self) -> bool:
        """Whether there is a thread that computes."""
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Run in a thread of its own until `stop`.

        Raises:
            InputError: it does so already.
        """
        if self._thread is not None:
            raise InputError("was started before", where="engine")
        self._thread = threading.Thread(target=self._run, name="telechat-engine", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        """Step while there is work, wait while there is none; return after `stop`, when no request is left."""
        try:
            while True:
                with self._changed:
                    while not self._core.requests:
                        if self._is_stopping:
                            return
                        self._changed.wait()
                self.step()
        except Exception as error:
            log_fault("the engine died", error)
            self._die(error)

    def stop(self, drain: bool = True, timeout: float | None = None) -> None:
        """Take no more requests and return when none is left.

        Args:
            drain: let the unfinished requests finish; otherwise they are cancelled.
            timeout: seconds after which those still unfinished are cancelled.
        """
        with self._changed:
            self._is_stopping = True
            if not drain:
                self._cancel_all()
            self._changed.notify_all()
        give_up = time.monotonic() + (threading.TIMEOUT_MAX if timeout is None else timeout)
        if self._thread is None:
            while self.has_work:
                self.step()
                if time.monotonic() > give_up:
                    self._cancel_all()
            return
        self._thread.join(max(0, give_up - time.monotonic()))
        if self._thread.is_alive():
            self._cancel_all()
            self._thread.join()

    def _cancel_all(self) -> None:
        with self._lock:
            for request_id in list(self._core.requests):
                self._core.cancel(request_id)
            self._deliver()

    def _die(self, error: Exception) -> None:
        """Tell every request that nothing more will come; the state of blocks and queues is not to be trusted."""
        with self._lock:
            self._is_stopping = True
            self._core.give_up(f"the engine died of {type(error).__name__}")
            self._deliver()

    def _deliver(self) -> list[Output]:
        """Empty the outbox, under the lock, so that a request's outputs arrive in their order."""
        outputs = []
        while self._core.outbox:
            request, output = self._core.outbox.popleft()
            outputs.append(output)
            try:
                request.deliver(output)
            except Exception as error:
                log_fault(f"outputs of request {request.id} cannot be delivered", error)
                request.deliver = lambda _: None
                self._core.cancel(request.id)
        return outputs

    def _checked(self, prompt_ids: ArrayLike) -> NDArray[np.integer]:
        try:
            prompt = np.asarray(prompt_ids)
        except ValueError:  # lists of different lengths
            prompt = np.empty(0)
        if prompt.ndim != 1 or not prompt.size or prompt.dtype.kind not in "iu":
            raise InputError("is not a list of tokens", where="prompt", expected="at least one integer")
        if len(prompt) > self.config.longest_prompt:
            limit, advice = self.config.longest_prompt, "Shorten it, or raise maxInputTokenLen and maxSeqLen."
            raise InputError(
                "is too long", where="prompt", expected=f"at most {limit} tokens", found=len(prompt), advice=advice
            )
        if prompt.min() < 0 or prompt.max() >= self._vocab_size:
            allowed = f"0 to {self._vocab_size - 1}"
            raise InputError("holds a token outside the vocabulary", where="prompt", expected=allowed)
        return prompt
