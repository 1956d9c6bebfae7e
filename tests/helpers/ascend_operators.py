"""The fused Ascend operators in numpy, as their documentation and the published inference code define them.

No machine without an NPU runs the real ones. With these in their place an AscendKernels computes in PyNative mode, so
that layouts, masks, lengths, slots and the routing of experts are compared with the CPU kernels' results. They refuse
what the kernels' own host code refuses (mindspore's ms_kernels_internal, run on a CPU): an int64 index, a query of two
axes for PagedAttention, a mask beside mask_mode, another block size.
"""

from __future__ import annotations

from collections.abc import Sequence

import mindspore as ms
import numpy as np
from mindspore import Tensor

from telechat_mindie.kv_budget import BLOCK_SIZES
from telechat_mindie.model.kernels.ascend import AscendKernels


def emulate(kernels: AscendKernels) -> AscendKernels:
    """Replace the operators of `kernels`."""
    eps = kernels.rms_norm.epsilon
    scale = kernels.head_dim**-0.5
    kernels.rms_norm = lambda x, weight: (_like(x, _rms_norm(_float(x), _float(weight), eps)), None)
    kernels.matmul = _matmul
    kernels.gather = _gather
    kernels.split = _split
    kernels.rotate = _rotate
    kernels.write = _write
    kernels.swiglu = _swiglu
    kernels.flash_attention = _FlashAttention(kernels.heads, scale)
    kernels.paged_attention = _PagedAttention(kernels.heads, scale, kernels.kv_heads, trapezoid=False)
    kernels.causal_paged_attention = _PagedAttention(kernels.heads, scale, kernels.kv_heads, trapezoid=True)
    kernels.silu = lambda x: _like(x, _silu(_float(x)))
    if kernels.num_experts:
        kernels.top_k_softmax = _top_k_softmax
        kernels.sort_by_expert = _sort_by_expert
        kernels.count_tokens = _count_tokens
        kernels.grouped_matmul = _grouped_matmul
        kernels.weighted_sum = _weighted_sum
    return kernels


def _float(x: Tensor) -> np.ndarray:
    return x.asnumpy().astype(np.float32)


def _like(x: Tensor, array: np.ndarray) -> Tensor:
    return Tensor(array.astype(x.asnumpy().dtype))


def _int32(*indices: Tensor) -> None:
    assert all(index.dtype == ms.int32 for index in indices), [index.dtype for index in indices]


def _matmul(x: Tensor, weight: Tensor) -> Tensor:
    assert x.ndim == 2 and x.dtype == weight.dtype
    return _like(x, _float(x) @ _float(weight).T)


def _gather(table: Tensor, index: Tensor, axis: int) -> Tensor:
    _int32(index)
    assert axis == 0
    return Tensor(table.asnumpy()[index.asnumpy()])


def _rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def _silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def _split(x: Tensor, sizes: Sequence[int], axis: int) -> list[Tensor]:
    return [Tensor(part) for part in np.split(x.asnumpy(), np.cumsum(sizes)[:-1], axis)]


def _swiglu(x: Tensor, axis: int) -> Tensor:
    gate, up = np.split(_float(x), 2, axis)
    return _like(x, _silu(gate) * up)


def _rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """cos_format 2: a row of cosines and of sines for each token, halves side by side."""
    _int32(lengths)
    assert cos.shape == sin.shape and cos.ndim == 2 and cos.dtype in (query.dtype, ms.float32)
    assert query.dtype == key.dtype and query.ndim == key.ndim
    table = _float(cos)[:, None], _float(sin)[:, None]
    rotated = []
    for x in (query, key):
        heads = _float(x).reshape(len(table[0]), -1, cos.shape[1])
        first, second = np.split(heads, 2, -1)
        turned = heads * table[0] + np.concatenate([-second, first], -1) * table[1]
        rotated.append(_like(x, turned.reshape(x.shape)))
    return rotated[0], rotated[1]


def _write(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> Tensor:
    _int32(slots)
    assert key_cache.shape[1] in BLOCK_SIZES and key.dtype == key_cache.dtype
    for new, cache in ((key, key_cache), (value, value_cache)):
        rows = cache.asnumpy().copy()
        flat = rows.reshape(-1, *cache.shape[2:])
        for row, slot in zip(new.asnumpy().reshape(-1, *cache.shape[2:]), slots.asnumpy(), strict=True):
            if slot >= 0:
                flat[slot] = row
        cache.copy_(Tensor(rows))
    return key


def _attend(query: np.ndarray, key: np.ndarray, value: np.ndarray, scale: float, added: np.ndarray) -> np.ndarray:
    """[q, heads, d] over [c, kv heads, d] with `added` [q, c] on the scores."""
    group = query.shape[1] // key.shape[1]
    key, value = np.repeat(key, group, 1), np.repeat(value, group, 1)
    scores = np.einsum("qhd,chd->hqc", query, key) * scale + added
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hqc,chd->qhd", weights / weights.sum(-1, keepdims=True), value)


class _FlashAttention:
    """Layout TH: sequences one after the other, lengths (not running sums), a [128, 128] mask for the triangle."""

    def __init__(self, heads: int, scale: float) -> None:
        self.heads, self.scale = heads, scale

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *rest: Tensor | None) -> tuple[Tensor | None, ...]:
        _, _, _, mask, _, query_lens, context_lens = rest
        assert mask is not None and query_lens is not None and context_lens is not None
        _int32(query_lens, context_lens)
        assert query.ndim == 2 and mask.dtype == query.dtype
        assert mask.shape == (128, 128) and (np.triu(mask.asnumpy(), 1) == mask.asnumpy()).all()
        lengths = query_lens.asnumpy()
        assert (lengths == context_lens.asnumpy()).all() and lengths.sum() == len(query)
        depth = query.shape[1] // self.heads
        parts = [_float(x).reshape(len(x), -1, depth) for x in (query, key, value)]
        out = np.empty_like(parts[0])
        for end, length in zip(np.cumsum(lengths), lengths, strict=True):
            q, k, v = (part[end - length : end] for part in parts)
            out[end - length : end] = _attend(q, k, v, self.scale, np.triu(np.full((length, length), -1e9), 1))
        return None, None, None, _like(query, out.reshape(query.shape))


