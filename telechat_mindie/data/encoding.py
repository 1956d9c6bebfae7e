"""Records made into examples, by several processes where there are many, in the order of the files."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from telechat_mindie.data.conversations import read_conversation
from telechat_mindie.data.examples import Example, encode
from telechat_mindie.data.records import Record
from telechat_mindie.errors import InputError, TelechatMindieError
from telechat_mindie.text import chat_template
from telechat_mindie.text.time_limit import run_within
from telechat_mindie.text.tokenizer import TelechatTokenizer

MAX_WORKERS = 8
_BATCH = 128  # most records of a task
_BATCH_BYTES = 128 << 10  # of records, with which a task ends before
_AHEAD = 24  # tasks that wait for each worker: work for the seconds in which the caller imports MindSpore, in 12 MB
_ALONE_BYTES = 2 << 20  # below it, starting processes takes longer than the work


@dataclass(frozen=True)
class Encoding:
    """How records become examples.

    Args:
        tokenizer: directory of tokenizer.model, with the chat template in the files beside it.
        form: of `conversations.FORMS`, or None to see by the fields.
        train_on: of `examples.TRAIN_ON`.
    """

    tokenizer: Path
    form: str | None = None
    train_on: str = "all"

    def open(self) -> Encoder:
        return Encoder(self)


class Encoded(NamedTuple):
    """A record's example, or the one sentence that says why there is none."""

    where: str
    example: Example | None
    fault: str = ""


class Encoder:
    """One process's tokenizer at work."""

    def __init__(self, encoding: Encoding) -> None:
        self._encoding = encoding
        self._tokenizer = TelechatTokenizer.from_pretrained(encoding.tokenizer)

    def __call__(self, record: Record) -> Encoded:
        try:
            conversation = read_conversation(record.parse(), self._encoding.form)
            return Encoded(record.where, encode(self._tokenizer, conversation, self._encoding.train_on))
        except TelechatMindieError as error:
            fault = str(error)
            return Encoded(record.where, None, fault if fault.startswith(record.where) else f"{record.where}: {fault}")

    def batch(self, records: list[Record]) -> list[Encoded]:
        """Several at once, under one limit of time: the thread that each would need takes longer than its work."""
        try:
            return run_within(chat_template.MAX_SECONDS, lambda: list(map(self, records)))
        except TimeoutError:
            return list(map(self, records))  # each under its own, which says whose template takes too long


def encode_records(encoding: Encoding, records: Iterable[Record], total_bytes: int) -> Iterator[Encoded]:
    """Each record's example, in order.

    Args:
        total_bytes: of all records; few are done in this process.

    Raises:
        TokenizerError: no tokenizer comes of the directory.
    """
    encoder = encoding.open()  # here first, where a fault is the caller's own
    workers = min(os.cpu_count() or 1, MAX_WORKERS)
    if total_bytes < _ALONE_BYTES or workers == 1:
        for batch in _batches(records):
            yield from encoder.batch(batch)
        return
    # Not forked: a copy of a process with threads may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (encoding,)) as pool:
        waiting: deque[Future[list[Encoded]]] = deque()
        try:
            for batch in _batches(records):
                waiting.append(pool.submit(_encode_batch, batch))
                if len(waiting) > _AHEAD * workers:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        except BrokenProcessPool:
            raise InputError(
                "a process that made tokens ended, maybe for want of memory", where="preprocess", advice="Free memory."
            ) from None
        finally:
            for task in waiting:
                task.cancel()


def _batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    batch: list[Record] = []
    size = 0
    for record in records:
        batch.append(record)
        size += len(record.data)
        if len(batch) == _BATCH or size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


_encoder: Encoder


def _start_worker(encoding: Encoding) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the caller ends the pool
    _encoder = encoding.open()


def _encode_batch(batch: list[Record]) -> list[Encoded]:
    return _encoder.batch(batch)
