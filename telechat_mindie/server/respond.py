"""From a request's first byte to its answer's last: the one way that all formats share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from telechat_mindie.server.generation import ClientGoneError, Ended, Generation, Job
from telechat_mindie.server.http.errors import ApiError, dump, error_response
from telechat_mindie.server.http.request_log import Entry, entry_of
from telechat_mindie.server.service import Service


class BrokenOffError(Exception):
    """A stream that had begun ended with an error, as its last event says."""


class Answering(Response):
    """A response that computes itself, so that it sees the client leave at any moment of it.

    Args:
        read: makes a job of the body's JSON, in a thread; may raise ApiError or InputError.
    """

    def __init__(self, service: Service, request: Request, read: Callable[[dict[str, Any]], Job]) -> None:
        super().__init__()
        self._service = service
        self._request = request
        self._read = read

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service, metrics = self._service, self._service.metrics
        begin = time.monotonic()
        metrics.received += 1
        service.in_flight += 1
        try:
            generation = await self._answer(receive, send, entry_of(scope))
            metrics.succeed(generation.answers, time.monotonic() - begin)
        except ApiError as error:
            metrics.failed += 1
            await error_response(error)(scope, receive, send)
        except (BrokenOffError, ClientDisconnect, ClientGoneError):
            metrics.failed += 1
        finally:
            service.in_flight -= 1

    async def _answer(self, receive: Receive, send: Send, entry: Entry) -> Generation:
        service = self._service
        if service.in_flight > service.limits.requests:
            raise ApiError(503, f"Too many requests: {service.limits.requests} are served or wait. Try again later.")
        service.refuse_if_stopping()
        raw = await service.bodies.read(self._request)
        generation = await service.begin(raw, self._read)
        service.metrics.accept(len(generation.job.prompt_ids))
        entry.prompt_tokens = len(generation.job.prompt_ids)
        entry.answer_tokens = lambda: sum(len(answer.token_ids) for answer in generation.answers)
        entry.content = lambda: (
            service.tokenizer.decode(generation.job.prompt_ids),
            [answer.text for answer in generation.answers],
        )
        watcher = asyncio.create_task(_watch(receive, generation))
        try:
            await (_stream if generation.job.stream else _whole)(generation, send)
        finally:
            watcher.cancel()
            service.end(generation, Ended.CLIENT)
        return generation


async def _whole(generation: Generation, send: Send) -> None:
    async for _ in generation.outputs():
        pass
    answers = generation.answers
    if len(answers) > 1:
        answers = sorted(answers, key=lambda answer: -answer.total_logprob)
    body = dump(generation.job.renderer.whole(answers))
    await _start(send, "application/json", len(body))
    await send({"type": "http.response.body", "body": body})


async def _stream(generation: Generation, send: Send) -> None:
    """Until the first output the status is open: an error before it has its own."""
    renderer, is_started = generation.job.renderer, False
    try:
        async for index, output in generation.outputs():
            if not is_started:
                is_started = True
                await _start(send, renderer.media_type)
            events = b"".join(map(renderer.frame, renderer.events(index, output, generation.answers)))
            if events:
                await send({"type": "http.response.body", "body": events, "more_body": True})
    except ApiError as error:
        if not is_started:
            raise
        await send({"type": "http.response.body", "body": renderer.frame(error.content())})
        raise BrokenOffError from error
    await send({"type": "http.response.body", "body": renderer.end})


async def _start(send: Send, media_type: str, length: int | None = None) -> None:
    headers = [(b"content-type", media_type.encode()), (b"cache-control", b"no-store")]
    if length is not None:
        headers.append((b"content-length", str(length).encode()))
    await send({"type": "http.response.start", "status": 200, "headers": headers})


async def _watch(receive: Receive, generation: Generation) -> None:
    """End the generation when the client leaves."""
    while (await receive())["type"] != "http.disconnect":
        pass
    generation.cancel(Ended.CLIENT)
