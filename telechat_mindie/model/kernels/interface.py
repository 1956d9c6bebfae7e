"""What a decoder layer computes with: one small interface, an implementation for each device.

T is the tokens of a call; weights are [out, in], those of experts [experts, in, out]. To mypy a Cell is Any and fits
every protocol: that the classes have these names and arguments is a test.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

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
    """What every device's have, in a Cell: up to `attention` parts of a graph, after it plain Python."""

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

        [T, (heads + 2 kv heads) * head_dim] gives [T, heads * head_dim]; `inputs` are the kernels' own, from a Call.
        """

    def calls(self, batch: RaggedBatch) -> list[Call]:
        """A batch as one or more runs of the decoder."""

    @staticmethod
    def weight_dtype(stored: str) -> str:
        """The dtype that weights are held in."""


class CpuKernelSet(Kernels, Protocol):
    """A CPU's: a mixture of experts finds the gates itself."""

    routes_experts: Literal[False]

    def experts(self, x: Tensor, gates: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        """The experts' sum weighted by `gates` [T, E], without down's bias: [T, h]."""

    @staticmethod
    def cache_dtype(stored: str) -> np.dtype:
        """numpy's dtype of a key/value cache for weights of dtype `stored`; the same, or integers of its bits where the
        operators do not take it."""

    def single_rank_decoder(self, decoder: nn.Cell) -> SingleRankDecoder | None:
        """What computes a decoder over these kernels without a graph, or None."""


class AscendKernelSet(Kernels, Protocol):
    """An NPU's: routing is part of the operators."""

    routes_experts: Literal[True]

    def routed_experts(self, x: Tensor, router: Tensor, gate: Tensor, up: Tensor, down: Tensor, bias: Tensor) -> Tensor:
        """The experts' sum weighted as `router` [E, h] says, with this rank's share of down's bias: [T, h]."""


KernelSet = CpuKernelSet | AscendKernelSet
"""What a decoder is built over."""
