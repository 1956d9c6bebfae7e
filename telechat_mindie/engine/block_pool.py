"""Cache blocks as numbers: who holds them, and which of them the prefix cache can find again."""

from __future__ import annotations

from collections import OrderedDict, deque


class BlockPool:
    """Hands out the numbers 0 to `num_blocks` - 1 and counts their holders.

    A block is in one of three states: held (by one or more sequences), cached (held by nobody, but its content can be
    found by digest and is kept until the room is needed), or blank.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._holders = [0] * num_blocks
        self._blank = deque(range(num_blocks))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently held first
        self._by_digest: dict[bytes, int] = {}
        self._digests: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Blocks that `take` can hand out."""
        return len(self._blank) + len(self._cached)

    def holders(self, block: int) -> int:
        return self._holders[block]

    def take(self) -> int:
        """A block for new content: a blank one, else the cached one that was held longest ago.

        The caller has looked at `num_free`.
        """
        if self._blank:
            block = self._blank.popleft()
        else:
            block, _ = self._cached.popitem(last=False)
            del self._by_digest[self._digests.pop(block)]
        self._holders[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more holder of a held or cached block."""
        if self._holders[block] == 0:
            del self._cached[block]
        self._holders[block] += 1

    def release(self, block: int) -> None:
        """One holder less; without any, a block with a digest is cached and another one blank."""
        self._holders[block] -= 1
        if self._holders[block] == 0:
            if block in self._digests:
                self._cached[block] = None
            else:
                self._blank.append(block)

    def publish(self, block: int, digest: bytes) -> None:
        """Let `find` return this held block, unless another one with the same content is known already."""
        if digest not in self._by_digest:
            self._by_digest[digest] = block
            self._digests[block] = digest

    def find(self, digest: bytes) -> int | None:
        return self._by_digest.get(digest)

    def check_invariants(self, expected_holders: list[int]) -> None:
        """Compare with the holders counted from outside, [num_blocks].

        Raises:
            RuntimeError: a block was lost, held twice over, or is in two states at once.
        """
        free = [*self._blank, *self._cached]
        held = [block for block, count in enumerate(self._holders) if count > 0]
        broken = (
            (self._holders != expected_holders, "holder counts"),
            (sorted(free + held) != list(range(self.num_blocks)), "partition into blank, cached and held"),
            (any(block in self._digests for block in self._blank), "blank block with a digest"),
            (any(block not in self._digests for block in self._cached), "cached block without a digest"),
            (any(self._holders[block] > 1 and block not in self._digests for block in held), "shared unknown block"),
            (self._by_digest != {digest: block for block, digest in self._digests.items()}, "digest index"),
        )
        for is_broken, what in broken:
            if is_broken:
                raise RuntimeError(f"block pool is inconsistent: {what}")
