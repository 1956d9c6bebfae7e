"""The mixture-of-experts feed-forward of TeleChat2-39B-A12B."""

from __future__ import annotations

from mindspore import Tensor, nn, ops

from telechat_mindie.checkpoint.sharding import Role, rank_shape
from telechat_mindie.model.layers import Parts, Weight
from telechat_mindie.model.layout import flat, laid_out


class Experts(nn.Cell):
    """Stacked expert weights, stored for the grouped matmul as [experts, in, out]."""

    def __init__(self, parts: Parts, name: str) -> None:
        super().__init__()
        config = parts.config
        experts, hidden = config.num_experts, config.hidden_size
        _, inner, _ = rank_shape((experts, config.ffn_size, hidden), Role.EXPERT_COLUMN, parts.parallel.size)
        self.w1 = Weight(parts, f"{name}.w1", (experts, hidden, inner))  # the gate
        self.w3 = Weight(parts, f"{name}.w3", (experts, hidden, inner))  # up
        self.w2 = Weight(parts, f"{name}.w2", (experts, inner, hidden))  # down
        self.w2.bias = parts.take(f"{name}.w2.bias", (1, experts, 1, hidden))


class Router(nn.Cell):
    def __init__(self, parts: Parts, name: str) -> None:
        super().__init__()
        shape = (parts.config.num_experts, parts.config.hidden_size)
        # Operators that route take it in float32, whatever the dtype of the others.
        dtype = "float32" if parts.kernels.routes_experts else None
        self.dense = Weight(parts, f"{name}.dense", shape, dtype=dtype)


class MoE(nn.Cell):
    """Softmax over all experts in float32, the top k renormalised, their outputs with bias summed by weight.

    This is mindformers' routing with norm_topk_prob (research/telechat2/infer/moe.py), Mixtral's as well. The bias of
    the down projection is inside the weighted sum: kernels that route add a share of it on every rank, else
    gates @ bias adds it once, after the ranks' sum.
    """

    def __init__(self, parts: Parts, name: str) -> None:
        super().__init__()
        self.kernels = parts.kernels
        self.parallel = parts.parallel
        self.num_experts = parts.config.num_experts
        self.chosen = parts.config.experts_per_token
        self.hidden = parts.config.hidden_size
        self.router = Router(parts, f"{name}.router")
        self.ffn = Experts(parts, f"{name}.ffn")
        self.softmax = ops.Softmax(-1)
        self.top_k = ops.TopK(sorted=True)
        self.one_hot = ops.OneHot()

    def construct(self, x: Tensor, norm_weight: Tensor) -> Tensor:
        normed = self.kernels.norm(x, norm_weight)
        gate, up, down, bias = self.ffn.w1.weight, self.ffn.w3.weight, self.ffn.w2.weight, self.ffn.w2.bias
        if self.kernels.routes_experts:
            tokens = flat(normed, self.hidden)
            mixed = self.kernels.routed_experts(tokens, self.router.dense.weight, gate, up, down, bias)
            return x + laid_out(self.parallel.sum(mixed), x, self.hidden)
        gates = self.gates(normed)
        mixed = self.parallel.sum(self.kernels.experts(normed, gates, gate, up, down))
        return x + mixed + ops.matmul(gates, ops.cast(bias, gates.dtype).reshape(self.num_experts, self.hidden))

    def gates(self, normed: Tensor) -> Tensor:
        """[T, experts]: each token's weight for every expert, zero for those not chosen."""
        probabilities = self.softmax(self.kernels.linear(normed, self.router.dense.weight))
        values, indices = self.top_k(probabilities, self.chosen)
        values = values / (values.sum(-1, keepdims=True) + 1e-9)
        one, zero = Tensor(1.0, values.dtype), Tensor(0.0, values.dtype)
        picked = self.one_hot(indices, self.num_experts, one, zero)  # [T, k, experts]
        return (picked * values.expand_dims(-1)).sum(1)
