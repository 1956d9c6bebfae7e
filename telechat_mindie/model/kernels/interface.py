"""What a decoder layer computes with: one small interface, an implementation for each device.

T is the tokens of a call; weights are [out, in], those of experts [experts, in, out].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from mindspore import Tensor, nn

from telechat_mindie.model.batch import RaggedBatch


@dataclass(frozen=True)
class Call:
    """One run of the decoder: its inputs, and which rows of the batch's logits it gives (in its first rows)."""

    token_ids: Tensor  # [T]
    logits_rows: Tensor  # [R]
    inputs: tuple[Tensor, ...]  # the kernels' own, for `attention`
    rows: np.ndarray  # [R'] with R' <= R: destinations


class SingleRankDecoder(Protocol):
    """What computes a decoder of one rank without a graph."""

    def logits(self, batch: RaggedBatch, caches: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None) -> np.ndarray:
        """Logits [R, vocabulary] float32; `caches` (keys, values), a tensor a layer, in place of the model's own."""


class Kernels(Protocol):
    """A Cell with these methods: up to `routed_experts` parts of a graph, after it plain Python."""

    routes_experts: bool
    """Whether a mixture of experts calls `routed_experts`, or finds the gates itself and calls `experts`."""

    def embed(self, token_ids: Tensor, weight: Tensor) -> Tensor:
        """Ids [T] and rows [V, h]: [T, h]."""

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm of [T, h]."""

    def norm_linear(self, x: Tensor, norm_weight: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm, then a linear layer: [T, out]."""

    def norm_swiglu(self, x: Tensor, norm_weight: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm, one linear layer [2f, h], silu(gate) * up: [T, f]."""

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """[T, out]."""

    def linear_add(self, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        """linear + bias + residual: [T, out]."""

    def attention(self, qkv: Tensor, key_cache: Tensor, value_cache: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        """Rotary, cache write, attention over the context.

        [T, (heads + 2 kv heads) * head_dim] gives [T, heads * head_dim]; `inputs` are those of a Call.
        """

    def experts(self, x: Tensor, gates: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        """The experts' sum weighted by `gates` [T, E], without down's bias: [T, h]."""

    def routed_experts(self, x: Tensor, router: Tensor, gate: Tensor, up: Tensor, down: Tensor, bias: Tensor) -> Tensor:
        """The same with the routing by `router` [E, h], and this rank's share of down's bias."""

    def calls(self, batch: RaggedBatch) -> list[Call]:
        """A batch as one or more runs of the decoder."""

    @staticmethod
    def weight_dtype(stored: str) -> str:
        """The dtype that weights are held in."""

    @staticmethod
    def cache_dtype(stored: str) -> np.dtype:
        """On a CPU: numpy's dtype of a key/value cache for weights of dtype `stored`; the same, or integers of its bits
        where the operators do not take it."""

    def single_rank_decoder(self, decoder: nn.Cell) -> SingleRankDecoder | None:
        """On a CPU: what computes a decoder over these kernels without a graph, or None."""
