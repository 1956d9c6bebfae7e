"""TeleChat2: pre-norm decoder layers with packed q/k/v and gate/up, as each rank of a tensor parallel group runs them.

Attribute names make the parameter names, and those are mindformers' (`model.layers.0.attention.w_qkv.weight`).
"""

from __future__ import annotations

from collections.abc import Sequence

from mindspore import Parameter, Tensor, nn, ops

from telechat_mindie.checkpoint.sharding import Role
from telechat_mindie.config import TelechatConfig
from telechat_mindie.model.kernels.interface import KernelSet
from telechat_mindie.model.kv_cache import KVCache
from telechat_mindie.model.layers import Embedding, Parts, RowLinear, Take, Weight
from telechat_mindie.model.layout import flat
from telechat_mindie.model.moe import MoE
from telechat_mindie.model.parallel import TensorParallel


class Attention(nn.Cell):
    def __init__(self, parts: Parts, name: str) -> None:
        super().__init__()
        hidden, packed = parts.config.hidden_size, parts.config.hidden_size + 2 * parts.config.kv_size
        self.kernels = parts.kernels
        self.w_qkv = Weight(parts, f"{name}.w_qkv", (packed, hidden), Role.COLUMN)
        self.wo = RowLinear(parts, f"{name}.wo", (hidden, hidden))

    def construct(
        self, x: Tensor, norm_weight: Tensor, key_cache: Tensor, value_cache: Tensor, inputs: tuple[Tensor, ...]
    ) -> Tensor:
        qkv = self.kernels.norm_linear(x, norm_weight, self.w_qkv.weight)
        return self.wo(self.kernels.attention(qkv, key_cache, value_cache, inputs), x)


class FeedForward(nn.Cell):
    def __init__(self, parts: Parts, name: str) -> None:
        super().__init__()
        hidden, ffn = parts.config.hidden_size, parts.config.ffn_size
        self.kernels = parts.kernels
        self.w_gate_hidden = Weight(parts, f"{name}.w_gate_hidden", (2 * ffn, hidden), Role.COLUMN)
        self.w2 = RowLinear(parts, f"{name}.w2", (hidden, ffn))

    def construct(self, x: Tensor, norm_weight: Tensor) -> Tensor:
        return self.w2(self.kernels.norm_swiglu(x, norm_weight, self.w_gate_hidden.weight), x)


class Layer(nn.Cell):
    def __init__(self, parts: Parts, name: str) -> None:
        super().__init__()
        hidden = parts.config.hidden_size
        self.attention_norm = Weight(parts, f"{name}.attention_norm", (hidden,))
        self.attention = Attention(parts, f"{name}.attention")
        self.ffn_norm = Weight(parts, f"{name}.ffn_norm", (hidden,))
        feed_forward = MoE if parts.config.is_moe else FeedForward
        self.feed_forward = feed_forward(parts, f"{name}.feed_forward")

    def construct(self, x: Tensor, key_cache: Tensor, value_cache: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        x = self.attention(x, self.attention_norm.weight, key_cache, value_cache, inputs)
        return self.feed_forward(x, self.ffn_norm.weight)


class Backbone(nn.Cell):
    def __init__(self, parts: Parts, name: str) -> None:
        super().__init__()
        config = parts.config
        self.kernels = parts.kernels
        self.embed_layernorm = config.embed_layernorm
        self.tok_embeddings = Embedding(parts, f"{name}.tok_embeddings")
        if config.embed_layernorm:
            self.embedding_norm = Weight(parts, f"{name}.embedding_norm", (config.hidden_size,))
        self.layers = nn.CellList([Layer(parts, f"{name}.layers.{index}") for index in range(config.num_layers)])
        self.norm_out = Weight(parts, f"{name}.norm_out", (config.hidden_size,))

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
        kernels: how the layers compute, see `telechat_mindie.model.kernels.interface`.
        parallel: this rank's place among the ranks.
        cache: this rank's key/value cache, written in place.
    """

    def __init__(
        self, config: TelechatConfig, take: Take, kernels: KernelSet, parallel: TensorParallel, cache: KVCache
    ) -> None:
        super().__init__()
        self.config = config
        self.kernels = kernels
        self.parallel = parallel
        self.cache = cache
        parts = Parts(config, take, kernels, parallel)
        self.model = Backbone(parts, "model")
        self.lm_head = Weight(parts, "lm_head", (config.vocab_size, config.hidden_size), Role.COLUMN)
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
        x = self.gather(flat(x, self.config.hidden_size), logits_rows, 0)
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
