"""The graphs of a training step: the loss with its gradients, added up, and AdamW over what was added up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mindspore as ms
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from telechat_mindie.model.decoder import TelechatForCausalLM
from telechat_mindie.model.kernels.gradients import CrossEntropy
from telechat_mindie.model.parallel import TensorParallel


class Loss(nn.Cell):
    """The sum of the cross entropy over the predictions that count.

    Args:
        decoder: over TrainingKernels.
        balance_alpha: of the auxiliary loss of a MoE, which is added once for each prediction; 0 leaves it out.
    """

    def __init__(self, decoder: TelechatForCausalLM, balance_alpha: float = 0.0) -> None:
        super().__init__(auto_prefix=False)
        self.decoder = decoder
        self.kernels: Any = decoder.kernels
        self.balance_alpha = balance_alpha if decoder.config.is_moe else 0.0
        self.embed_layernorm = decoder.config.embed_layernorm
        self.cross_entropy = CrossEntropy(decoder.parallel, decoder.lm_head.shape[0])

    def construct(
        self, token_ids: Tensor, targets: Tensor, counted: Tensor, tokens: Tensor, rotary: Any, documents: Any
    ) -> Tensor:
        """All of this rank's rows, laid end to end: T = rows * L.

        Args:
            token_ids, targets: [T] int32.
            counted: [T] float32, 1 for a prediction that counts.
            tokens: their number.
            rotary: cosines and sines [T, 1, head_dim / 2].
            documents: [rows, L] int32 of tokens that look, and of tokens that are looked at; see `kernels.masks`.
        """
        model = self.decoder.model
        inputs = (rotary[0], rotary[1], self.kernels.masks(documents[0], documents[1]))
        x = model.tok_embeddings(token_ids)
        if self.embed_layernorm:
            x = self.kernels.norm(x, model.embedding_norm.weight)
        balance = ops.zeros((), ms.float32)
        for layer in model.layers:
            x = layer.attention(x, layer.attention_norm.weight, x, x, inputs)  # without caches
            if self.balance_alpha:
                normed = self.kernels.norm(x, layer.ffn_norm.weight)
                router = layer.feed_forward.router.dense.weight
                balance = balance + self.kernels.balance(self.kernels.probabilities(normed, router))
            x = layer.feed_forward(x, layer.ffn_norm.weight)
        logits = self.kernels.norm_linear(x, model.norm_out.weight, self.decoder.lm_head.weight)
        return (self.cross_entropy(logits, targets)[0] * counted).sum() + self.balance_alpha * balance * tokens


_add = ops.MultitypeFuncGraph("add_gradient")


@_add.register("Tensor", "Tensor")  # type: ignore[untyped-decorator]
def _add_gradient(total: Tensor, gradient: Tensor) -> Tensor:
    return ops.assign_add(total, gradient)


class Accumulate(nn.Cell):
    """Adds the gradients of a summed loss to `totals`, which lie as `parameters`; gives that sum over all ranks."""

    def __init__(self, loss: Loss, parameters: ParameterTuple, totals: ParameterTuple, data: TensorParallel) -> None:
        super().__init__(auto_prefix=False)
        self.value_and_grad = ops.value_and_grad(loss, None, parameters)
        self.totals = totals
        self.data = data
        self.map = ops.HyperMap()

    def construct(self, *inputs: Any) -> Tensor:
        loss, gradients = self.value_and_grad(*inputs)
        return ops.depend(self.data.sum(loss), self.map(_add, self.totals, gradients))


class Evaluate(nn.Cell):
    """A summed loss over all ranks; nothing changes."""

    def __init__(self, loss: Loss, data: TensorParallel) -> None:
        super().__init__(auto_prefix=False)
        self.loss = loss
        self.data = data

    def construct(self, *inputs: Any) -> Tensor:
        return self.data.sum(self.loss(*inputs))


class Update(nn.Cell):
    """Clips what was added up, and AdamW: every tensor a parameter, changed in place.

    Args:
        parameters: what is trained, float32.
        totals: of gradients; zeros after it.
        moments: first and second, as `parameters`.
        decayed: which parameters decay.
        cut: which are a rank's own part, the others being the same in a tensor parallel group.
        clip_norm: most that the norm of all gradients may be.
        groups: all ranks, those with the same part of the weights, and those with the same rows.
    """

    def __init__(
        self,
        parameters: Sequence[Parameter],
        totals: Sequence[Parameter],
        moments: tuple[Sequence[Parameter], Sequence[Parameter]],
        decayed: Sequence[bool],
        cut: Sequence[bool],
        clip_norm: float,
        groups: tuple[TensorParallel, TensorParallel, TensorParallel],
    ) -> None:
        super().__init__(auto_prefix=False)
        self.ranks, self.data, self.tensor = groups
        self.parameters_ = ParameterTuple(parameters)
        self.totals = ParameterTuple(totals)
        self.first, self.second = map(ParameterTuple, moments)
        self.decayed, self.cut = tuple(decayed), tuple(cut)
        self.count = len(self.cut)
        self.clip_norm = clip_norm
        self.adam = ops.AdamWeightDecay()

    def construct(
        self, tokens: Tensor, rate: Tensor, beta1: Tensor, beta2: Tensor, epsilon: Tensor, decay: Tensor
    ) -> Tensor:
        """The norm of the gradients of the mean loss. All scalars float32.

        Args:
            tokens: predictions that the gradients are a sum over.
            rate, epsilon: with the bias correction in them.
            decay: to be multiplied by `rate`.
        """
        # Autodiff of a sum over ranks adds the gradients of every rank's copy of the loss.
        share = 1.0 / (tokens * self.tensor.size)
        own, common = ops.zeros((), ms.float32), ops.zeros((), ms.float32)
        before = tokens
        for index in range(self.count):
            group = self.data if self.cut[index] else self.ranks
            if group.size > 1:
                # One after the other, so that the ranks' sums meet in the same order.
                before = group.sum(ops.depend(self.totals[index], before))
                ops.assign(self.totals[index], before)
            square = self.totals[index] * share
            square = (square * square).sum()
            if self.cut[index]:
                own = own + square
            else:
                common = common + square
        norm = ops.sqrt(self.tensor.sum(own) + common)
        share = share * self.clip_norm / ops.maximum(norm, ops.full_like(norm, self.clip_norm))
        none = ops.zeros_like(decay)
        for index in range(self.count):
            state = (self.parameters_[index], self.first[index], self.second[index])
            fall = decay if self.decayed[index] else none
            self.adam(*state, rate, beta1, beta2, epsilon, fall, self.totals[index] * share)
            ops.assign(self.totals[index], ops.zeros_like(self.totals[index]))
        return norm
