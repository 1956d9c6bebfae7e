"""TeleChat2: pre-norm decoder layers with packed q/k/v and gate/up, as each rank of a tensor parallel group runs them.

Attribute names make the parameter names, and those are mindformers' (`model.layers.0.attention.w_qkv.weight`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mindspore import Parameter, Tensor, nn, ops

from telechat_mindie.checkpoint.sharding import Role, rank_shape
from telechat_mindie.config import TelechatConfig
from telechat_mindie.model.kv_cache import KVCache
from telechat_mindie.model.parallel import TensorParallel

Take = Callable[[str, tuple[int, ...]], Parameter]
"""Gives the parameter of a name and shape: from a model directory, or empty ones for an export."""


class Weight(nn.Cell):
    """The parameters of one linear layer or norm."""

    def __init__(self, take: Take, name: str, shape: tuple[int, ...], bias: int = 0) -> None:
        super().__init__()
        self.weight = take(f"{name}.weight", shape)
        if bias:
            self.bias = take(f"{name}.bias", (bias,))


class Attention(nn.Cell):
    def __init__(
        self, config: TelechatConfig, take: Take, name: str, kernels: nn.Cell, parallel: TensorParallel
    ) -> None:
        super().__init__()
        self.kernels = kernels
        self.parallel = parallel
        hidden, packed = config.hidden_size, config.hidden_size + 2 * config.kv_size
        self.w_qkv = Weight(take, f"{name}.w_qkv", rank_shape((packed, hidden), Role.COLUMN, parallel.size))
        self.wo = Weight(take, f"{name}.wo", rank_shape((hidden, hidden), Role.ROW, parallel.size), bias=hidden)

    def construct(
        self, x: Tensor, norm_weight: Tensor, key_cache: Tensor, value_cache: Tensor, inputs: tuple[Tensor, ...]
    ) -> Tensor:
        qkv = self.kernels.norm_linear(x, norm_weight, self.w_qkv.weight)
        attended = self.kernels.attention(qkv, key_cache, value_cache, inputs)
        return row_linear(self.kernels, self.parallel, attended, self.wo.weight, self.wo.bias, x)


class FeedForward(nn.Cell):
    def __init__(
        self, config: TelechatConfig, take: Take, name: str, kernels: nn.Cell, parallel: TensorParallel
    ) -> None:
        super().__init__()
        self.kernels = kernels
        self.parallel = parallel
        hidden, ffn = config.hidden_size, config.ffn_size
        gate_up = rank_shape((2 * ffn, hidden), Role.COLUMN, parallel.size)
        self.w_gate_hidden = Weight(take, f"{name}.w_gate_hidden", gate_up)
        self.w2 = Weight(take, f"{name}.w2", rank_shape((hidden, ffn), Role.ROW, parallel.size), bias=hidden)

    def construct(self, x: Tensor, norm_weight: Tensor) -> Tensor:
        gated = self.kernels.norm_swiglu(x, norm_weight, self.w_gate_hidden.weight)
        return row_linear(self.kernels, self.parallel, gated, self.w2.weight, self.w2.bias, x)


def row_linear(
    kernels: nn.Cell, parallel: TensorParallel, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor
) -> Tensor:
    """residual + bias + the sum over ranks of x @ weight^T; the bias is added once, after the sum."""
    if parallel.size == 1:
        return kernels.linear_add(x, weight, bias, residual)
    return parallel.sum(kernels.linear(x, weight)) + bias + residual


class Layer(nn.Cell):
    def __init__(
        self, config: TelechatConfig, take: Take, name: str, kernels: nn.Cell, parallel: TensorParallel
    ) -> None:
        super().__init__()
        self.attention_norm = Weight(take, f"{name}.attention_norm", (config.hidden_size,))
        self.attention = Attention(config, take, f"{name}.attention", kernels, parallel)
        self.ffn_norm = Weight(take, f"{name}.ffn_norm", (config.hidden_size,))
        if config.is_moe:
            from telechat_mindie.model.moe import KernelRoutedMoE, MoE

            kind = KernelRoutedMoE if kernels.routes_experts else MoE
            self.feed_forward = kind(config, take, f"{name}.feed_forward", kernels, parallel)
        else:
            self.feed_forward = FeedForward(config, take, f"{name}.feed_forward", kernels, parallel)

    def construct(self, x: Tensor, key_cache: Tensor, value_cache: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        x = self.attention(x, self.attention_norm.weight, key_cache, value_cache, inputs)
        return self.feed_forward(x, self.ffn_norm.weight)


class Embedding(nn.Cell):
    """Rows of the vocabulary; each rank holds a range of them and the ranks' sum is the lookup."""

    def __init__(
        self, config: TelechatConfig, take: Take, name: str, kernels: nn.Cell, parallel: TensorParallel
    ) -> None:
        super().__init__()
        self.kernels = kernels
        self.parallel = parallel
        shape = rank_shape((config.vocab_size, config.hidden_size), Role.COLUMN, parallel.size)
        self.embedding_weight = take(f"{name}.embedding_weight", shape)
        self.rows = shape[0]
        self.first = parallel.rank * shape[0]

    def construct(self, token_ids: Tensor) -> Tensor:
        if self.parallel.size == 1:
            return self.kernels.embed(token_ids, self.embedding_weight)
        local = token_ids - self.first
        inside = ops.logical_and(local >= 0, local < self.rows)
        found = self.kernels.embed(ops.select(inside, local, ops.zeros_like(local)), self.embedding_weight)
        return self.parallel.sum(found * ops.cast(inside, found.dtype).expand_dims(-1))


