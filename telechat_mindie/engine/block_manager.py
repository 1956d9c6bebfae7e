"""Which cache blocks each running sequence has: allocation, prefix sharing, eviction and swapping."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from telechat_mindie.engine.sequence import Sequence


class BlockPool:
    """Hands out the numbers 0 to `num_blocks` - 1 and counts their holders.

    A block is held by one or more sequences, or free. A free one is blank, or cached: its content can be looked up by
    digest, and stays until the room is needed.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._holders = [0] * num_blocks
        self._free = OrderedDict.fromkeys(range(num_blocks))  # blank ones, then cached ones, least recently held first
        self._by_digest: dict[bytes, int] = {}
        self._digests: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Blocks that `take` can hand out."""
        return len(self._free)

    def holders(self, block: int) -> int:
        return self._holders[block]

    def take(self) -> int:
        """A block for new content; the caller has looked at `num_free`."""
        block, _ = self._free.popitem(last=False)
        if block in self._digests:
            del self._by_digest[self._digests.pop(block)]
        self._holders[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more holder of a held or cached block."""
        self._free.pop(block, None)
        self._holders[block] += 1

    def release(self, block: int) -> None:
        """One holder less; without any, a block with a digest is cached and another one blank."""
        self._holders[block] -= 1
        if self._holders[block] == 0:
            self._free[block] = None
            self._free.move_to_end(block, last=block in self._digests)

    def publish(self, block: int, digest: bytes) -> None:
        """Let `find` return this held block, unless another one with the same content is known already."""
        if digest not in self._by_digest:
            self._by_digest[digest] = block
            self._digests[block] = digest

    def find(self, digest: bytes) -> int | None:
        return self._by_digest.get(digest)


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
        """Whether all its tokens fit beside the `prefix` that `match` gave, with `reserve` blocks left over."""
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
        for index in range(sequence.num_published, sequence.num_computed // self.block_size):
            self.pool.publish(blocks[index], sequence.digest(index, self.block_size))
            sequence.num_published = index + 1

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
