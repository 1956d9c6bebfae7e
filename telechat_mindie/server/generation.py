"""One request in the engine: as many sequences as it asked for, their outputs in one queue."""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from telechat_mindie.engine.engine import Engine, EngineBusyError, EngineStoppedError
from telechat_mindie.engine.output import FinishReason, Output
from telechat_mindie.engine.params import GenerationParams
from telechat_mindie.errors import InputError, TelechatMindieError
from telechat_mindie.server.answers import Answer, Renderer
from telechat_mindie.server.http.errors import STOPPED, ApiError


class Ended(enum.Enum):
    """Who ended a request before its time."""

    CLIENT = "the client left"
    STOPPED = "the client asked for it by another request"
    SHUTDOWN = "the server stops"


class ClientGoneError(Exception):
    """Nobody is there to be answered."""


def from_engine(error: TelechatMindieError) -> ApiError:
    """What MindIE answers where its engine refuses a request (single_llm_pnd_req_handler.cpp:95-108)."""
    if isinstance(error, EngineBusyError):
        return ApiError(503, str(error))
    if isinstance(error, EngineStoppedError):
        return ApiError(503, STOPPED)
    return ApiError(424 if isinstance(error, InputError) else 500, f"Failed to enqueue the request: {error}")


@dataclass(frozen=True, slots=True)
class Job:
    """A request, read and understood.

    Args:
        prompt_ids: the prompt.
        params: of each sequence; a given seed is that of the first, the others follow.
        renderer: of its format.
        stream: answer token by token.
        count: sequences; several whole answers come best first.
        timed_by_client: the request brought the time-out in `params`.
    """

    prompt_ids: NDArray[np.int64]
    params: GenerationParams
    renderer: Renderer
    stream: bool
    count: int = 1
    timed_by_client: bool = False


class Generation:
    """A request in the engine. Made and submitted in any thread; the event loop does the rest.

    Args:
        engine: that runs in a thread of its own.
        job: what it is to do.
        token_seconds: time-out for the next output.
        loop: the event loop that reads the outputs.
    """

    def __init__(self, engine: Engine, job: Job, token_seconds: float, loop: asyncio.AbstractEventLoop) -> None:
        self.id = uuid.uuid4().hex
        self.job = job
        self.answers = [Answer() for _ in range(job.count)]
        self.ended: Ended | None = None
        self._engine = engine
        self._token_seconds = token_seconds
        self._loop = loop
        self._outputs: asyncio.Queue[tuple[int, Output] | None] = asyncio.Queue()  # None: the wait took too long
        self._waits_since: float | None = None
        self._timer: asyncio.TimerHandle

    def submit(self) -> None:
        """Queue all sequences, or none. Takes long for a long prompt: call it from another thread than the loop's.

        Raises:
            ApiError: the engine refuses.
        """
        for index in range(len(self.answers)):
            params = self.job.params
            if params.seed is not None:
                params = dataclasses.replace(params, seed=(params.seed + index) % 2**63)
            try:
                self._engine.submit(self.job.prompt_ids, params, partial(self._deliver, index), self._request_id(index))
            except TelechatMindieError as error:
                self._cancel_all()
                raise from_engine(error) from None
        if self.ended is not None:  # while this thread was at it
            self._cancel_all()

    async def outputs(self) -> AsyncIterator[tuple[int, Output]]:
        """Each output with the index of its answer, which has it already.

        Raises:
            ApiError: 500 the engine failed or took too long, 503 the server stops.
            ClientGoneError: the client left.
        """
        left = len(self.answers)
        self._watch()
        try:
            while left:
                self._waits_since = self._loop.time()
                arrived = await self._outputs.get()
                self._waits_since = None
                if arrived is None:
                    raise ApiError(500, "Engine callback timeout: server tokenTimeout")
                index, output = arrived
                self._check(output)
                self.answers[index].add(output)
                left -= output.finish_reason is not None
                yield index, output
        finally:
            self._timer.cancel()

    def _watch(self) -> None:
        """End a wait that takes too long. One timer a request, since one a token costs 5 % of the tokens."""
        waited = 0.0 if self._waits_since is None else self._loop.time() - self._waits_since
        if waited >= self._token_seconds:
            self._outputs.put_nowait(None)
        else:
            self._timer = self._loop.call_later(self._token_seconds - waited, self._watch)

    def cancel(self, by: Ended) -> None:
        """End what is unfinished; its blocks are free when the forward under way has ended. Harmless at any time."""
        if self.ended is None:
            self.ended = by
        self._cancel_all()

    def _check(self, output: Output) -> None:
        reason = output.finish_reason
        if self.ended is Ended.CLIENT:
            raise ClientGoneError
        if reason is FinishReason.ERROR:
            raise ApiError(500, f"The engine failed: {output.error}")
        if reason is FinishReason.DEADLINE:
            whose = "client timeout" if self.job.timed_by_client else "server e2eTimeout"
            raise ApiError(500, f"Engine callback timeout: {whose}")
        if reason is FinishReason.CANCELLED and self.ended is not Ended.STOPPED:
            raise ApiError(503, STOPPED)

    def _cancel_all(self) -> None:
        for index, answer in enumerate(self.answers):
            if not answer.is_finished:
                self._engine.cancel(self._request_id(index))

    def _request_id(self, index: int) -> str:
        return f"{self.id}-{index}"

    def _deliver(self, index: int, output: Output) -> None:
        """Called in the engine's thread."""
        self._loop.call_soon_threadsafe(self._outputs.put_nowait, (index, output))
