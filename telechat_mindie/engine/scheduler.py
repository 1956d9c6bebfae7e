"""Continuous batching: which sequences run in the next forward, and with how many new tokens."""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field
from operator import attrgetter

from telechat_mindie.engine.block_manager import BlockManager
from telechat_mindie.engine.config import EngineConfig
from telechat_mindie.engine.sequence import Sequence, Status

_BY_URGENCY = attrgetter("order")


@dataclass(slots=True)
class Batch:
    """One forward: sequences with their new tokens, and the block copies to be made before it."""

    sequences: list[Sequence] = field(default_factory=list)  # decodes first
    query_lens: list[int] = field(default_factory=list)  # new tokens of each
    num_decodes: int = 0
    chunked: bool = False  # prefills may begin or end inside a prompt: passed as the splitfuse plugin does
    swaps: list[tuple[bool, int, int]] = field(default_factory=list)  # (to host, source, destination), in order
    swapped: list[Sequence] = field(default_factory=list)  # the sequences that `swaps` moves
    preempted: list[Sequence] = field(default_factory=list)

    def add(self, sequence: Sequence, query_len: int) -> None:
        self.sequences.append(sequence)
        self.query_lens.append(query_len)

    @property
    def is_prefill(self) -> bool:
        return len(self.sequences) > self.num_decodes


class Scheduler:
    """Keeps waiting, running and swapped sequences, each list with the most urgent first.

    Sequences are admitted strictly by urgency (priority, then arrival), so none is overtaken for ever; when blocks run
    out, the least urgent running sequence is preempted.
    """

    def __init__(self, config: EngineConfig, blocks: BlockManager) -> None:
        self.config = config
        self.blocks = blocks
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.swapped: list[Sequence] = []
        self._queues = {Status.WAITING: self.waiting, Status.RUNNING: self.running, Status.SWAPPED: self.swapped}
        self.num_preemptions = 0
        self.num_prompt_tokens = 0  # of admitted sequences
        self.num_cached_tokens = 0  # of these, taken from the prefix cache

    def add(self, sequence: Sequence) -> None:
        insort(self.waiting, sequence, key=_BY_URGENCY)

    def schedule(self) -> Batch:
        """The next batch; without sequences only when there are none at all."""
        batch = Batch()
        self._resume_swapped(batch)
        if self.config.chunked_prefill:
            self._add_decodes(batch)
            self._add_prefills(batch)
        else:
            self._add_prefills(batch)
            if not batch.sequences:
                self._add_decodes(batch)
        return batch

    def complete(self, batch: Batch) -> None:
        """Count the tokens of a forward that succeeded as computed."""
        for sequence, query_len in zip(batch.sequences, batch.query_lens, strict=True):
            sequence.num_computed += query_len
            self.blocks.publish(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, finished or not, and free its blocks."""
        self._queues[sequence.status].remove(sequence)
        self.blocks.free(sequence)
        sequence.status = Status.FINISHED

    def _resume_swapped(self, batch: Batch) -> None:
        while self.swapped and self._has_row() and not self._is_overtaken(self.swapped, self.waiting):
            sequence = self.swapped[0]
            if not self.blocks.can_swap_in(sequence, self._reserve()):
                return
            batch.swaps += [(False, source, target) for source, target in self.blocks.swap_in(sequence)]
            batch.swapped.append(sequence)
            self._move(sequence, Status.RUNNING)

    def _add_decodes(self, batch: Batch) -> None:
        """One token for each sequence that decodes, the most urgent first; so no victim is in the batch already."""
        for sequence in [sequence for sequence in self.running if sequence.is_decoding]:
            while sequence.status is Status.RUNNING and not self.blocks.can_append(sequence):
                self._preempt(self.running[-1], batch)
            if sequence.status is Status.RUNNING:
                self.blocks.append(sequence)
                batch.add(sequence, 1)
                batch.num_decodes += 1

    def _add_prefills(self, batch: Batch) -> None:
        """As many prompt tokens as the budget allows: of prompts that were begun, then of those that wait."""
        budget = self.config.prefill_budget - batch.num_decodes
        for sequence in [sequence for sequence in self.running if not sequence.is_decoding]:
            budget -= self._add_prefill(sequence, batch, budget)
        while self.waiting and self._has_row():
            sequence = self.waiting[0]
            prefix = self.blocks.match(sequence)
            uncached = sequence.num_tokens - len(prefix) * self.blocks.block_size
            if (
                budget < self._least_chunk(uncached)
                or len(batch.sequences) - batch.num_decodes >= self.config.prefill_batch_limit
                or self._is_overtaken(self.waiting, self.swapped)
                or not self.blocks.can_allocate(sequence, prefix, self._reserve())
            ):
                return
            self.blocks.allocate(sequence, prefix)
            self._move(sequence, Status.RUNNING)
            self.num_prompt_tokens += sequence.num_tokens
            self.num_cached_tokens += sequence.num_cached
            budget -= self._add_prefill(sequence, batch, budget)

    def _add_prefill(self, sequence: Sequence, batch: Batch, budget: int) -> int:
        """Add as many of its uncomputed tokens as the budget allows; how many."""
        query_len = min(sequence.num_uncomputed, budget)
        if query_len <= 0:
            return 0
        is_whole = sequence.num_computed == sequence.num_cached and query_len == sequence.num_uncomputed
        batch.chunked |= self.config.chunked_prefill or not is_whole
        batch.add(sequence, query_len)
        return query_len

    def _least_chunk(self, uncached: int) -> int:
        """New tokens with which a sequence may start.

        A preempted sequence's answer counts as prompt, so it may have outgrown every budget; it is cut after all.
        """
        return 1 if self.config.chunked_prefill else min(uncached, self.config.prefill_budget)

    def _preempt(self, victim: Sequence, batch: Batch) -> None:
        """Take the blocks of a running sequence; it goes on later, from host blocks or by computing them anew."""
        swaps_left = self.config.max_preempt_count - sum(seq.status is Status.SWAPPED for seq in batch.preempted)
        if victim.is_decoding and swaps_left > 0 and self.blocks.can_swap_out(victim):
            batch.swaps += [(True, source, target) for source, target in self.blocks.swap_out(victim)]
            batch.swapped.append(victim)
            self._move(victim, Status.SWAPPED)
        else:
            self.blocks.free(victim)
            self._move(victim, Status.WAITING)
        batch.preempted.append(victim)
        self.num_preemptions += 1

    def _has_row(self) -> bool:
        return len(self.running) < self.config.max_batch_size

    def _reserve(self) -> int:
        """Blocks kept free on admission, so that the running do not preempt the new one in the very next step."""
        return -(-self.blocks.pool.num_blocks // 100) if self.running else 0

    @staticmethod
    def _is_overtaken(queue: list[Sequence], other: list[Sequence]) -> bool:
        return bool(other) and other[0].order < queue[0].order

    def _move(self, sequence: Sequence, status: Status) -> None:
        self._queues[sequence.status].remove(sequence)
        sequence.status = status
        insort(self._queues[status], sequence, key=_BY_URGENCY)
