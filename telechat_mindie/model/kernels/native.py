"""The decoder's kernels as fused native operators: weights in their stored dtype, any mix of sequences in one run."""

from __future__ import annotations

from collections.abc import Iterator

import mindspore as ms
import numpy as np
from mindspore import Tensor, mutable, nn, ops

from telechat_mindie.config import TelechatConfig
from telechat_mindie.dtypes import DTYPES
from telechat_mindie.model.batch import RaggedBatch
from telechat_mindie.model.kernels import native_build
from telechat_mindie.model.kernels.interface import Call
from telechat_mindie.model.kernels.native_decoder import NativeDecoder
from telechat_mindie.model.kv_cache import KVCache
from telechat_mindie.model.rope import RotaryTable

MAX_TOKENS = 512
"""New tokens in one run of the decoder, over all sequences; more of them go in several runs."""

_LEAST_SEQUENCES = 8
_LEAST_BLOCKS = 64
"""Rows and blocks of the sequences' table: unused ones cost nothing, and a graph is compiled for each size."""


class NativeKernels(nn.Cell):
    """See `interface.CpuKernelSet`.

    A graph is compiled for each shape, so its tokens come in buckets; a single rank needs none, see `native_decoder`.
    Which tokens belong to which sequence is data: prefill, decode, chunks, prefix hits and drafts run together. The
    library checks shapes, dtypes, ids and slots itself, as the last guard: MindSpore does not run a graph again after
    a kernel has refused its inputs.

    Raises:
        NativeUnavailable: the library cannot be had on this machine.
        InputError: TELECHAT_CPU_THREADS is not a number of threads.
    """

    routes_experts = False

    def __init__(self, config: TelechatConfig, tp: int, cache: KVCache, rotary: RotaryTable) -> None:
        super().__init__(auto_prefix=False)
        self._head_dim = config.head_dim
        self._rotary = rotary
        self._block_size = cache.block_size
        library = native_build.library()
        self.library = native_build.load(library, native_build.thread_count(tp))

        def custom(name: str, shape: object) -> ops.Custom:
            return ops.Custom(f"{library.path}:telechat_{name}", shape, lambda *_: ms.float32, "aot")

        self.norm_op = custom("norm", lambda x, *_: x)
        self.linear_op = custom("linear", lambda x, weight: (x[0], weight[0]))
        self.linear_add_op = custom("linear_add", lambda x, weight, *_: (x[0], weight[0]))
        self.norm_linear_op = custom("norm_linear", lambda x, norm, weight, eps: (x[0], weight[0]))
        self.norm_swiglu_op = custom("norm_swiglu", lambda x, norm, weight, eps: (x[0], weight[0] // 2))
        self.experts_op = custom("experts", lambda x, *_: x)
        self.embed_op = custom("embed", lambda weight, ids: (ids[0], weight[1]))
        self.attention_op = custom("attention", lambda qkv, *_: (qkv[0], config.hidden_size // tp))
        self.eps = Tensor(np.array([config.norm_eps], np.float32))
        self.block_size = Tensor(np.array([cache.block_size], np.int32))

    @staticmethod
    def weight_dtype(stored: str) -> str:
        return stored

    @staticmethod
    def cache_dtype(stored: str) -> np.dtype:
        return DTYPES[stored].numpy

    def single_rank_decoder(self, decoder: nn.Cell) -> NativeDecoder:
        return NativeDecoder(decoder, self.library, self.runs)

    def embed(self, token_ids: Tensor, weight: Tensor) -> Tensor:
        return self.embed_op(weight, token_ids)

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.norm_op(x, weight, self.eps)

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.linear_op(x, weight)

    def linear_add(self, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return self.linear_add_op(x, weight, bias, residual)

    def norm_linear(self, x: Tensor, norm_weight: Tensor, weight: Tensor) -> Tensor:
        return self.norm_linear_op(x, norm_weight, weight, self.eps)

    def norm_swiglu(self, x: Tensor, norm_weight: Tensor, weight: Tensor) -> Tensor:
        return self.norm_swiglu_op(x, norm_weight, weight, self.eps)

    def experts(self, x: Tensor, gates: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return self.experts_op(x, gates, gate, up, down)

    def attention(self, qkv: Tensor, key_cache: Tensor, value_cache: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        """`inputs`: cosines and sines [T, head_dim], slots [T], sequences [B, 3 + W], perhaps a mask [T, C]."""
        if len(inputs) == 4:
            return self.attention_op(
                qkv, key_cache, value_cache, inputs[0], inputs[1], inputs[2], self.block_size, inputs[3]
            )
        return self.attention_op(qkv, key_cache, value_cache, inputs[0], inputs[1], inputs[2], self.block_size)

    def calls(self, batch: RaggedBatch) -> list[Call]:
        """The runs of a batch, their inputs padded to the sizes that graphs are compiled for."""
        return [self._call(*run) for run in self.runs(batch)]

    def runs(self, batch: RaggedBatch) -> Iterator[tuple[list[np.ndarray], np.ndarray]]:
        """What the decoder takes for a batch's tokens in order, at most MAX_TOKENS at a time; see `inputs`."""
        total = len(batch.token_ids)
        for begin in range(0, total, MAX_TOKENS):
            yield self.inputs(batch, begin, min(begin + MAX_TOKENS, total))

    def _call(self, inputs: list[np.ndarray], wanted: np.ndarray) -> Call:
        ids, rows, rotary, slots, table, *mask = inputs
        size = bucket(len(ids))
        sequences, width = table.shape
        padded = [
            _padded(rotary, (size, self._head_dim)),
            _padded(slots, (size,), -1),
            _padded(table, (bucket(sequences, _LEAST_SEQUENCES), 3 + bucket(width - 3, _LEAST_BLOCKS))),
        ]
        padded += [_padded(visible, (size, bucket(visible.shape[1], _LEAST_BLOCKS))) for visible in mask]
        return Call(
            Tensor(_padded(ids, (size,))),
            Tensor(_padded(rows, (bucket(len(rows)),))),
            mutable(tuple(Tensor(array) for array in padded)),  # else their values would be compiled in
            wanted,
        )

    def inputs(self, batch: RaggedBatch, begin: int, end: int) -> tuple[list[np.ndarray], np.ndarray]:
        """What the decoder takes for the tokens [begin, end) of a batch, and which of its logits that gives.

        Returns:
            [ids [T], rows [R] of T, rotary [T, head_dim] (cosines, sines), slots [T], sequences [B, 3 + W] (first
            token, new tokens, context, blocks of what came before), and where there is one the mask [T, C]]; and the
            places [R'] in the batch's logits, R' = R but where no logits are wanted of the run: then R = 1.
        """
        starts = batch.query_starts
        first, last = np.maximum(starts, begin), np.minimum(starts + batch.query_lens, end)
        # What comes in a later run is not yet in the context.
        context = batch.context_lens - (starts + batch.query_lens - last)
        history = context - (last - first)
        present = np.nonzero(first < last)[0]
        blocks = -(-int(history[present].max()) // self._block_size)
        table = np.empty((len(present), 3 + blocks), np.int32)
        table[:, 0] = first[present] - begin
        table[:, 1] = (last - first)[present]
        table[:, 2] = context[present]
        table[:, 3:] = self._blocks(batch, history, present, blocks)
        tokens = slice(begin, end)
        lengths = np.repeat(batch.context_lens, batch.query_lens)[tokens]
        rotary = np.concatenate(self._rotary.tables(batch.positions[tokens], lengths), axis=1)
        wanted = np.nonzero((batch.logits_rows >= begin) & (batch.logits_rows < end))[0]
        rows = batch.logits_rows[wanted] - np.int32(begin) if len(wanted) else np.zeros(1, np.int32)
        found = [batch.token_ids[tokens], rows, rotary, batch.slots[tokens], table]
        if batch.mask is not None:
            owner = np.repeat(np.arange(len(starts)), batch.query_lens)[tokens]
            own = history[owner] + np.arange(begin, end) - first[owner]
            found.append(_visible(batch.mask[tokens], own, context[owner]))
        return found, wanted

    def _blocks(self, batch: RaggedBatch, history: np.ndarray, present: np.ndarray, width: int) -> np.ndarray:
        """[sequences, width] blocks of each one's history; 0 behind it.

        A prompt of several runs that is not written (slots of -1) may have no blocks: its later runs then read block 0,
        since what its earlier ones computed was not kept.
        """
        known = np.zeros((len(present), width), np.int32)
        given = batch.block_tables[present, :width]
        known[:, : given.shape[1]] = given
        needed = np.arange(width) * self._block_size < history[present, None]
        return np.where(needed & (known >= 0), known, 0)


def bucket(size: int, least: int = 1) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, 24 and so on, at least `least`: never more than half again as large."""
    size = max(size, least)
    power = 1 << (size - 1).bit_length()
    return power * 3 // 4 if power >= 4 and size <= power * 3 // 4 else power


def _padded(values: np.ndarray, shape: tuple[int, ...], fill: int = 0) -> np.ndarray:
    out = np.full(shape, fill, values.dtype)
    out[tuple(slice(size) for size in values.shape)] = values
    return out


def _visible(mask: np.ndarray, own: np.ndarray, context: np.ndarray) -> np.ndarray:
    """[T, C] bool: what each token of a run may see. Where its row of `mask` ends, that is what came before it.

    `own` is each token's place in its sequence, `context` the sequence's tokens once the run has written.
    """
    position = np.arange(int(context.max()))
    seen = position <= own[:, None]
    given = mask[:, : len(position)]
    seen[:, : given.shape[1]] = given
    seen &= position < context[:, None]
    return seen
