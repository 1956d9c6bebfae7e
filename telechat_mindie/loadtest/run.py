"""A load test from the first contact to its records."""

from __future__ import annotations

import random
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from telechat_mindie.client.client import MindieClient
from telechat_mindie.client.dialects import Dialect, OpenAIChat, Sampling, Tgi
from telechat_mindie.client.errors import ServiceError
from telechat_mindie.loadtest.driver import Load, drive
from telechat_mindie.loadtest.prompts import Item, Range, measure_words, random_items, read_items
from telechat_mindie.loadtest.record import Record, send


@dataclass(frozen=True, slots=True)
class Plan:
    """What to send where.

    Attributes:
        url: the service.
        api: the request format.
        load: when to send.
        prompt_tokens: length of the random prompts' text; a chat template's own tokens come on top.
        output_tokens: most tokens of an answer.
        prompts: a file of prompts in the place of random ones.
        fixed_output: have the model go on after the end of its answer, so that every answer has its most tokens.
        warm_up: requests that are sent before, one after another, and not measured.
        temperature: None for the service's default.
        seed: of prompts, lengths and pauses.
        model: None for the first that the service names.
        timeout: seconds that a request may take.
        tls: for https.
    """

    url: str
    api: Literal["openai", "tgi"]
    load: Load
    prompt_tokens: Range
    output_tokens: Range
    prompts: Path | None = None
    fixed_output: bool = False
    warm_up: int = 1
    temperature: float | None = None
    seed: int = 0
    model: str | None = None
    timeout: float = 600
    tls: ssl.SSLContext | None = None

    def settings(self) -> dict[str, Any]:
        """What a report says of the test; None for what does not count."""
        load, has_file = self.load, self.prompts is not None
        return {
            "url": self.url,
            "api": self.api,
            "concurrency": load.concurrency if load.rate is None else None,
            "rate": load.rate,
            "prompt_tokens": None if has_file else str(self.prompt_tokens),
            "prompts": str(self.prompts) if has_file else None,
            "output_tokens": str(self.output_tokens),
            "fixed_output": self.fixed_output,
            "warm_up": self.warm_up,
            "seed": self.seed,
        }


@dataclass(slots=True)
class Outcome:
    """What a load test leaves; complete once `run` returned, usable at any time.

    Attributes:
        records: of the requests that ended.
        busy: part of the test's time, 0 to 1, that this process computed. Near 1 it measured itself.
        notes: what a reader of the figures should know.
    """

    records: list[Record] = field(default_factory=list)
    busy: float = 0.0
    notes: list[str] = field(default_factory=list)


async def run(plan: Plan, outcome: Outcome, finished: Callable[[], object] = lambda: None) -> None:
    """Carry out `plan` into `outcome`.

    Args:
        finished: called after each measured request.

    Raises:
        InputError: the prompts or the address are of no use.
        ServiceError: the service cannot be reached, or refuses the warm-up.
    """
    source = random.Random(plan.seed)
    async with MindieClient(plan.url, plan.tls, timeout=plan.timeout) as client:
        dialect: Dialect = Tgi() if plan.api == "tgi" else OpenAIChat(plan.model or await client.first_model())
        tokens_per_word = await measure_words(client.count_tokens, source)
        if plan.prompts is not None:
            items = read_items(plan.prompts, plan.output_tokens, source)
        else:
            items = random_items(plan.prompt_tokens, plan.output_tokens, tokens_per_word or 1, source)
            if tokens_per_word is None:
                outcome.notes.append("no /v1/tokenizer: the prompts are only about as long as they should be")

        async def send_one(item: Item) -> Record:
            sampling = Sampling(item.max_tokens, plan.temperature, ignore_eos=plan.fixed_output)
            return await send(client, dialect, item, sampling)

        async def measure(item: Item) -> None:
            outcome.records.append(await send_one(item))
            finished()

        for _ in range(plan.warm_up):
            record = await send_one(next(items))
            if record.error is not None:
                raise ServiceError(f"refuses the warm-up: {record.message}", kind=record.error)
        wall, computed = time.perf_counter(), time.process_time()
        try:
            await drive(measure, items, plan.load, source)
        finally:
            outcome.busy = (time.process_time() - computed) / (time.perf_counter() - wall)
        await _count_outputs(client, outcome, has_tokenizer=tokens_per_word is not None)


async def _count_outputs(client: MindieClient, outcome: Outcome, *, has_tokenizer: bool) -> None:
    """Count the tokens of answers whose service did not, after the test, so that it is not disturbed."""
    uncounted = [record for record in outcome.records if record.generated_tokens is None and record.error is None]
    for record in uncounted:
        record.generated_tokens = await client.count_tokens(record.text) if has_tokenizer else len(record.texts)
    if uncounted:
        how = "by /v1/tokenizer" if has_tokenizer else "as one a piece of text"
        outcome.notes.append(f"the service does not count tokens: answers are counted {how}")
