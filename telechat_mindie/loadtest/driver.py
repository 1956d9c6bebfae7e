"""When requests are sent: a closed loop keeps a number of them running, an open loop sends them at a rate."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

from telechat_mindie.loadtest.prompts import Item

Send = Callable[[Item], Awaitable[Any]]
"""Sends a request, and returns when its answer is complete or lost."""


@dataclass(frozen=True, slots=True)
class Load:
    """How hard, and for how long.

    Attributes:
        concurrency: requests that run at any time (closed loop), where there is no rate.
        rate: requests a second on average, each independent of the others and of the answers, as from many users
            (Poisson process, open loop).
        requests: most requests to send; None for any number.
        duration: seconds after which no more are sent; those that run are waited for. None for any number.
    """

    concurrency: int = 1
    rate: float | None = None
    requests: int | None = None
    duration: float | None = None


async def drive(send: Send, items: Iterator[Item], load: Load, source: random.Random) -> None:
    """Send `items` as `load` says and return when all answers are there. A cancellation cancels what runs.

    Args:
        send: how.
        items: what, one after another.
        load: when.
        source: of the pauses of an open loop.
    """
    items = itertools.islice(items, load.requests)
    end = time.perf_counter() + (math.inf if load.duration is None else load.duration)
    if load.rate is None:
        await asyncio.gather(*(_one_after_another(send, items, end) for _ in range(load.concurrency)))
    else:
        await asyncio.gather(*[task async for task in _at_random(send, items, end, load.rate, source)])


async def _one_after_another(send: Send, items: Iterator[Item], end: float) -> None:
    for item in items:
        await send(item)
        if time.perf_counter() >= end:
            return


async def _at_random(
    send: Send, items: Iterator[Item], end: float, rate: float, source: random.Random
) -> AsyncIterator[asyncio.Future[Any]]:
    due = time.perf_counter()
    for item in items:
        due += source.expovariate(rate)  # from the last due time, not from now: a late start delays no other
        if due >= end:
            return
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        yield asyncio.ensure_future(send(item))
