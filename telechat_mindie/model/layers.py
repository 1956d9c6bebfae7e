"""What attention, feed-forward and the head are made of: weights, linear layers and the embedding of one rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mindspore import Parameter, Tensor, nn, ops

from telechat_mindie.checkpoint.sharding import Role, rank_shape
from telechat_mindie.config import TelechatConfig
from telechat_mindie.model.kernels.interface import KernelSet
from telechat_mindie.model.layout import flat, laid_out
from telechat_mindie.model.parallel import TensorParallel

Take = Callable[..., Parameter]
"""(name, shape) -> the parameter: from a model directory, or empty ones for an export. A keyword `dtype` comes along
where it is not the dtype of the other weights."""


@dataclass(frozen=True)
class Parts:
    """What every cell of a rank's decoder is built from."""

    config: TelechatConfig
    take: Take
    kernels: KernelSet
    parallel: TensorParallel


class Weight(nn.Cell):
    """The weight of one linear layer or norm: this rank's part of `shape`, cut as `role` says."""

    def __init__(
        self,
        parts: Parts,
        name: str,
        shape: tuple[int, ...],
        role: Role = Role.REPLICATED,
        dtype: str | None = None,
    ) -> None:
        super().__init__()
        other = {} if dtype is None else {"dtype": dtype}
        self.shape = rank_shape(shape, role, parts.parallel.size)
        self.weight = parts.take(f"{name}.weight", self.shape, **other)


class RowLinear(Weight):
    """residual + bias + the sum over ranks of x @ weight^T; the bias is added once, after the sum."""

    def __init__(self, parts: Parts, name: str, shape: tuple[int, int]) -> None:
        super().__init__(parts, name, shape, Role.ROW)
        self.bias = parts.take(f"{name}.bias", shape[:1])
        self.kernels = parts.kernels
        self.parallel = parts.parallel

    def construct(self, x: Tensor, residual: Tensor) -> Tensor:
        if self.parallel.size == 1:
            return self.kernels.linear_add(x, self.weight, self.bias, residual)
        # The sum follows its MatMul at once, for MindSpore to fuse them.
        width, inner = self.shape
        total = self.parallel.sum(self.kernels.linear(flat(x, inner), self.weight)) + self.bias
        return laid_out(total, residual, width) + residual


class Embedding(nn.Cell):
    """Rows of the vocabulary; each rank holds a range of them and the ranks' sum is the lookup."""

    def __init__(self, parts: Parts, name: str) -> None:
        super().__init__()
        self.kernels = parts.kernels
        self.parallel = parts.parallel
        shape = (parts.config.vocab_size, parts.config.hidden_size)
        self.rows, width = rank_shape(shape, Role.COLUMN, parts.parallel.size)
        self.first = parts.parallel.rank * self.rows
        self.embedding_weight = parts.take(f"{name}.embedding_weight", (self.rows, width))

    def construct(self, token_ids: Tensor) -> Tensor:
        if self.parallel.size == 1:
            return self.kernels.embed(token_ids, self.embedding_weight)
        local = token_ids - self.first
        inside = ops.logical_and(local >= 0, local < self.rows)
        embedded = self.kernels.embed(ops.select(inside, local, ops.zeros_like(local)), self.embedding_weight)
        return self.parallel.sum(embedded * ops.cast(inside, embedded.dtype).expand_dims(-1))
