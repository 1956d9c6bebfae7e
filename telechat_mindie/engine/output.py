"""What the engine says: of a request, step by step, and of itself, in numbers."""

from __future__ import annotations

import asyncio
import enum
import queue
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
        cached_tokens: of the prompt, taken from the prefix cache.
        generated_tokens: length of the answer so far.
        seed: of the request's draws.
        timings: when it came, and when its first token was there.
        batch_size: answers that got a token in the same step.
        wait: seconds from its arrival, or the end of its last step, to the step that computed the token.
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
    batch_size: int = 0
    wait: float = 0.0


class OutputStream:
    """Iterates over the outputs of one request, waiting for each; ends after the one with a finish reason.

    The engine must be running in another thread.
    """

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self._outputs: queue.SimpleQueue[Output] = queue.SimpleQueue()
        self._is_over = False

    def deliver(self, output: Output) -> None:
        """Called by the engine."""
        self._outputs.put(output)

    def __iter__(self) -> OutputStream:
        return self

    def __next__(self) -> Output:
        if self._is_over:
            raise StopIteration
        output = self._outputs.get()
        self._is_over = output.finish_reason is not None
        return output


class AsyncOutputStream:
    """The same for coroutines of the event loop in which it was made."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self._loop = asyncio.get_running_loop()
        self._outputs: asyncio.Queue[Output] = asyncio.Queue()
        self._is_over = False

    def deliver(self, output: Output) -> None:
        """Called by the engine, from its own thread.

        Raises:
            RuntimeError: the event loop is closed.
        """
        self._loop.call_soon_threadsafe(self._outputs.put_nowait, output)

    def __aiter__(self) -> AsyncOutputStream:
        return self

    async def __anext__(self) -> Output:
        if self._is_over:
            raise StopAsyncIteration
        output = await self._outputs.get()
        self._is_over = output.finish_reason is not None
        return output


@dataclass(frozen=True, slots=True)
class EngineStats:
    """One look at the engine. Totals count from its construction."""

    running: int  # requests that hold device blocks
    waiting: int  # requests that hold none, preempted ones included
    swapped: int  # requests that hold host blocks
    blocks_total: int  # device blocks that may be handed out
    blocks_used: int  # of these, held by running requests; blocks that are only cached count as free
    host_blocks_total: int
    host_blocks_used: int  # of these, held by swapped requests
    preemptions: int  # times that a running request gave its blocks back, in total
    prompt_tokens: int  # of admitted requests, in total; a preempted request's answer is prompt on its return
    cached_tokens: int  # of these, taken from the prefix cache
    generated_tokens: int  # in total

    @property
    def block_use(self) -> float:
        """Held part of the device blocks, 0 to 1."""
        return self.blocks_used / self.blocks_total

    @property
    def prefix_hit_rate(self) -> float:
        """Cached part of the prompt tokens, 0 to 1."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0
