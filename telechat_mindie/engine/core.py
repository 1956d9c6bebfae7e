"""One step of the engine after the other, in one thread: requests in, outputs in the outbox."""

from __future__ import annotations

import heapq
import logging
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from telechat_mindie.engine.block_manager import BlockManager
from telechat_mindie.engine.config import EngineConfig
from telechat_mindie.engine.output import EngineStats, FinishReason, Output
from telechat_mindie.engine.request import Request
from telechat_mindie.engine.runner import Runner, run
from telechat_mindie.engine.sampler import NO_TOKEN, SamplingState, TokenLogprobs, sample
from telechat_mindie.engine.scheduler import Batch, Scheduler
from telechat_mindie.errors import TelechatMindieError
from telechat_mindie.kv_budget import RESERVED_BLOCKS

_log = logging.getLogger(__name__)

Sampled = tuple[int, TokenLogprobs | None] | Exception
"""A token and its log probabilities, or why there is none."""


class EngineCore:
    """Requests, scheduler and runner put together. Not thread-safe; `telechat_mindie.engine.engine.Engine` is.

    A step is `begin`, `compute` and `settle`. Only `compute` takes long, and it touches nothing but the batch, so
    requests may come and go meanwhile; those of the batch are cancelled when it has been computed.

    Attributes:
        requests: unfinished ones by their id.
        outbox: outputs that nobody has picked up yet, with their requests.
    """

    def __init__(self, runner: Runner, config: EngineConfig, clock: Callable[[], float]) -> None:
        self._runner = runner
        self._config = config
        self._clock = clock
        self._blocks = BlockManager(
            runner.npu_num_blocks - RESERVED_BLOCKS,
            config.block_size,
            config.max_batch_size,
            config.max_seq_len,
            runner.cpu_num_blocks,
            config.prefix_cache,
        )
        self.scheduler = Scheduler(config, self._blocks)
        self.requests: dict[str, Request] = {}
        self.outbox: deque[tuple[Request, Output]] = deque()
        self._in_flight: list[Request] = []
        self._began = 0.0  # when the batch was chosen
        self._deadlines: list[tuple[float, str]] = []  # a heap of requests by their ids
        self._num_generated = 0

    def add(self, request: Request) -> None:
        self.requests[request.id] = request
        self.scheduler.add(request.sequence)
        if request.deadline is not None:
            heapq.heappush(self._deadlines, (request.deadline, request.id))

    def cancel(self, request_id: str) -> bool:
        """End a request and free its blocks: now, or if they are being computed on, right after that.

        Returns:
            Whether there was such an unfinished request.
        """
        request = self.requests.get(request_id)
        if request is None:
            return False
        if request in self._in_flight:
            request.is_cancelled = True
        else:
            self._end(request, FinishReason.CANCELLED)
        return True

    def begin(self) -> Batch:
        """End what is overdue and choose the next batch, which is empty if there is nothing left to do."""
        now = self._clock()
        while self._deadlines and self._deadlines[0][0] <= now:
            deadline, request_id = heapq.heappop(self._deadlines)
            request = self.requests.get(request_id)
            if request is not None and request.deadline == deadline:  # not one of before, with the same id
                self._end(request, FinishReason.DEADLINE)
        batch = self.scheduler.schedule()
        self._in_flight = [self.requests[sequence.id] for sequence in batch.sequences]
        self._began = self._clock()
        return batch

    def compute(self, batch: Batch) -> list[Sampled | None] | Exception:
        """For each sequence of the batch its next token, None where the prompt goes on; or why the forward failed."""
        try:
            logits = run(self._runner, batch, self._blocks.tables, self._config.block_size)
        except Exception as error:
            log_fault(f"forward failed for {len(batch.sequences)} requests", error)
            return error
        rows = [
            row
            for row, (sequence, query_len) in enumerate(zip(batch.sequences, batch.query_lens, strict=True))
            if query_len == sequence.num_uncomputed
        ]
        results: list[Sampled | None] = [None] * len(batch.sequences)
        if rows:
            states = [self._in_flight[row].sampling for row in rows]
            sampled = _sample_each(logits if len(rows) == len(logits) else logits[rows], states)
            for row, result in zip(rows, sampled, strict=True):
                results[row] = result
        return results

    def settle(self, batch: Batch, results: list[Sampled | None] | Exception) -> None:
        """Put the results of `compute` into the answers, and end those that are complete, cancelled or at fault."""
        in_flight, self._in_flight = self._in_flight, []
        if isinstance(results, Exception):
            # What a failed copy or forward left in the blocks of these is anyone's guess.
            for request in dict.fromkeys([*in_flight, *self._moved(batch)]):
                self._end(request, FinishReason.ERROR, _sentence(results))
            return
        self.scheduler.complete(batch)
        size = sum(isinstance(result, tuple) for result in results)
        for request, result in zip(in_flight, results, strict=True):
            if request.is_cancelled:
                self._end(request, FinishReason.CANCELLED)
            elif isinstance(result, Exception):
                self._end(request, FinishReason.ERROR, _sentence(result))
            elif result is None:
                request.progressed(self._clock())
            else:
                self._accept(request, *result, size)

    def abandon(self, batch: Batch) -> None:
        """Forget a batch that was not computed to its end; the next step chooses its sequences again."""
        in_flight, self._in_flight = self._in_flight, []
        for request in in_flight:
            if request.is_cancelled:
                self._end(request, FinishReason.CANCELLED)
        for request in self._moved(batch):
            self._end(request, FinishReason.ERROR, "interrupted while its cache was being moved")

    def give_up(self, error: str) -> None:
        """End all requests, without a look at the scheduler, whose state cannot be relied on."""
        for request in self.requests.values():
            self.outbox.append((request, request.end(FinishReason.ERROR, self._clock(), error)))
        self.requests.clear()

    def stats(self) -> EngineStats:
        blocks, scheduler = self._blocks, self.scheduler
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            swapped=len(scheduler.swapped),
            blocks_total=blocks.pool.num_blocks,
            blocks_used=blocks.pool.num_blocks - blocks.pool.num_free,
            host_blocks_total=blocks.host_pool.num_blocks,
            host_blocks_used=blocks.host_pool.num_blocks - blocks.host_pool.num_free,
            preemptions=scheduler.num_preemptions,
            prompt_tokens=scheduler.num_prompt_tokens,
            cached_tokens=scheduler.num_cached_tokens,
            generated_tokens=self._num_generated,
        )

    def _moved(self, batch: Batch) -> list[Request]:
        """The unfinished requests whose blocks the batch copies."""
        moved = dict.fromkeys(batch.swapped)  # one may have been moved back and forth
        return [self.requests[sequence.id] for sequence in moved if sequence.id in self.requests]

    def _accept(self, request: Request, token: int, logprobs: TokenLogprobs | None, batch_size: int) -> None:
        try:
            output = request.accept(token, logprobs, self._clock(), self._began, batch_size)
        except Exception as error:
            log_fault(f"token {token} of request {request.id} cannot be taken", error)
            self._end(request, FinishReason.ERROR, _sentence(error))
            return
        self._num_generated += 1
        self.outbox.append((request, output))
        if output.finish_reason is not None:
            self._forget(request)

    def _end(self, request: Request, reason: FinishReason, error: str | None = None) -> None:
        self.outbox.append((request, request.end(reason, self._clock(), error)))
        self._forget(request)

    def _forget(self, request: Request) -> None:
        del self.requests[request.id]
        self.scheduler.remove(request.sequence)


def _sample_each(logits: NDArray[np.float32], states: Sequence[SamplingState]) -> list[Sampled]:
    """Sample all rows at once; if that raises, row by row, so that the fault stays with its request."""
    try:
        tokens, logprobs = sample(logits, states)
    except Exception as error:
        if len(states) == 1:
            log_fault("sampling failed", error)
            return [error]
        return [_sample_each(logits[row : row + 1], [state])[0] for row, state in enumerate(states)]
    return [
        (token, report) if token != NO_TOKEN else ArithmeticError("the model's logits are NaN or infinite")
        for token, report in zip(tokens, logprobs, strict=True)
    ]


def log_fault(what: str, error: Exception) -> None:
    """One line at level ERROR; the traceback only where DEBUG is on."""
    _log.error("%s: %s", what, _sentence(error), exc_info=error if _log.isEnabledFor(logging.DEBUG) else None)


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, TelechatMindieError) else f"{type(error).__name__}: {text}"
