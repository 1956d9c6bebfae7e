"""Which cache blocks each running sequence has: allocation, prefix sharing and swapping."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from telechat_mindie.engine.block_pool import BlockPool
from telechat_mindie.engine.sequence import Sequence, Status


class BlockManager:
    """Device blocks of running sequences and host blocks of swapped ones.

    Args:
        num_blocks: device blocks that may be handed out.
        block_size: tokens of a block.
        max_sequences: running sequences; the rows of `tables`.
        max_seq_len: tokens of the longest sequence.
        num_host_blocks: blocks in host memory to swap to.
        prefix_cache: find the blocks of a prompt's beginning among those computed before.

    Attributes:
        tables: int32 [max_sequences, blocks of the longest sequence], -1 where unused; row `sequence.row`.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        max_sequences: int,
        max_seq_len: int,
        num_host_blocks: int = 0,
        prefix_cache: bool = False,
    ) -> None:
        self.block_size = block_size
        self.pool = BlockPool(num_blocks)
        self.host_pool = BlockPool(num_host_blocks)
        self.prefix_cache = prefix_cache
        self.tables = np.full((max_sequences, self.blocks_for(max_seq_len)), -1, np.int32)
        self._blocks: list[list[int]] = [[] for _ in range(max_sequences)]  # row -> what the table's row holds
        self._rows = list(range(max_sequences))[::-1]  # free ones
        self._host_blocks: dict[str, list[int]] = {}  # sequence id -> blocks, while swapped

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def match(self, sequence: Sequence) -> list[int]:
        """The cached blocks of the longest known prefix; at least one token is left to compute, for its logits."""
        blocks: list[int] = []
        if self.prefix_cache:
            for index in range((sequence.num_tokens - 1) // self.block_size):
                block = self.pool.find(sequence.digest(index, self.block_size))
                if block is None:
                    break
                blocks.append(block)
        return blocks

    def can_allocate(self, sequence: Sequence, prefix: list[int], reserve: int = 0) -> bool:
        """Whether all its tokens fit beside the `prefix` that `match` found, with `reserve` blocks left over."""
        needed = self.blocks_for(sequence.num_tokens) - len(prefix)
        taken_from_free = sum(self.pool.holders(block) == 0 for block in prefix)
        return self.pool.num_free - taken_from_free >= needed + reserve

    def allocate(self, sequence: Sequence, prefix: list[int]) -> None:
        """Give a waiting sequence blocks for all its tokens; those of `prefix` count as computed."""
        for block in prefix:
            self.pool.share(block)
        self._open_row(sequence, prefix)
        self._extend(sequence, sequence.num_tokens)
        sequence.num_published = len(prefix)
        sequence.num_cached = sequence.num_computed = len(prefix) * self.block_size

    def can_append(self, sequence: Sequence) -> bool:
        """Whether a running sequence's last token has a place, or can get one."""
        return sequence.num_tokens <= len(self._blocks[sequence.row]) * self.block_size or self.pool.num_free > 0

    def append(self, sequence: Sequence) -> None:
        """Make room for a running sequence's last token."""
        self._extend(sequence, sequence.num_tokens)

    def publish(self, sequence: Sequence) -> None:
        """Let the prefix cache know the blocks that are full by now; only after the forward that filled them."""
        if not self.prefix_cache:
            return
        blocks = self._blocks[sequence.row]
        while (sequence.num_published + 1) * self.block_size <= sequence.num_computed:
            index = sequence.num_published
            self.pool.publish(blocks[index], sequence.digest(index, self.block_size))
            sequence.num_published += 1

    def free(self, sequence: Sequence) -> None:
        """Take back all blocks of a sequence, wherever they are; it has nothing computed any more."""
        if sequence.row >= 0:
            self._close_row(sequence)
        for block in self._host_blocks.pop(sequence.id, ()):
            self.host_pool.release(block)
        sequence.num_computed = sequence.num_published = 0

    def can_swap_out(self, sequence: Sequence) -> bool:
        return self.host_pool.num_free >= self.blocks_for(sequence.num_computed)

    def swap_out(self, sequence: Sequence) -> list[tuple[int, int]]:
        """Move a running sequence to host blocks; (device block, host block) pairs to copy before the next forward."""
        held = self._blocks[sequence.row][: self.blocks_for(sequence.num_computed)]
        copies = [(block, self.host_pool.take()) for block in held]
        self._close_row(sequence)
        self._host_blocks[sequence.id] = [host for _, host in copies]
        sequence.num_published = 0
        return copies

    def can_swap_in(self, sequence: Sequence, reserve: int = 0) -> bool:
        """Whether a swapped sequence and its next token fit, with `reserve` blocks left over."""
        return self.pool.num_free >= self.blocks_for(sequence.num_tokens) + reserve

    def swap_in(self, sequence: Sequence) -> list[tuple[int, int]]:
        """Move a swapped sequence back; (host block, device block) pairs to copy before the next forward."""
        host_blocks = self._host_blocks.pop(sequence.id)
        self._open_row(sequence, [])
        self._extend(sequence, sequence.num_computed)
        for block in host_blocks:
            self.host_pool.release(block)
        return list(zip(host_blocks, self._blocks[sequence.row], strict=True))

    def _open_row(self, sequence: Sequence, blocks: list[int]) -> None:
        row = sequence.row = self._rows.pop()
        self._blocks[row] = list(blocks)
        self.tables[row, : len(blocks)] = blocks

    def _extend(self, sequence: Sequence, num_tokens: int) -> None:
        blocks = self._blocks[sequence.row]
        while len(blocks) * self.block_size < num_tokens:
            block = self.pool.take()
            self.tables[sequence.row, len(blocks)] = block
            blocks.append(block)

    def _close_row(self, sequence: Sequence) -> None:
        row = sequence.row
        # Back to front: of a prefix, the end is of use only with its beginning, so it is evicted first.
        for block in reversed(self._blocks[row]):
            self.pool.release(block)
        self._blocks[row] = []
        self.tables[row] = -1
        self._rows.append(row)
        sequence.row = -1

    def check_invariants(self, sequences: Iterable[Sequence]) -> None:
        """Check that every block is accounted for by these, all unfinished, sequences.

        Raises:
            RuntimeError: a block or row was lost or is held by the wrong sequence, or a table disagrees.
        """
        holders = [0] * self.pool.num_blocks
        host_holders = [0] * self.host_pool.num_blocks
        rows = list(self._rows)
        swapped = set()
        for sequence in sequences:
            if sequence.status is Status.RUNNING:
                rows.append(sequence.row)
                self._check_row(sequence)
                for block in self._blocks[sequence.row]:
                    holders[block] += 1
            elif sequence.row != -1:
                raise RuntimeError(f"sequence {sequence.id} is {sequence.status.value} and has a row")
            if sequence.status is Status.SWAPPED:
                swapped.add(sequence.id)
                if len(self._host_blocks[sequence.id]) != self.blocks_for(sequence.num_computed):
                    raise RuntimeError(f"sequence {sequence.id} was not swapped out whole")
                for block in self._host_blocks[sequence.id]:
                    host_holders[block] += 1
        if sorted(rows) != list(range(len(self.tables))) or swapped != set(self._host_blocks):
            raise RuntimeError("a row or a host table is lost")
        self.pool.check_invariants(holders)
        self.host_pool.check_invariants(host_holders)

    def _check_row(self, sequence: Sequence) -> None:
        blocks = self._blocks[sequence.row]
        table = self.tables[sequence.row]
        least = self.blocks_for(max(sequence.num_computed, sequence.prompt_len))
        if table[: len(blocks)].tolist() != blocks or (table[len(blocks) :] != -1).any():
            raise RuntimeError(f"table of sequence {sequence.id} disagrees with its blocks")
        if len(set(blocks)) != len(blocks) or not least <= len(blocks) <= self.blocks_for(sequence.num_tokens):
            raise RuntimeError(f"sequence {sequence.id} has the wrong number of blocks")
        writable = blocks[sequence.num_computed // self.block_size :]
        if any(self.pool.holders(block) != 1 for block in writable):
            raise RuntimeError(f"sequence {sequence.id} shares a block that it will write")
