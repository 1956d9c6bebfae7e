"""Blocks are handed out, shared, found again, evicted and swapped without losing one."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.engine_checks import check_blocks, check_pool

from telechat_mindie.engine.block_manager import BlockManager, BlockPool
from telechat_mindie.engine.sequence import Sequence, Status

BLOCK = 4


def manager(num_blocks: int = 8, host: int = 0, prefix_cache: bool = True) -> BlockManager:
    return BlockManager(
        num_blocks, BLOCK, max_sequences=4, max_seq_len=40, num_host_blocks=host, prefix_cache=prefix_cache
    )


def admit(blocks: BlockManager, name: str, tokens: list[int]) -> Sequence:
    """Allocate a sequence and count it as prefilled."""
    sequence = Sequence(name, tokens)
    blocks.allocate(sequence, blocks.match(sequence))
    sequence.status = Status.RUNNING
    sequence.num_computed = sequence.num_tokens
    blocks.publish(sequence)
    return sequence


def table(blocks: BlockManager, sequence: Sequence) -> list[int]:
    row = blocks.tables[sequence.row]
    return row[row >= 0].tolist()


def test_allocate_gives_a_block_for_every_started_block_of_tokens() -> None:
    blocks = manager()
    sequence = admit(blocks, "a", list(range(9)))
    assert len(table(blocks, sequence)) == 3
    assert blocks.pool.num_free == 5
    check_blocks(blocks, [sequence])


def test_can_allocate_counts_cached_blocks_once_and_keeps_the_reserve() -> None:
    blocks = manager(num_blocks=4)
    first = admit(blocks, "a", list(range(8)))
    blocks.free(first)  # two blocks stay findable, and count as free
    again = Sequence("b", [*range(8), *range(8)])  # needs four: the two cached ones and the two blank ones
    prefix = blocks.match(again)
    assert len(prefix) == 2
    assert blocks.can_allocate(again, prefix)
    assert not blocks.can_allocate(again, prefix, reserve=1)
    longer = Sequence("c", [*range(8), *range(9)])
    assert not blocks.can_allocate(longer, blocks.match(longer))


def test_append_takes_a_block_only_where_the_last_one_is_full() -> None:
    blocks = manager(num_blocks=2)
    sequence = admit(blocks, "a", [1, 2, 3])
    sequence.append(4)
    assert blocks.can_append(sequence)
    blocks.append(sequence)
    assert len(table(blocks, sequence)) == 1
    sequence.num_computed += 1
    sequence.append(5)
    blocks.append(sequence)
    blocks.append(sequence)  # again changes nothing: a step that was interrupted is repeated
    assert len(table(blocks, sequence)) == 2
    sequence.num_computed += 1
    for token in (6, 7, 8, 9):
        sequence.append(token)
    sequence.num_computed += 3
    assert not blocks.can_append(sequence)


def test_a_sequence_is_one_array_that_is_seldom_moved() -> None:
    sequence = Sequence("a", [1, 2, 3])
    buffers = set()
    for token in range(10_000):
        sequence.append(token)
        buffers.add(sequence.token_ids.ctypes.data)
    assert sequence.token_ids.dtype == np.int64
    assert sequence.token_ids.tolist() == [1, 2, 3, *range(10_000)]
    assert (sequence.last_token, sequence.num_tokens, sequence.num_generated) == (9_999, 10_003, 10_000)
    assert len(buffers) < 12


def test_equal_prefixes_share_blocks_until_the_first_difference() -> None:
    blocks = manager()
    first = admit(blocks, "a", [*range(8), 50, 51])
    second = admit(blocks, "b", [*range(8), 60])
    assert table(blocks, first)[:2] == table(blocks, second)[:2]
    assert table(blocks, first)[2] != table(blocks, second)[2]
    assert second.num_cached == 8
    check_blocks(blocks, [first, second])
    blocks.free(first)
    first.status = Status.FINISHED
    check_blocks(blocks, [second])


def test_a_block_in_the_middle_is_found_only_with_the_same_beginning() -> None:
    blocks = manager()
    admit(blocks, "a", [*range(4), 7, 7, 7, 7, 1])
    other = Sequence("b", [9, 9, 9, 9, 7, 7, 7, 7, 1])
    assert blocks.match(other) == []


def test_a_fully_known_prompt_still_has_a_block_to_compute() -> None:
    blocks = manager()
    admit(blocks, "a", list(range(8)))
    again = admit(blocks, "b", list(range(8)))
    assert again.num_cached == 4


def test_blocks_are_found_only_once_they_are_computed() -> None:
    blocks = manager()
    first = Sequence("a", list(range(9)))
    blocks.allocate(first, [])
    assert blocks.match(Sequence("b", list(range(9)))) == []
    first.num_computed = 6  # a chunk that ends inside the second block
    blocks.publish(first)
    assert len(blocks.match(Sequence("c", list(range(9))))) == 1


def test_the_answer_is_found_as_the_next_prompts_prefix() -> None:
    blocks = manager()
    sequence = admit(blocks, "a", [1, 2, 3])
    for token in (4, 5):
        sequence.append(token)
        blocks.append(sequence)
        sequence.num_computed += 1
        blocks.publish(sequence)
    assert len(blocks.match(Sequence("b", [1, 2, 3, 4, 5, 6]))) == 1


def test_eviction_takes_the_blocks_held_longest_ago_and_ends_first() -> None:
    blocks = manager(num_blocks=4)
    for name, tokens in (("old", [1] * 8), ("new", [2] * 8)):
        sequence = admit(blocks, name, tokens)
        blocks.free(sequence)
    taker = admit(blocks, "taker", [3, 3])
    assert len(blocks.match(Sequence("x", [1] * 9))) == 1  # the end went first, the beginning is of use alone
    assert len(blocks.match(Sequence("y", [2] * 9))) == 2
    taker.status = Status.RUNNING
    check_blocks(blocks, [taker])


def test_without_prefix_cache_nothing_is_found() -> None:
    blocks = manager(prefix_cache=False)
    admit(blocks, "a", list(range(9)))
    assert blocks.match(Sequence("b", list(range(9)))) == []


def test_swap_copies_what_is_computed_there_and_back() -> None:
    blocks = manager(num_blocks=4, host=3)
    sequence = admit(blocks, "a", list(range(6)))
    before = table(blocks, sequence)
    sequence.append(9)
    assert blocks.can_swap_out(sequence)
    out = blocks.swap_out(sequence)
    sequence.status = Status.SWAPPED
    assert [device for device, _ in out] == before
    assert blocks.pool.num_free == 4 and blocks.host_pool.num_free == 1
    check_blocks(blocks, [sequence])
    other = admit(blocks, "b", [7] * 5)
    assert not blocks.can_swap_out(other)  # two blocks, and one host block is left
    assert blocks.can_swap_in(sequence)
    back = blocks.swap_in(sequence)
    sequence.status = Status.RUNNING
    assert [host for host, _ in back] == [host for _, host in out]
    assert [device for _, device in back] == table(blocks, sequence)
    assert sequence.num_computed == 6
    check_blocks(blocks, [sequence, other])


def test_a_prefix_is_found_again_after_a_swap_though_its_old_blocks_are_gone() -> None:
    blocks = manager(num_blocks=4, host=3)
    sequence = admit(blocks, "a", list(range(9)))
    blocks.swap_out(sequence)
    blocks.free(admit(blocks, "b", [7] * 15))  # takes every block
    blocks.swap_in(sequence)
    blocks.publish(sequence)
    assert len(blocks.match(Sequence("c", list(range(9))))) == 2


def test_swap_in_waits_for_room_for_the_next_token() -> None:
    blocks = manager(num_blocks=3, host=2)
    sequence = admit(blocks, "a", list(range(8)))
    sequence.append(9)
    blocks.swap_out(sequence)
    admit(blocks, "b", [7])
    assert not blocks.can_swap_in(sequence)


def test_a_shared_block_survives_the_swap_of_one_holder() -> None:
    blocks = manager(host=4)
    first, second = admit(blocks, "a", [*range(4), 8]), admit(blocks, "b", [*range(4), 9])
    shared = table(blocks, first)[0]
    blocks.swap_out(first)
    first.status = Status.SWAPPED
    assert blocks.pool.holders(shared) == 1
    check_blocks(blocks, [first, second])


def test_free_gives_back_host_blocks_too() -> None:
    blocks = manager(host=4)
    sequence = admit(blocks, "a", list(range(6)))
    blocks.swap_out(sequence)
    blocks.free(sequence)
    sequence.status = Status.FINISHED
    assert blocks.host_pool.num_free == 4
    assert sequence.num_computed == 0
    check_blocks(blocks, [])


def test_a_pool_gives_out_every_block_once() -> None:
    pool = BlockPool(5)
    taken = [pool.take() for _ in range(5)]
    assert sorted(taken) == [0, 1, 2, 3, 4]
    assert pool.num_free == 0


def test_the_first_of_two_equal_blocks_stays_the_known_one() -> None:
    pool = BlockPool(2)
    first, second = pool.take(), pool.take()
    pool.publish(first, b"digest")
    pool.publish(second, b"digest")
    pool.release(second)
    assert pool.find(b"digest") == first
    check_pool(pool, [1, 0])


def broken_by_leak(blocks: BlockManager, sequence: Sequence) -> None:
    blocks.pool.take()


def broken_by_double_release(blocks: BlockManager, sequence: Sequence) -> None:
    blocks.pool.release(table(blocks, sequence)[0])


def broken_by_table(blocks: BlockManager, sequence: Sequence) -> None:
    blocks.tables[sequence.row, 0] = 7


def broken_by_row(blocks: BlockManager, sequence: Sequence) -> None:
    sequence.status = Status.WAITING


def broken_by_missing_block(blocks: BlockManager, sequence: Sequence) -> None:
    sequence.num_computed = 13


def broken_by_shared_write(blocks: BlockManager, sequence: Sequence) -> None:
    blocks.pool.share(table(blocks, sequence)[-1])


@pytest.mark.parametrize(
    "damage",
    [
        broken_by_leak,
        broken_by_double_release,
        broken_by_table,
        broken_by_row,
        broken_by_missing_block,
        broken_by_shared_write,
    ],
)
def test_the_checks_notice(damage: object) -> None:
    blocks = manager()
    sequence = admit(blocks, "a", list(range(6)))
    check_blocks(blocks, [sequence])
    damage(blocks, sequence)  # type: ignore[operator]
    with pytest.raises(RuntimeError):
        check_blocks(blocks, [sequence])