class _PagedAttention:
    """Each sequence's context through its block table; the mask counts only where a sequence has several tokens.

    With mask_mode TRAPEZOIDAL the last of a sequence's new tokens sees all of its context, and each one before it one
    token less.
    """

    def __init__(self, heads: int, scale: float, kv_heads: int, *, trapezoid: bool) -> None:
        self.heads, self.scale, self.kv_heads, self.trapezoid = heads, scale, kv_heads, trapezoid

    def __call__(
        self,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        tables: Tensor,
        context_lens: Tensor,
        scale: None,
        offset: None,
        mask: Tensor | None,
        query_lens: Tensor,
    ) -> Tensor:
        _int32(tables, context_lens, query_lens)
        lengths, contexts = query_lens.asnumpy(), context_lens.asnumpy()
        masked, total = lengths.max() > 1, lengths.sum()
        assert query.ndim == 3 and query.shape[:2] in ((total, 1), (1, total)) and (masked or query.shape[1] == 1)
        assert len(tables) == len(contexts) == len(lengths)
        if self.trapezoid:
            assert mask is None
        else:
            assert mask is not None and mask.dtype == query.dtype
            assert mask.shape == ((total, contexts.max()) if masked else (1, 1))
        block, depth = key_cache.shape[1], key_cache.shape[3]
        assert block in BLOCK_SIZES
        caches = [_float(cache).reshape(-1, self.kv_heads, depth) for cache in (key_cache, value_cache)]
        q = _float(query).reshape(total, self.heads, depth)
        out = np.empty_like(q)
        for row, (end, length) in enumerate(zip(np.cumsum(lengths), lengths, strict=True)):
            position = np.arange(contexts[row])
            slots = tables.asnumpy()[row, position // block] * block + position % block
            new = slice(end - length, end)
            if masked and mask is not None:
                added = _float(mask)[new, : len(position)]
            else:
                seen = contexts[row] - length + 1 + np.arange(length)[:, None]
                added = np.where(position < seen, 0, -np.inf)
            out[new] = _attend(q[new], caches[0][slots], caches[1][slots], self.scale, added)
        return _like(query, out.reshape(query.shape))


def _top_k_softmax(logits: Tensor, finished: None, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax over all experts, the k largest of each token; row_idx counts column by column."""
    scores = np.exp(_float(logits) - _float(logits).max(-1, keepdims=True))
    scores /= scores.sum(-1, keepdims=True)
    experts = np.argsort(-scores, -1, kind="stable")[:, :k]
    rows = np.arange(experts.size).reshape(k, -1).T
    values = np.take_along_axis(scores, experts, -1)
    return Tensor(values), Tensor(experts.astype(np.int32)), Tensor(rows.astype(np.int32))


def _sort_by_expert(x: Tensor, rows: Tensor, experts: Tensor, active: int) -> tuple[Tensor, Tensor, Tensor]:
    """Copies of the tokens sorted by expert; where copy `row_idx` went; the sorted experts."""
    tokens = len(x)
    flat, row = experts.asnumpy().ravel(), rows.asnumpy().ravel()
    order = np.argsort(flat, kind="stable")
    places = np.empty(len(flat), np.int32)
    places[row[order]] = np.arange(len(flat))
    return Tensor(x.asnumpy()[row[order] % tokens]), Tensor(places), Tensor(flat[order].astype(np.int32))


def _count_tokens(experts: Tensor, count: int) -> Tensor:
    """Running sums: how many copies go to this expert and those before it."""
    return Tensor(np.cumsum(np.bincount(experts.asnumpy(), minlength=count)).astype(np.int32))


def _grouped_matmul(
    x: list[Tensor], weight: list[Tensor], *rest: Tensor | None, split_item: int, group_type: int, group_list_type: int
) -> list[Tensor]:
    assert (split_item, group_type, group_list_type) == (3, 0, 0)
    ends = rest[6]
    assert ends is not None
    groups = np.split(_float(x[0]), ends.asnumpy()[:-1])
    return [_like(x[0], np.concatenate([rows @ w for rows, w in zip(groups, _float(weight[0]), strict=True)]))]


def _weighted_sum(
    outputs: Tensor, start: Tensor, skip: None, bias: Tensor, values: Tensor, places: Tensor, experts: Tensor
) -> Tensor:
    """start + the sum over a token's experts of value * (output + bias); copy j of token t is numbered j * T + t."""
    total = _float(start)
    tokens = len(total)
    for choice in range(values.shape[1]):
        rows = places.asnumpy()[choice * tokens + np.arange(tokens)]
        picked = _float(outputs)[rows] + _float(bias)[experts.asnumpy()[:, choice]]
        total = total + _float(values)[:, choice, None] * picked
    return _like(start, total)
