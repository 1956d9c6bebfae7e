"""One request of a load test, timed."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field

from telechat_mindie.client.client import MindieClient
from telechat_mindie.client.dialects import Dialect, Sampling
from telechat_mindie.client.errors import ServiceError
from telechat_mindie.loadtest.prompts import Item


@dataclass(slots=True)
class Record:
    """What became of a request. Times are seconds on the clock of `time.perf_counter`.

    Attributes:
        sent: when it was sent.
        ended: when its last byte came, or the error.
        texts: when each piece of text came. A token may wait for the rest of its character, and a service may send
            several tokens at once, so pieces are not tokens.
        text: the answer; dropped where its tokens are counted.
        prompt_tokens: as the service counted; None where it does not tell.
        generated_tokens: likewise.
        error: the kind of the fault; None where the whole answer came.
        message: the fault, in a sentence.
    """

    sent: float
    ended: float = 0.0
    texts: list[float] = field(default_factory=list)
    text: str = ""
    prompt_tokens: int | None = None
    generated_tokens: int | None = None
    error: str | None = None
    message: str = ""

    @property
    def time_to_first_token(self) -> float | None:
        """TTFT; None where no text came."""
        return self.texts[0] - self.sent if self.texts else None

    @property
    def time_per_output_token(self) -> float | None:
        """TPOT: the mean time of a token after the first; None for answers of one token."""
        if not self.texts or self.generated_tokens is None or self.generated_tokens < 2:
            return None
        return (self.texts[-1] - self.texts[0]) / (self.generated_tokens - 1)

    @property
    def inter_token_latencies(self) -> list[float]:
        """ITL: the waits between one piece of text and the next."""
        return [later - earlier for earlier, later in zip(self.texts, self.texts[1:], strict=False)]

    @property
    def latency(self) -> float:
        """e2e: from the request to the last byte."""
        return self.ended - self.sent


async def send(client: MindieClient, dialect: Dialect, item: Item, sampling: Sampling) -> Record:
    """Send one request and time its answer; a fault of the service is part of the record."""
    pieces = []
    record = Record(time.perf_counter())
    try:
        async with contextlib.aclosing(client.stream(dialect, item.prompt, sampling)) as deltas:
            async for delta in deltas:
                if text := delta.thought + delta.text:
                    record.texts.append(time.perf_counter())
                    pieces.append(text)
                if delta.prompt_tokens is not None:
                    record.prompt_tokens = delta.prompt_tokens
                if delta.generated_tokens is not None:
                    record.generated_tokens = delta.generated_tokens
    except ServiceError as error:
        record.error, record.message = error.kind, str(error)
    record.ended = time.perf_counter()
    if record.generated_tokens is None:
        record.text = "".join(pieces)
    return record
