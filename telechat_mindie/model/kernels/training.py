"""The kernels that a decoder is trained over: operators that have gradients, whole rows, no cache.

The operators are those that every device of MindSpore has; on Ascend this is unproven.
"""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn, ops

from telechat_mindie.config import TelechatConfig
from telechat_mindie.model.kernels.gradients import CausalAttention, RmsNorm, Rounding, Swiglu
from telechat_mindie.model.kernels.training_shapes import capacity, stretches

BLOCKED = -1e30
"""Added to a score that a token may not see; finite, so that a row of nothing else stays finite too."""


class TrainingKernels(nn.Cell):
    """The graph's half of `interface.Kernels`; `calls` and caches belong to inference.

    A weight is a parameter [out, in], or for LoRA a tuple of it, frozen, and factors A [r, in] and B [rows, r] of each
    part of its rows in turn.

    Args:
        config: the model's shape.
        tp: tensor parallel size.
        dtype: of matrix products, "float32" or "bfloat16"; activations between them are float32.
        emulated: on a CPU, which has no products in bfloat16: their operands and results are rounded to it.
        lora_scale: of B A.
        capacity_factor: of a MoE's experts, see `routed_experts`.
    """

    routes_experts = True

    def __init__(
        self,
        config: TelechatConfig,
        tp: int,
        dtype: str = "float32",
        *,
        emulated: bool = True,
        lora_scale: float = 1.0,
        capacity_factor: float = 1.2,
    ) -> None:
        super().__init__(auto_prefix=False)
        self.tp = tp
        self.num_experts = config.num_experts
        self.chosen = config.experts_per_token
        self.capacity_factor = capacity_factor
        self.lora_scale = lora_scale
        self.rounding = Rounding(dtype, emulated)
        self.rms_norm = RmsNorm(config.norm_eps)
        self.swiglu = Swiglu()
        heads, kv_heads = config.num_heads // tp, config.num_kv_heads // tp
        self.causal_attention = CausalAttention(heads, kv_heads, config.head_dim, self.rounding)
        self.matmul = ops.MatMul(transpose_b=True)
        self.batch_matmul = ops.BatchMatMul()
        self.softmax = ops.Softmax(-1)
        self.gather = ops.Gather()
        self.concat = ops.Concat(-1)
        self.cast = ops.Cast()

    def embed(self, token_ids: Tensor, weight: Tensor) -> Tensor:
        return self.gather(weight, token_ids, 0)

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.rms_norm(x, weight)

    def linear(self, x: Tensor, weight: Tensor | tuple[Tensor, ...]) -> Tensor:
        x = self.rounding.enter(x)
        if not isinstance(weight, tuple):
            return self.product(x, weight)
        parts: tuple[Tensor, ...] = ()
        for a, b in zip(weight[1::2], weight[2::2]):  # noqa: B905 - MindSpore's graphs know no strict
            parts = (*parts, self.product(self.rounding.enter(self.product(x, a)), b))
        return self.product(x, weight[0]) + self.lora_scale * (self.concat(parts) if len(parts) > 1 else parts[0])

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.rounding.leave(self.matmul(x, self.rounding.enter(weight)))

    def linear_add(self, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return self.linear(x, weight) + bias + residual

    def norm_linear(self, x: Tensor, norm_weight: Tensor, weight: Tensor) -> Tensor:
        return self.linear(self.norm(x, norm_weight), weight)

    def norm_swiglu(self, x: Tensor, norm_weight: Tensor, weight: Tensor) -> Tensor:
        return self.swiglu(self.norm_linear(x, norm_weight, weight))

    def attention(self, qkv: Tensor, key_cache: Tensor, value_cache: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        """`inputs`: cos and sin [T, 1, head_dim / 2], and the masks that `masks` gives."""
        return self.causal_attention(qkv, inputs[0], inputs[1], inputs[2])[0]

    def masks(self, query_documents: Tensor, key_documents: Tensor) -> tuple[Tensor, ...]:
        """What is added to scores, a stretch of queries at a time [rows, 1, 1, queries, keys up to its last].

        A token sees those of its document up to itself. [rows, L] int32 both.
        """
        rows, length = query_documents.shape
        found: tuple[Tensor, ...] = ()
        for begin, end in _stretches(length):
            same = query_documents[:, begin:end].reshape(rows, -1, 1) == key_documents[:, :end].reshape(rows, 1, end)
            causal = ops.arange(begin, end).reshape(-1, 1) >= ops.arange(0, end).reshape(1, end)
            hidden = 1.0 - self.cast(ops.logical_and(same, causal), ms.float32)
            found = (*found, (hidden * BLOCKED).reshape(rows, 1, 1, end - begin, end))
        return found

    def probabilities(self, tokens: Tensor, router: Tensor) -> Tensor:
        """[T, experts]: what the router gives each expert; float32 whatever the products' dtype."""
        return self.softmax(self.matmul(tokens, router))

    def balance(self, probabilities: Tensor) -> Tensor:
        """The auxiliary loss of a layer: 1 where experts are used alike, more where some are preferred.

        experts * sum of (share of choices, without gradient) * (mean probability), as mindformers' TopkRouterV2 has it.
        """
        _, indices = ops.topk(probabilities, self.chosen)
        chosen = ops.one_hot(indices.reshape(-1), self.num_experts)
        share = ops.stop_gradient(self.cast(chosen, ms.float32).mean(0))
        return (share * probabilities.mean(0)).sum() * self.num_experts

    def routed_experts(self, x: Tensor, router: Tensor, gate: Tensor, up: Tensor, down: Tensor, bias: Tensor) -> Tensor:
        """The chosen experts' sum by weight, with this rank's share of down's bias: [T, h].

        An expert takes at most `capacity` choices: all tokens' first ones, then their second ones, each in the order of
        the tokens; a choice beyond adds nothing, and the other weights stay (mindformers' TopkRouterV2 without sdrop).
        """
        tokens, width = x.shape
        capacity = _capacity(tokens, self.chosen, self.num_experts, self.capacity_factor)
        values, indices = ops.topk(self.probabilities(x, router), self.chosen)
        values = values / (values.sum(-1, keepdims=True) + 1e-9)
        choices = indices.transpose(1, 0).reshape(-1)  # [k * T]
        marks = self.cast(ops.one_hot(choices, self.num_experts), ms.float32)
        place = self.cast((ops.cumsum(marks, 0) * marks).sum(-1), ms.int32) - 1
        kept = place < capacity
        slots = ops.select(kept, choices * capacity + place, ops.full_like(choices, self.num_experts * capacity))
        slots = ops.stop_gradient(slots)
        token_of_choice = ops.arange(tokens).tile((self.chosen,))
        token_of_slot = ops.tensor_scatter_elements(
            ops.full((self.num_experts * capacity + 1,), tokens, dtype=ms.int64),
            slots,
            self.cast(token_of_choice, ms.int64),
        )
        nothing = ops.zeros((1, width), ms.float32)
        sent = self.gather(ops.concat((x, nothing)), ops.stop_gradient(token_of_slot)[:-1], 0)
        sent = self.rounding.enter(sent.reshape(self.num_experts, capacity, width))
        gated = self.rounding.leave(self.batch_matmul(sent, self.rounding.enter(gate)))
        hidden = ops.silu(gated) * self.rounding.leave(self.batch_matmul(sent, self.rounding.enter(up)))
        out = self.rounding.leave(self.batch_matmul(self.rounding.enter(hidden), self.rounding.enter(down)))
        out = out + bias.reshape(self.num_experts, 1, width) / self.tp
        out = ops.concat((out.reshape(-1, width), nothing))
        back = self.gather(out, slots, 0).reshape(self.chosen, tokens, width)
        return (back * values.transpose(1, 0).expand_dims(-1)).sum(0)


_stretches = ops.constexpr(stretches)
_capacity = ops.constexpr(capacity)
