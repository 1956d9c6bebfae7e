"""The engine's bookkeeping checked from outside: every block and row is accounted for, every queue is in order."""

from __future__ import annotations

from collections.abc import Iterable

from telechat_mindie.engine.block_manager import BlockManager, BlockPool
from telechat_mindie.engine.scheduler import Scheduler
from telechat_mindie.engine.sequence import Sequence, Status


def check_scheduler(scheduler: Scheduler) -> None:
    """Check the queues against each other and the block manager against them.

    Raises:
        RuntimeError: a sequence is in the wrong queue or out of order, a limit is exceeded, or blocks are lost.
    """
    for status, queue in scheduler._queues.items():
        if any(sequence.status is not status for sequence in queue):
            raise RuntimeError(f"a sequence is {status.value} by its queue but not by its status")
        if [s.order for s in queue] != sorted(s.order for s in queue):
            raise RuntimeError(f"the {status.value} sequences are out of order")
    if len(scheduler.running) > scheduler.config.max_batch_size:
        raise RuntimeError("more sequences run than max_batch_size")
    if any(sequence.num_computed for sequence in scheduler.waiting):
        raise RuntimeError("a waiting sequence has computed tokens")
    check_blocks(scheduler.blocks, [*scheduler.waiting, *scheduler.running, *scheduler.swapped])


def check_blocks(manager: BlockManager, sequences: Iterable[Sequence]) -> None:
    """Check that every block is accounted for by these, all unfinished, sequences.

    Raises:
        RuntimeError: a block or row was lost or is held by the wrong sequence, or a table disagrees.
    """
    holders = [0] * manager.pool.num_blocks
    host_holders = [0] * manager.host_pool.num_blocks
    rows = list(manager._rows)
    swapped = set()
    for sequence in sequences:
        if sequence.status is Status.RUNNING:
            rows.append(sequence.row)
            _check_row(manager, sequence)
            for block in manager._blocks[sequence.row]:
                holders[block] += 1
        elif sequence.row != -1:
            raise RuntimeError(f"sequence {sequence.id} is {sequence.status.value} and has a row")
        if sequence.status is Status.SWAPPED:
            swapped.add(sequence.id)
            if len(manager._host_blocks[sequence.id]) != manager.blocks_for(sequence.num_computed):
                raise RuntimeError(f"sequence {sequence.id} was not swapped out whole")
            for block in manager._host_blocks[sequence.id]:
                host_holders[block] += 1
    if sorted(rows) != list(range(len(manager.tables))) or swapped != set(manager._host_blocks):
        raise RuntimeError("a row or a host table is lost")
    check_pool(manager.pool, holders)
    check_pool(manager.host_pool, host_holders)


def _check_row(manager: BlockManager, sequence: Sequence) -> None:
    blocks = manager._blocks[sequence.row]
    table = manager.tables[sequence.row]
    least = manager.blocks_for(max(sequence.num_computed, sequence.prompt_len))
    if table[: len(blocks)].tolist() != blocks or (table[len(blocks) :] != -1).any():
        raise RuntimeError(f"table of sequence {sequence.id} disagrees with its blocks")
    if len(set(blocks)) != len(blocks) or not least <= len(blocks) <= manager.blocks_for(sequence.num_tokens):
        raise RuntimeError(f"sequence {sequence.id} has the wrong number of blocks")
    writable = blocks[sequence.num_computed // manager.block_size :]
    if any(manager.pool.holders(block) != 1 for block in writable):
        raise RuntimeError(f"sequence {sequence.id} shares a block that it will write")


def check_pool(pool: BlockPool, expected_holders: list[int]) -> None:
    """Compare with the holders counted from outside, [num_blocks].

    Raises:
        RuntimeError: a block was lost, held twice over, or is in two states at once.
    """
    free = list(pool._free)
    held = [block for block, count in enumerate(pool._holders) if count > 0]
    is_cached = [block in pool._digests for block in free]
    broken = (
        (pool._holders != expected_holders, "holder counts"),
        (sorted(free + held) != list(range(pool.num_blocks)), "partition into free and held"),
        (is_cached != sorted(is_cached), "cached block before a blank one"),
        (any(pool._holders[block] > 1 and block not in pool._digests for block in held), "shared unknown block"),
        (pool._by_digest != {digest: block for block, digest in pool._digests.items()}, "digest index"),
    )
    for is_broken, what in broken:
        if is_broken:
            raise RuntimeError(f"block pool is inconsistent: {what}")