class Backbone(nn.Cell):
    def __init__(
        self, config: TelechatConfig, take: Take, name: str, kernels: nn.Cell, parallel: TensorParallel
    ) -> None:
        super().__init__()
        self.kernels = kernels
        self.embed_layernorm = config.embed_layernorm
        self.tok_embeddings = Embedding(config, take, f"{name}.tok_embeddings", kernels, parallel)
        if config.embed_layernorm:
            self.embedding_norm = Weight(take, f"{name}.embedding_norm", (config.hidden_size,))
        self.layers = nn.CellList(
            [Layer(config, take, f"{name}.layers.{index}", kernels, parallel) for index in range(config.num_layers)]
        )
        self.norm_out = Weight(take, f"{name}.norm_out", (config.hidden_size,))

    def construct(
        self, token_ids: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], inputs: tuple[Tensor, ...]
    ) -> Tensor:
        x = self.tok_embeddings(token_ids)
        if self.embed_layernorm:
            x = self.kernels.norm(x, self.embedding_norm.weight)
        for index, layer in enumerate(self.layers):
            x = layer(x, keys[index], values[index], inputs)
        return x


class TelechatForCausalLM(nn.Cell):
    """Token ids to logits over a paged cache.

    Args:
        config: the model's shape; every rank gets the same.
        take: gives each parameter, by mindformers name and this rank's shape.
        kernels: how the layers compute, see `telechat_mindie.model.kernels`.
        parallel: this rank's place among the ranks.
        cache: this rank's key/value cache, written in place.
    """

    def __init__(
        self, config: TelechatConfig, take: Take, kernels: nn.Cell, parallel: TensorParallel, cache: KVCache
    ) -> None:
        super().__init__()
        self.config = config
        self.kernels = kernels
        self.parallel = parallel
        self.cache = cache
        self.model = Backbone(config, take, "model", kernels, parallel)
        shape = rank_shape((config.vocab_size, config.hidden_size), Role.COLUMN, parallel.size)
        self.lm_head = Weight(take, "lm_head", shape)
        self.gather = ops.Gather()

    def construct(
        self,
        token_ids: Tensor,
        logits_rows: Tensor,
        inputs: tuple[Tensor, ...],
        caches: tuple[list[Tensor], list[Tensor]] | None = None,
    ) -> Tensor:
        """Logits [R, vocabulary] of the tokens `logits_rows` [R] among `token_ids` [T], the same on every rank.

        `inputs` is the kernels' own and comes from their `calls`. `caches` are every layer's keys and values in place
        of the model's own cache, in the same layout.
        """
        if caches is None:
            x = self.model(token_ids, self.cache.keys, self.cache.values, inputs)
        else:
            x = self.model(token_ids, caches[0], caches[1], inputs)
        x = self.gather(x, logits_rows, 0)
        logits = self.kernels.norm_linear(x, self.model.norm_out.weight, self.lm_head.weight)
        return self.parallel.concatenate_columns(logits)

    @property
    def compile_phase(self) -> str | None:
        """Which compiled graph MindSpore is about to run."""
        phase: str | None = self._compile_phase
        return phase

    @compile_phase.setter
    def compile_phase(self, phase: str) -> None:
        # MindSpore sets it at every call, in this cell and all below: 1 ms a step for 12 layers. Only a change matters.
        if phase != self.compile_phase:
            nn.Cell.compile_phase.fset(self, phase)

    def kvcache(self, layer: int) -> tuple[Parameter, Parameter]:
        """Keys and values of a layer, which MindIE asks for where prefill and decode run on different machines."""
        return self.cache.keys[layer], self.cache.values[layer]
