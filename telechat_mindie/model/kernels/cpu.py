"""The kernels in MindSpore's own CPU operators: float32, static shapes in buckets, the cache written in place.

Keys and values are rounded to the cache's dtype before anything reads them, so that a token's logits do not depend on
which of the tokens before it came in the same call. No operator takes bfloat16 but add, mul, cast and concat, and none
reads a tensor's bits as another dtype: a bfloat16 cache is held as int16, looked up in tables.
"""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Tensor, mutable, nn, ops

from telechat_mindie.config import TelechatConfig
from telechat_mindie.dtypes import DTYPES
from telechat_mindie.model.batch import RaggedBatch
from telechat_mindie.model.kernels.interface import Call
from telechat_mindie.model.kv_cache import KVCache
from telechat_mindie.model.rope import RotaryTable

MAX_QUERY = 512
"""New tokens of a sequence in one run: scores are [heads, query, context], so longer prompts go in pieces."""

BLOCKED = np.float32(-1e30)
"""Added to a score that a token may not see; finite, so that a row of nothing else stays finite too."""

_BRAIN_INFINITY = 0x7F80


class CpuKernels(nn.Cell):
    """See `interface.CpuKernelSet`.

    A graph is compiled for each shape, so shapes come in buckets: B sequences and Q new tokens each, both padded to a
    power of two, over a context padded to L. Sequences with one new token (decode) run together, any other alone.
    """

    routes_experts = False

    def __init__(self, config: TelechatConfig, tp: int, cache: KVCache, rotary: RotaryTable) -> None:
        super().__init__(auto_prefix=False)
        self.eps = config.norm_eps
        self.head_dim = config.head_dim
        self.heads = config.num_heads // tp
        self.kv_heads = config.num_kv_heads // tp
        self.group = self.heads // self.kv_heads
        self.scale = config.head_dim**-0.5
        self._rotary = rotary
        self._block_size = cache.block_size
        self._scratch_row = cache.scratch_row
        self.matmul = ops.MatMul(transpose_b=True)
        self.batch_matmul = ops.BatchMatMul()
        self.batch_matmul_transposed = ops.BatchMatMul(transpose_b=True)
        self.rsqrt = ops.Rsqrt()
        self.mean = ops.ReduceMean(keep_dims=True)
        self.softmax = ops.Softmax(-1)
        self.scatter = ops.ScatterUpdate()
        self.gather = ops.Gather()
        self.concat = ops.Concat(-1)
        self.cast = ops.Cast()
        self.has_bits = cache.dtype == np.int16
        self.element = ms.float16 if cache.dtype == np.float16 else ms.float32
        if self.has_bits:
            brains = np.arange(1 << 16, dtype=np.uint16).view(DTYPES["bfloat16"].numpy).astype(np.float32)
            self.by_bits = Tensor(np.roll(brains, 1 << 15))  # of an int16 from -32768 on
            self.magnitudes = Tensor(brains[: _BRAIN_INFINITY + 1])  # ascending: a number's place is its bits

    @staticmethod
    def weight_dtype(stored: str) -> str:
        return "float32"

    @staticmethod
    def cache_dtype(stored: str) -> np.dtype:
        return np.dtype(np.int16) if stored == "bfloat16" else DTYPES[stored].numpy

    @staticmethod
    def single_rank_decoder(decoder: nn.Cell) -> None:
        """Nothing here runs a decoder but its graph."""

    def embed(self, token_ids: Tensor, weight: Tensor) -> Tensor:
        return self.gather(weight, token_ids, 0)

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return x * self.rsqrt(self.mean(x * x, -1) + self.eps) * weight

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.matmul(x, weight)

    def linear_add(self, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return self.matmul(x, weight) + bias + residual

    def norm_linear(self, x: Tensor, norm_weight: Tensor, weight: Tensor) -> Tensor:
        return self.matmul(self.norm(x, norm_weight), weight)

    def norm_swiglu(self, x: Tensor, norm_weight: Tensor, weight: Tensor) -> Tensor:
        both = self.norm_linear(x, norm_weight, weight)
        half = both.shape[-1] // 2
        return ops.silu(both[:, :half]) * both[:, half:]

    def experts(self, x: Tensor, gates: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        """Every expert sees every token; a gate of zero takes it out of the sum. Weights are [E, in, out]."""
        spread = ops.broadcast_to(x.expand_dims(0), (gate.shape[0], *x.shape))
        hidden = ops.silu(self.batch_matmul(spread, gate)) * self.batch_matmul(spread, up)
        return (self.batch_matmul(hidden, down) * gates.transpose(1, 0).expand_dims(-1)).sum(0)

    def attention(self, qkv: Tensor, key_cache: Tensor, value_cache: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        """`inputs`: cos and sin [T, 1, head_dim / 2], slots [T], mask [B, 1, 1, Q, L], and cache rows [B, L].

        Without cache rows the context is the new tokens themselves.
        """
        q, k, v = self.rotated(qkv, inputs[0], inputs[1])
        k, v = self.narrow(k), self.narrow(v)
        self.scatter(key_cache, inputs[2], k)  # the result is left unused: using it would copy the cache
        self.scatter(value_cache, inputs[2], v)
        if len(inputs) == 5:
            k, v = self.gather(key_cache, inputs[4], 0), self.gather(value_cache, inputs[4], 0)
        return self.attend(q, self.widen(k), self.widen(v), inputs[3])

    def narrow(self, x: Tensor) -> Tensor:
        """What the cache holds of x: rounded to nearest, ties to even."""
        if not self.has_bits:
            return self.cast(x, self.element)
        x = self.cast(self.cast(x, ms.bfloat16), ms.float32)
        # From the right, so that NaN, which is below nothing, becomes infinity and not 0.
        bits = ops.searchsorted(self.magnitudes, ops.abs(x), right=True) - 1
        return self.cast(ops.select(x < 0, bits - 32768, bits), ms.int16)

    def widen(self, x: Tensor) -> Tensor:
        """The inverse of `narrow`, in float32."""
        if not self.has_bits:
            return self.cast(x, ms.float32)
        return self.gather(self.by_bits, self.cast(x, ms.int32) + 32768, 0)

    def rotated(self, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [T, heads, D] and k, v [T, kv heads * D] of the packed projection; q and k rotated."""
        split = self.heads * self.head_dim
        width = self.kv_heads * self.head_dim
        q = self.rotate(qkv[:, :split].reshape(-1, self.heads, self.head_dim), cos, sin)
        k = self.rotate(qkv[:, split : split + width].reshape(-1, self.kv_heads, self.head_dim), cos, sin)
        return q, k.reshape(-1, width), qkv[:, split + width :]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """Softmax attention of q [T, heads, D] over k, v [B * L, kv heads * D], in any shape: [T, heads * D]."""
        batch, query, context = mask.shape[0], mask.shape[3], mask.shape[4]
        keys = k.reshape(batch, context, self.kv_heads, self.head_dim).transpose(0, 2, 1, 3)
        values = v.reshape(batch, context, self.kv_heads, self.head_dim).transpose(0, 2, 1, 3)
        # Query heads of one kv head lie side by side: [B, kv, group * Q, D].
        q = q.reshape(batch, query, self.kv_heads, self.group, self.head_dim).transpose(0, 2, 3, 1, 4)
        q = q.reshape(batch, self.kv_heads, self.group * query, self.head_dim)
        scores = self.batch_matmul_transposed(q, keys) * self.scale
        scores = scores.reshape(batch, self.kv_heads, self.group, query, context) + mask
        weights = self.softmax(scores).reshape(batch, self.kv_heads, self.group * query, context)
        out = self.batch_matmul(weights, values).reshape(batch, self.kv_heads, self.group, query, self.head_dim)
        return out.transpose(0, 3, 1, 2, 4).reshape(batch * query, self.heads * self.head_dim)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotary embedding in the half layout: the pairs are (i, i + head_dim / 2)."""
        half = self.head_dim // 2
        first, second = x[:, :, :half], x[:, :, half:]
        return self.concat((first * cos - second * sin, second * cos + first * sin))

    def calls(self, batch: RaggedBatch) -> list[Call]:
        """The runs that a batch takes on this device."""
        starts = batch.query_starts
        single = [i for i, length in enumerate(batch.query_lens) if length == 1]
        found = []
        if single:
            found.append(self._call(batch, single, starts[single], 1, 0))
        for index, length in enumerate(batch.query_lens.tolist()):
            for begin in range(0, length if length > 1 else 0, MAX_QUERY):
                size = min(MAX_QUERY, length - begin)
                found.append(self._call(batch, [index], starts[index : index + 1] + begin, size, length - begin - size))
        return found

    def _call(self, batch: RaggedBatch, sequences: list[int], first: np.ndarray, size: int, after: int) -> Call:
        """Tokens first[i] .. first[i] + size of each sequence; `after` more of it follow in later calls."""
        rows, query = _bucket(len(sequences)), _bucket(size)
        tokens = (first[:, None] + np.arange(size)).ravel()
        places = (np.arange(len(sequences))[:, None] * query + np.arange(size)).ravel()  # in the padded call
        lengths = batch.context_lens[sequences]
        seen = lengths - after  # context once this call has written
        ends = np.repeat(seen - size + 1, size).reshape(-1, size) + np.arange(size)  # what each token may see
        fresh = len(sequences) == 1 and seen[0] == size and size > 1
        context = query if fresh else _bucket(int(seen.max()), 64)

        def padded(values: np.ndarray, fill: float, dtype: type) -> np.ndarray:
            out: np.ndarray = np.full((rows * query, *values.shape[1:]), fill, dtype)
            out[places] = values
            return out

        cos, sin = self._rotary.tables(batch.positions[tokens], np.repeat(lengths, size))
        scratch_row = self._scratch_row if batch.scratch_row is None else batch.scratch_row
        slots = np.where(batch.slots[tokens] < 0, scratch_row, batch.slots[tokens])
        mask = np.full((rows, query, context), BLOCKED, np.float32)
        visible = np.arange(context) < ends[..., None]
        if batch.mask is not None:
            allowed = batch.mask[tokens, :context].reshape(len(sequences), size, -1)
            visible[..., : allowed.shape[-1]] = allowed
            visible &= np.arange(context) < seen[:, None, None]
        mask[: len(sequences), :size][visible] = 0
        inputs = [
            padded(cos[:, None], 1, np.float32),
            padded(sin[:, None], 0, np.float32),
            padded(slots, scratch_row, np.int32),
            mask[:, None, None],
        ]
        if not fresh:
            inputs.append(self._cache_rows(batch.block_tables[sequences], seen, (rows, context), scratch_row))
        wanted, destinations = _wanted(batch.logits_rows, tokens, places)
        return Call(
            Tensor(padded(batch.token_ids[tokens], 0, np.int32)),
            Tensor(np.resize(wanted, _bucket(max(1, len(wanted)))).astype(np.int32)),
            mutable(tuple(Tensor(array) for array in inputs)),  # else their values would be compiled in
            destinations,
        )

    def _cache_rows(self, tables: np.ndarray, seen: np.ndarray, shape: tuple[int, int], scratch_row: int) -> np.ndarray:
        """[sequences, context] int32 of `shape`: where in the cache each position of each sequence lies."""
        position = np.arange(shape[1])
        block = np.minimum(position // self._block_size, tables.shape[1] - 1)
        found = tables[:, block] * self._block_size + position % self._block_size
        out = np.full(shape, scratch_row, np.int32)
        out[: len(tables)] = np.where(position < seen[:, None], found, scratch_row)
        return out


def _wanted(logits_rows: np.ndarray, tokens: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which rows of a call give logits, and the rows of the batch's logits that they are."""
    order = np.argsort(tokens)
    found = np.searchsorted(tokens[order], logits_rows)
    found = np.minimum(found, len(tokens) - 1)
    hit = tokens[order][found] == logits_rows
    return places[order][found[hit]] if hit.any() else np.zeros(1, np.int64), np.nonzero(hit)[0]


def _bucket(size: int, least: int = 1) -> int:
    """The next power of two, at least `least`."""
    return max(least, 1 << (size - 1).bit_length())
