"""What runs next: budgets, order, preemption; and a state machine that looks for a lost block or a stuck sequence."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.engine_checks import check_scheduler
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from telechat_mindie.engine.block_manager import BlockManager
from telechat_mindie.engine.config import EngineConfig
from telechat_mindie.engine.scheduler import Batch, Scheduler
from telechat_mindie.engine.sequence import Sequence, Status
from telechat_mindie.errors import InputError

BLOCK = 4


def scheduler(num_blocks: int = 64, host: int = 0, **limits: Any) -> Scheduler:
    defaults: dict[str, Any] = {
        "max_seq_len": 64,
        "max_input_token_len": 32,
        "max_batch_size": 8,
        "max_prefill_batch_size": 8,
        "max_prefill_tokens": 64,
        "block_size": BLOCK,
    }
    config = EngineConfig(**(defaults | limits))
    blocks = BlockManager(
        num_blocks, BLOCK, config.max_batch_size, config.max_seq_len, host, prefix_cache=config.prefix_cache
    )
    return Scheduler(config, blocks)


def add(to: Scheduler, name: str, length: int, priority: int = 5, first: int = 0) -> Sequence:
    """Queue a prompt of `length` tokens, all different from those of another `first`."""
    arrival = len(to.waiting) + len(to.running) + len(to.swapped)
    sequence = Sequence(name, range(first * 1000, first * 1000 + length), (priority, arrival))
    to.add(sequence)
    return sequence


def step(of: Scheduler) -> list[tuple[str, int]]:
    """Schedule, compute and sample; the names of the batch with their new tokens."""
    batch = of.schedule()
    names = [(sequence.id, count) for sequence, count in zip(batch.sequences, batch.query_lens, strict=True)]
    settle(of, batch)
    check_scheduler(of)
    return names


def settle(of: Scheduler, batch: Batch) -> None:
    of.complete(batch)
    for sequence in batch.sequences:
        if not sequence.num_uncomputed:
            sequence.append(7)


def test_prompts_are_prefilled_together_within_the_budget_then_all_decode() -> None:
    sched = scheduler(max_prefill_tokens=20, max_input_token_len=20)
    for name in "abc":
        add(sched, name, 8)
    assert step(sched) == [("a", 8), ("b", 8)]
    assert step(sched) == [("c", 8)]
    assert step(sched) == [("a", 1), ("b", 1), ("c", 1)]


def test_a_new_prompt_goes_before_the_next_decode() -> None:
    sched = scheduler()
    add(sched, "a", 8)
    step(sched)
    add(sched, "b", 8)
    assert step(sched) == [("b", 8)]


def test_batch_limits_hold() -> None:
    sched = scheduler(max_batch_size=3, max_prefill_batch_size=2)
    for name in "abcd":
        add(sched, name, 4)
    assert step(sched) == [("a", 4), ("b", 4)]
    assert step(sched) == [("c", 4)]
    assert step(sched) == [("a", 1), ("b", 1), ("c", 1)]
    sched.remove(sched.running[0])
    assert step(sched) == [("d", 4)]


def test_priority_then_arrival_decides_and_nobody_is_overtaken() -> None:
    sched = scheduler(max_prefill_batch_size=1)
    add(sched, "late", 4)
    add(sched, "later", 4)
    add(sched, "urgent", 4, priority=1)
    assert [step(sched)[0][0] for _ in range(3)] == ["urgent", "late", "later"]
    tight = scheduler(num_blocks=6)
    add(tight, "a", 12)
    step(tight)
    add(tight, "big", 16)
    add(tight, "small", 4)
    assert step(tight) == [("a", 1)]  # small would fit, but big came first


def test_decoding_out_of_blocks_preempts_the_least_urgent_which_is_computed_anew() -> None:
    sched = scheduler(num_blocks=4)
    first, second = add(sched, "a", 4), add(sched, "b", 4, first=1)
    step(sched)
    while not sched.num_preemptions:
        step(sched)
    assert second.status is Status.WAITING and second.num_computed == 0
    generated = second.num_generated
    sched.remove(first)
    assert step(sched) == [("b", 4 + generated)]


def test_preemption_swaps_where_host_blocks_and_the_limit_allow() -> None:
    sched = scheduler(num_blocks=7, host=8, max_preempt_count=1)
    first, second, third = (add(sched, name, 8, first=number) for number, name in enumerate("abc"))
    step(sched)
    batch = sched.schedule()
    assert [sequence.id for sequence in batch.preempted] == ["c"]  # a takes the block kept free, b one of c's
    assert third.status is Status.SWAPPED
    assert [to_host for to_host, _, _ in batch.swaps] == [True, True]
    settle(sched, batch)
    check_scheduler(sched)
    sched.remove(first)
    batch = sched.schedule()
    assert [to_host for to_host, _, _ in batch.swaps] == [False, False]
    assert [sequence.id for sequence in batch.sequences] == ["b", "c"]
    assert not batch.is_prefill
    assert second.status is third.status is Status.RUNNING


def test_beyond_the_limit_of_swaps_the_next_victim_is_computed_anew() -> None:
    sched = scheduler(num_blocks=7, host=8, max_preempt_count=1)
    for number, name in enumerate("abcdef"):
        add(sched, name, 4, first=number)
    step(sched)
    batch = sched.schedule()  # all need a second block: a has the one kept free, b that of f, c that of e
    assert [(victim.id, victim.status) for victim in batch.preempted] == [
        ("f", Status.SWAPPED),
        ("e", Status.WAITING),
        ("d", Status.WAITING),
    ]


def test_a_swapped_sequence_returns_before_a_less_urgent_one_is_admitted() -> None:
    sched = scheduler(num_blocks=8, host=8, max_preempt_count=1)
    for number, name in enumerate("abc"):
        add(sched, name, 8, first=number)
    step(sched)
    step(sched)  # c is out, and two blocks are free: too few for c, enough for d
    newcomer = add(sched, "d", 4, first=9)
    assert step(sched) == [("a", 1), ("b", 1)]
    assert newcomer.status is Status.WAITING
    urgent = add(sched, "e", 4, priority=1, first=8)
    sched.remove(sched.running[0])
    assert step(sched) == [("e", 4)]
    assert urgent.status is Status.RUNNING


def test_an_answer_that_outgrew_the_prefill_budget_is_computed_anew_in_pieces() -> None:
    sched = scheduler(num_blocks=12, max_input_token_len=8, max_prefill_tokens=8)
    sequence = add(sched, "a", 8)
    step(sched)
    for _ in range(12):
        step(sched)
    sched.blocks.free(sequence)
    sched._move(sequence, Status.WAITING)
    assert [step(sched) for _ in range(4)] == [[("a", 8)], [("a", 8)], [("a", 5)], [("a", 1)]]


def test_mixed_batches_put_decodes_first_and_fill_up_with_chunks() -> None:
    sched = scheduler(chunked_prefill=True, split_chunk_tokens=10)
    add(sched, "a", 6)
    step(sched)
    add(sched, "b", 20, first=1)
    add(sched, "c", 3, first=2)
    assert step(sched) == [("a", 1), ("b", 9)]
    assert step(sched) == [("a", 1), ("b", 9)]
    batch = sched.schedule()
    assert [(s.id, n) for s, n in zip(batch.sequences, batch.query_lens, strict=True)] == [("a", 1), ("b", 2), ("c", 3)]
    assert batch.num_decodes == 1 and batch.is_prefill and batch.chunked
    settle(sched, batch)
    batch = sched.schedule()
    assert batch.query_lens == [1, 1, 1] and not batch.is_prefill and not batch.chunked


def test_a_sequence_may_have_the_whole_pool_when_it_is_alone() -> None:
    sched = scheduler(num_blocks=4, max_seq_len=16, max_input_token_len=15)
    add(sched, "a", 15)
    assert step(sched) == [("a", 15)]


def test_a_known_prefix_costs_no_budget() -> None:
    sched = scheduler(prefix_cache=True, max_prefill_tokens=16, max_input_token_len=16)
    add(sched, "a", 16)
    step(sched)
    add(sched, "b", 16)
    add(sched, "c", 16)
    assert step(sched) == [("b", 4), ("c", 4)]
    assert (sched.num_prompt_tokens, sched.num_cached_tokens) == (48, 24)


def test_two_equal_prompts_in_one_batch_are_both_computed() -> None:
    sched = scheduler(prefix_cache=True)
    add(sched, "a", 9)
    add(sched, "b", 9)
    assert step(sched) == [("a", 9), ("b", 9)]


def test_remove_frees_blocks_whatever_the_sequence_is_doing() -> None:
    sched = scheduler(num_blocks=7, host=8, max_preempt_count=1, max_prefill_batch_size=3)
    sequences = [add(sched, name, 8, first=number) for number, name in enumerate("abcd")]
    step(sched)
    step(sched)
    assert [sequence.status for sequence in sequences] == [
        Status.RUNNING,
        Status.RUNNING,
        Status.SWAPPED,
        Status.WAITING,
    ]
    for sequence in sequences:
        sched.remove(sequence)
        check_scheduler(sched)
    assert sched.blocks.pool.num_free == 7 and sched.blocks.host_pool.num_free == 8
    assert sched.schedule().sequences == []


@pytest.mark.parametrize("queue", ["waiting", "running", "swapped"])
def test_the_checks_notice_a_sequence_in_the_wrong_queue(queue: str) -> None:
    sched = scheduler()
    stranger = Sequence("x", [1])
    stranger.status = Status.FINISHED
    getattr(sched, queue).append(stranger)
    with pytest.raises(RuntimeError):
        check_scheduler(sched)


@pytest.mark.parametrize(
    "limits",
    [
        {"max_seq_len": 1},
        {"block_size": 0},
        {"max_prefill_batch_size": 9, "max_batch_size": 8},
        {"max_prefill_tokens": 100, "max_input_token_len": 200, "max_seq_len": 500},
    ],
    ids=str,
)
def test_limits_that_cannot_work_are_refused(limits: dict[str, int]) -> None:
    with pytest.raises(InputError, match=next(iter(limits))):
        EngineConfig(**limits)


def test_chunked_prefill_needs_no_budget_for_the_longest_prompt() -> None:
    assert EngineConfig(max_prefill_tokens=100, chunked_prefill=True).prefill_budget == 100


class SchedulerMachine(RuleBasedStateMachine):
    """Random requests against a pool far too small, in every mode.

    After each rule nothing is lost, limits hold, and as long as there are sequences a step computes something.
    """

    @initialize(
        num_blocks=st.integers(8, 14),
        host=st.sampled_from([0, 4, 20]),
        swaps=st.integers(0, 3),
        chunked=st.booleans(),
        prefix_cache=st.booleans(),
    )
    def configure(self, num_blocks: int, host: int, swaps: int, chunked: bool, prefix_cache: bool) -> None:
        self.sched = scheduler(
            num_blocks,
            host,
            max_seq_len=32,  # of 8 blocks: any sequence fits alone
            max_input_token_len=16,
            max_prefill_tokens=16,
            max_batch_size=5,
            max_prefill_batch_size=3,
            max_preempt_count=swaps,
            chunked_prefill=chunked,
            split_chunk_tokens=9,
            prefix_cache=prefix_cache,
        )
        self.alive: dict[str, Sequence] = {}
        self.count = 0

    @rule(length=st.integers(1, 16), group=st.integers(0, 2), priority=st.integers(1, 5))
    def add(self, length: int, group: int, priority: int) -> None:
        """Prompts of one group are prefixes of each other."""
        self.count += 1
        prompt = range(100 * group, 100 * group + length)
        sequence = Sequence(str(self.count), prompt, (priority, self.count))
        self.alive[sequence.id] = sequence
        self.sched.add(sequence)

    @rule(token=st.integers(0, 3), keep=st.booleans())
    def step(self, token: int, keep: bool) -> None:
        """One forward; without `keep` it fails, and its sequences with it."""
        batch = self.sched.schedule()
        self.check(batch)
        if not keep:
            for sequence in {*batch.sequences, *batch.swapped}:
                self.finish(sequence)
            return
        self.sched.complete(batch)
        for sequence in batch.sequences:
            if not sequence.num_uncomputed:
                sequence.append(token)
                if sequence.num_tokens >= self.sched.config.max_seq_len:
                    self.finish(sequence)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.finish(self.alive[data.draw(st.sampled_from(sorted(self.alive)))])

    @precondition(lambda self: self.sched.running)
    @rule()
    def interrupt(self) -> None:
        """A batch is chosen and forgotten, as where a step is interrupted before its forward."""
        batch = self.sched.schedule()
        self.check(batch)
        for sequence in set(batch.swapped):  # whether its blocks were copied is unknown
            self.finish(sequence)

    def finish(self, sequence: Sequence) -> None:
        self.sched.remove(sequence)
        del self.alive[sequence.id]

    def check(self, batch: Batch) -> None:
        config = self.sched.config
        assert bool(batch.sequences) == bool(self.alive)
        assert len(set(batch.sequences)) == len(batch.sequences)
        prefills = batch.query_lens[batch.num_decodes :]
        assert len(prefills) <= config.max_prefill_batch_size
        assert len(batch.sequences) <= config.max_batch_size
        if batch.is_prefill:
            assert sum(batch.query_lens) <= max(config.prefill_budget, batch.num_decodes)
        if not config.chunked_prefill:
            assert not prefills or not batch.num_decodes
        swapped_out = [sequence for sequence in batch.preempted if sequence.status is Status.SWAPPED]
        assert len(swapped_out) <= config.max_preempt_count
        for sequence, query_len in zip(batch.sequences, batch.query_lens, strict=True):
            assert sequence.status is Status.RUNNING
            assert 1 <= query_len <= sequence.num_uncomputed
            room = (self.sched.blocks.tables[sequence.row] >= 0).sum() * BLOCK
            assert room >= sequence.num_computed + query_len

    @invariant()
    def nothing_is_lost(self) -> None:
        if hasattr(self, "sched"):
            check_scheduler(self.sched)
            queued = [*self.sched.waiting, *self.sched.running, *self.sched.swapped]
            assert sorted(s.id for s in queued) == sorted(self.alive)

    def teardown(self) -> None:
        """Whatever happened, everyone can finish, and then all blocks are free."""
        if not hasattr(self, "sched"):
            return
        for _ in range(20 * 32 * (len(self.alive) + 1)):
            if not self.alive:
                break
            self.step(token=1, keep=True)
            check_scheduler(self.sched)
        assert not self.alive
        assert self.sched.blocks.pool.num_free == self.sched.blocks.pool.num_blocks
        assert self.sched.blocks.host_pool.num_free == self.sched.blocks.host_pool.num_blocks


SchedulerMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
TestSchedulerMachine = SchedulerMachine.TestCase
