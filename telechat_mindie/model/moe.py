"""The mixture-of-experts feed-forward of TeleChat2-39B-A12B."""

from __future__ import annotations

from mindspore import Tensor, nn, ops

from telechat_mindie.checkpoint.sharding import Role, rank_shape
from telechat_mindie.config import TelechatConfig
from telechat_mindie.model.decoder import Take, Weight
from telechat_mindie.model.parallel import TensorParallel


class Experts(nn.Cell):
    """Stacked expert weights, stored for the grouped matmul as [experts, in, out]."""

    def __init__(self, config: TelechatConfig, take: Take, name: str, tp: int) -> None:
        super().__init__()
        experts, hidden, ffn = config.num_experts, config.hidden_size, config.ffn_size
        _, inner, _ = rank_shape((experts, ffn, hidden), Role.EXPERT_COLUMN, tp)
        self.w1 = Weight(take, f"{name}.w1", (experts, hidden, inner))
        self.w3 = Weight(take, f"{name}.w3", (experts, hidden, inner))
        self.w2 = Weight(take, f"{name}.w2", (experts, inner, hidden))
        self.w2.bias = take(f"{name}.w2.bias", (1, experts, 1, hidden))


class Router(nn.Cell):
    def __init__(self, config: TelechatConfig, take: Take, name: str) -> None:
        super().__init__()
        self.dense = Weight(take, f"{name}.dense", (config.num_experts, config.hidden_size))


class MoE(nn.Cell):
    """Softmax over all experts in float32, the top k renormalised, their outputs with bias summed by weight.

    This is mindformers' routing with norm_topk_prob (research/telechat2/infer/moe.py), Mixtral's as well. The bias of
    the down projection is inside the weighted sum; gates @ bias adds it once, after the ranks' sum.
    """

    def __init__(
        self, config: TelechatConfig, take: Take, name: str, kernels: nn.Cell, parallel: TensorParallel
    ) -> None:
        super().__init__()
        self.kernels = kernels
        self.parallel = parallel
        self.num_experts = config.num_experts
        self.chosen = config.experts_per_token
        self.hidden = config.hidden_size
        self.router = Router(config, take, f"{name}.router")
        self.ffn = Experts(config, take, f"{name}.ffn", parallel.size)
        self.softmax = ops.Softmax(-1)
        self.top_k = ops.TopK(sorted=True)
        self.one_hot = ops.OneHot()

    def construct(self, x: Tensor, norm_weight: Tensor) -> Tensor:
        normed = self.kernels.norm(x, norm_weight)
        gates = self.gates(normed)
        mixed = self.parallel.sum(
            self.kernels.experts(normed, gates, self.ffn.w1.weight, self.ffn.w3.weight, self.ffn.w2.weight)
        )
        bias = ops.matmul(gates, ops.cast(self.ffn.w2.bias, gates.dtype).reshape(self.num_experts, self.hidden))
        return x + mixed + bias

    def gates(self, normed: Tensor) -> Tensor:
        """[T, experts]: each token's weight for every expert, zero for those not chosen."""
        probabilities = self.softmax(self.kernels.linear(normed, self.router.dense.weight))
        values, indices = self.top_k(probabilities, self.chosen)
        values = values / (values.sum(-1, keepdims=True) + 1e-9)
        one, zero = Tensor(1.0, values.dtype), Tensor(0.0, values.dtype)
        picked = self.one_hot(indices, self.num_experts, one, zero)  # [T, k, experts]
        return (picked * values.expand_dims(-1)).sum(1)


class KernelRoutedMoE(MoE):
    """The same with the routing inside the kernels, which also add the bias, a share of it on every rank."""

    def construct(self, x: Tensor, norm_weight: Tensor) -> Tensor:
        normed = self.kernels.norm(x, norm_weight)
        ffn = self.ffn
        mixed = self.kernels.experts(
            normed, self.router.dense.weight, ffn.w1.weight, ffn.w3.weight, ffn.w2.weight, ffn.w2.bias
        )
        return x + self.parallel.sum(mixed)
