"""Tensor parallelism: what the ranks of one model say to each other."""

from __future__ import annotations

from mindspore import Tensor, nn, ops


class TensorParallel(nn.Cell):
    """The collectives of `size` ranks; with one rank they are nothing.

    Args:
        group: of the communication group, where it is not of all processes.
    """

    def __init__(self, rank: int = 0, size: int = 1, group: str | None = None) -> None:
        super().__init__()
        self.rank = rank
        self.size = size
        if size > 1:
            named = {} if group is None else {"group": group}
            self._all_reduce = ops.AllReduce(**named)
            self._all_gather = ops.AllGather(**named)

    def sum(self, x: Tensor) -> Tensor:
        """The sum of every rank's `x`, on every rank."""
        if self.size == 1:
            return x
        return self._all_reduce(x)

    def concatenate_columns(self, x: Tensor) -> Tensor:
        """[T, n] of each rank -> [T, size * n] on every rank, in rank order."""
        if self.size == 1:
            return x
        rows, columns = x.shape
        gathered = self._all_gather(x).reshape(self.size, rows, columns)
        return gathered.transpose(1, 0, 2).reshape(rows, self.size * columns)
