"""The decoder's kernels in Ascend's fused operators: float16 or bfloat16, dynamic shapes, every mode in one call.

Which operators, with which layouts and masks, follows mindformers' own TeleChat2 inference (research/telechat2/infer
and mindformers/modules/flash_attention.py, branch r1.6.0). What a comment calls the kernel's is from MindSpore's
plugin/device/ascend/kernel/internal.

Out of scope: chips whose cache is stored in the NZ layout (Atlas 300I Duo and the first 910), as for mindformers'
TeleChat2.
"""

from __future__ import annotations

import numpy as np
from mindspore import Tensor, mint, nn, ops
from mindspore import dtype as mstype
from mindspore.ops import auto_generate as fused

from telechat_mindie.config import TelechatConfig
from telechat_mindie.dtypes import DTYPES, HALF_DTYPES
from telechat_mindie.errors import ConfigError, InputError
from telechat_mindie.model.batch import RaggedBatch
from telechat_mindie.model.kernels.ascend_graphs import DECODE_INPUTS, TRIANGLE, AscendCache, CallShape
from telechat_mindie.model.kernels.checks import traced_check
from telechat_mindie.model.kernels.interface import Call
from telechat_mindie.model.rope import RotaryTable

HALF_TABLES = 2
"""ApplyRotaryPosEmb's cos_format: one row of cosines a token, the two halves of a head side by side (neox)."""

MAX_BLOCK = 128 * 128
"""PagedAttention holds a block of one head's keys on the chip: block size x head dimension may not exceed this."""

BLOCKED = -10000.0
"""Added to a score that a token may not see; within float16."""

INDICES = ("int32",)
"""The kernels read lengths, slots and tables as 32-bit words, whatever the tensor's dtype says."""


class AscendKernels(nn.Cell):
    """See `interface.AscendKernelSet`.

    A call is one run: a batch without history goes through FlashAttentionScore, any other through PagedAttention.
    Everything that depends on the batch is made on the host in `calls`; nothing in the graph waits for the device.

    Args:
        config: the model's shape.
        tp: tensor parallel size; heads, kv heads and feed-forward are divided by it.
        cache: this rank's cache; its dtype is the dtype of all computing.
        rotary: gives the cosines and sines.
        rotary_dtype: "float32" hands these over in float32, anything else in the dtype of computing.

    Raises:
        ConfigError: `tp` does not fit the model, or the operators cannot do its head dimension or block size.
        InputError: the cache's dtype is not one of HALF_DTYPES.
    """

    routes_experts = True

    def __init__(
        self, config: TelechatConfig, tp: int, cache: AscendCache, rotary: RotaryTable, rotary_dtype: str = ""
    ) -> None:
        super().__init__(auto_prefix=False)
        config.check_tp(tp)
        self.weight_dtype(cache.dtype)
        _check_sizes(config.head_dim, cache.block_size)
        self.tp = tp
        self.head_dim = config.head_dim
        self.heads = config.num_heads // tp
        self.kv_heads = config.num_kv_heads // tp
        self.query_width = self.heads * self.head_dim
        self.kv_width = self.kv_heads * self.head_dim
        self.block_size = cache.block_size
        self.num_experts = config.num_experts
        self.chosen = config.experts_per_token
        self.dtype = cache.dtype
        self.dtypes = (cache.dtype,)
        self.table_dtype = "float32" if rotary_dtype == "float32" else cache.dtype
        self._rotary = rotary
        # The kernel multiplies a bfloat16 mask by its own large negative number.
        triangle = np.triu(np.full((TRIANGLE, TRIANGLE), 1.0 if self.dtype == "bfloat16" else BLOCKED), 1)
        self._triangle = Tensor(triangle.astype(DTYPES[self.dtype].numpy))

        self.rms_norm = ops.RmsNorm(config.norm_eps)
        self.matmul = ops.MatMul(transpose_b=True)
        self.swiglu = fused.Swiglu()
        # mint.split would give views, and the operators after it want contiguous tensors: a copy more of each.
        self.split = fused.SplitWithSize()
        self.rotate = ops.ApplyRotaryPosEmb(HALF_TABLES)
        self.write = fused.ReshapeAndCache()
        scale = config.head_dim**-0.5
        self.flash_attention = ops.operations.nn_ops.FlashAttentionScore(
            head_num=self.heads, scale_value=scale, next_tokens=0, input_layout="TH"
        )
        self.paged_attention = fused.PagedAttention(self.heads, scale, self.kv_heads)
        if config.is_moe:
            self.top_k_softmax = fused.MoeGatingTopKSoftmax()
            self.sort_by_expert = fused.MoeInitRouting()
            self.count_tokens = fused.MoeComputeExpertTokens()
            self.grouped_matmul = fused.GroupedMatmulV4()
            self.silu = fused.SiLU()
            self.weighted_sum = fused.MoeFinalizeRouting()
            self.total = ops.ReduceSum(keep_dims=True)

    @staticmethod
    def weight_dtype(stored: str) -> str:
        if stored not in HALF_DTYPES:
            raise InputError(
                "Ascend's attention operators cannot compute in this dtype",
                where="dtype",
                expected=" or ".join(HALF_DTYPES),
                found=stored,
                advice="Build the directory with --dtype float16 or bfloat16.",
            )
        return stored

    def call_shape(self, external_layers: int = 0) -> CallShape:
        """What AscendGraphs compiles a decoder over these kernels for."""
        return CallShape(self.head_dim, self.kv_heads, self.block_size, self.dtype, self.table_dtype, external_layers)

    def embed(self, token_ids: Tensor, weight: Tensor) -> Tensor:
        return ops.gather(weight, token_ids, 0)

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """The operator computes in float32 and rounds once."""
        traced_check("RmsNorm: weight", weight.shape, weight.dtype, (None,), self.dtypes)
        traced_check("RmsNorm: x", x.shape, x.dtype, (None, weight.shape[0]), self.dtypes)
        return self.rms_norm(x, weight)[0]

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        traced_check("MatMul: weight", weight.shape, weight.dtype, (None, None), self.dtypes)
        traced_check("MatMul: x", x.shape, x.dtype, (None, weight.shape[1]), self.dtypes)
        return self.matmul(x, weight)

    def linear_add(self, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        traced_check("Add: bias", bias.shape, bias.dtype, (weight.shape[0],), self.dtypes)
        traced_check("Add: residual", residual.shape, residual.dtype, (None, weight.shape[0]), self.dtypes)
        return self.linear(x, weight) + bias + residual

    def norm_linear(self, x: Tensor, norm_weight: Tensor, weight: Tensor) -> Tensor:
        return self.linear(self.norm(x, norm_weight), weight)

    def norm_swiglu(self, x: Tensor, norm_weight: Tensor, weight: Tensor) -> Tensor:
        """Swiglu takes the gate from the first half of the columns, as `w_gate_hidden` stores it."""
        return self.swiglu(self.norm_linear(x, norm_weight, weight), -1)

    def attention(self, qkv: Tensor, key_cache: Tensor, value_cache: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        """`inputs`: cos and sin [T, head_dim], slots [T], context and query lengths [B], mask; block tables [B, W].

        Without block tables the context is the new tokens themselves and the mask the triangle; with them the mask
        is [T, C], or [1, 1] where every sequence has one new token. Caches are [blocks, block_size, kv_heads,
        head_dim].
        """
        cos, sin, slots, context_lens, query_lens, mask = inputs[:6]
        self.check_attention(qkv, key_cache, value_cache, inputs)
        query, key, value = self.split(qkv, (self.query_width, self.kv_width, self.kv_width), -1)
        query, key = self.rotate(query, key, cos, sin, context_lens)
        written = self.write(key, value, key_cache, value_cache, slots)
        query = ops.depend(query, written)
        if len(inputs) == DECODE_INPUTS:
            return self.paged_attention(
                query, key_cache, value_cache, inputs[6], context_lens, None, None, mask, query_lens
            )
        # Lengths, not the running sums that the operator's documentation speaks of: that is what the kernel reads.
        outputs = self.flash_attention(query, key, value, None, None, None, mask, None, query_lens, context_lens)
        return outputs[3]

    def check_attention(self, qkv: Tensor, key_cache: Tensor, value_cache: Tensor, inputs: tuple[Tensor, ...]) -> None:
        cos, sin, slots, context_lens, query_lens, mask = inputs[:6]
        packed = (None, self.query_width + 2 * self.kv_width)
        block = (None, self.block_size, self.kv_heads, self.head_dim)
        table = (None, self.head_dim)
        traced_check("attention: qkv", qkv.shape, qkv.dtype, packed, self.dtypes)
        traced_check("ReshapeAndCache: key_cache", key_cache.shape, key_cache.dtype, block, self.dtypes)
        traced_check("ReshapeAndCache: value_cache", value_cache.shape, value_cache.dtype, block, self.dtypes)
        traced_check("ReshapeAndCache: slot_mapping", slots.shape, slots.dtype, (None,), INDICES)
        traced_check("ApplyRotaryPosEmb: cos", cos.shape, cos.dtype, table, (self.table_dtype,))
        traced_check("ApplyRotaryPosEmb: sin", sin.shape, sin.dtype, table, (self.table_dtype,))
        traced_check("attention: batch_valid_length", context_lens.shape, context_lens.dtype, (None,), INDICES)
        traced_check("attention: q_seq_lens", query_lens.shape, query_lens.dtype, (None,), INDICES)
        if len(inputs) == DECODE_INPUTS:
            traced_check("PagedAttention: block_tables", inputs[6].shape, inputs[6].dtype, (None, None), INDICES)
            traced_check("PagedAttention: attn_mask", mask.shape, mask.dtype, (None, None), self.dtypes)
        else:
            traced_check("FlashAttentionScore: attn_mask", mask.shape, mask.dtype, (TRIANGLE, TRIANGLE), self.dtypes)

    def routed_experts(self, x: Tensor, router: Tensor, gate: Tensor, up: Tensor, down: Tensor, bias: Tensor) -> Tensor:
        """This rank's part of the chosen experts' weighted sum: [T, h].

        `router` is [E, h]; `gate` and `up` [E, h, f], `down` [E, f, h]; `bias` [1, E, 1, h], down's, of which a rank
        adds one `tp`th, so that the sum over ranks has it once.
        """
        tokens, hidden = x.shape
        inner = gate.shape[2]
        traced_check("experts: x", x.shape, x.dtype, (None, router.shape[1]), self.dtypes)
        traced_check("experts: router", router.shape, router.dtype, (self.num_experts, None), self.dtypes)
        traced_check("GroupedMatmulV4: gate", gate.shape, gate.dtype, (self.num_experts, hidden, None), self.dtypes)
        traced_check("GroupedMatmulV4: up", up.shape, up.dtype, (self.num_experts, hidden, inner), self.dtypes)
        traced_check("GroupedMatmulV4: down", down.shape, down.dtype, (self.num_experts, inner, hidden), self.dtypes)
        bias_shape = (1, self.num_experts, 1, hidden)
        traced_check("MoeFinalizeRouting: bias", bias.shape, bias.dtype, bias_shape, self.dtypes)

        logits = self.matmul(ops.cast(x, mstype.float32), ops.cast(router, mstype.float32))
        values, experts, rows = self.top_k_softmax(logits, None, self.chosen)  # each [T, k]
        values = ops.cast(values / (self.total(values, -1) + 1e-9), x.dtype)
        copies, places, sorted_experts = self.sort_by_expert(x, rows, experts, tokens)  # copies [T * k, h]
        ends = ops.cast(self.count_tokens(sorted_experts, self.num_experts), mstype.int64)  # [E]
        gated = self.silu(self.grouped(copies, gate, ends)) * self.grouped(copies, up, ends)
        outputs = self.grouped(gated, down, ends)
        share = bias if self.tp == 1 else bias / self.tp
        start = mint.zeros((tokens, hidden), dtype=x.dtype)
        share = share.reshape(self.num_experts, hidden)
        return self.weighted_sum(outputs, start, None, share, values, places, experts)

    def grouped(self, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        """[N, out] from rows sorted by expert and weights [E, in, out]; `ends` [E] is where each expert's rows end.

        One output for all groups (split_item 3), groups along the rows (group_type 0), given by running sums
        (group_list_type 0).
        """
        outputs = self.grouped_matmul(
            [x], [weight], None, None, None, None, None, None, ends, split_item=3, group_type=0, group_list_type=0
        )
        return outputs[0]

    def calls(self, batch: RaggedBatch) -> list[Call]:
        """One run of the decoder for the whole batch.

        Raises:
            InputError: a mask hides context from a sequence's only new token, which the kernel cannot do.
        """
        cos, sin = self._rotary.tables(batch.positions, np.repeat(batch.context_lens, batch.query_lens))
        table = DTYPES[self.table_dtype].numpy
        inputs = [
            Tensor(np.concatenate([cos, cos], -1).astype(table)),
            Tensor(np.concatenate([sin, sin], -1).astype(table)),
            Tensor(batch.slots),
            Tensor(batch.context_lens),
            Tensor(batch.query_lens),
        ]
        if batch.mask is None and (batch.context_lens == batch.query_lens).all():
            inputs.append(self._triangle)
        else:
            inputs += [Tensor(_paged_mask(batch).astype(DTYPES[self.dtype].numpy)), Tensor(batch.block_tables)]
        rows = np.arange(len(batch.logits_rows))
        return [Call(Tensor(batch.token_ids), Tensor(batch.logits_rows), tuple(inputs), rows)]


def _check_sizes(head_dim: int, block_size: int) -> None:
    if head_dim % 16:
        raise ConfigError(
            "FlashAttentionScore cannot do this head dimension",
            where="hidden_size / n_head",
            expected="a multiple of 16",
            found=head_dim,
        )
    largest = MAX_BLOCK // head_dim // 16 * 16
    if block_size % 16 or not 0 < block_size <= largest:
        raise ConfigError(
            "PagedAttention cannot do this block size",
            where="cacheBlockSize",
            expected=f"a multiple of 16 up to {largest} with head dimension {head_dim}",
            found=block_size,
        )


def _paged_mask(batch: RaggedBatch) -> np.ndarray:
    """[T, C] float32 with C the longest context: 0 where a token may look, else BLOCKED.

    With one new token a sequence the kernel looks at no mask; [1, 1] stands in for it.
    """
    position = np.arange(batch.context_lens.max())
    context = np.repeat(batch.context_lens, batch.query_lens)[:, None]  # [T, 1]
    if batch.mask is None:
        index = np.arange(len(batch.token_ids)) - np.repeat(batch.query_starts, batch.query_lens)
        ends = np.repeat(batch.context_lens - batch.query_lens, batch.query_lens) + index + 1
        visible = position < ends[:, None]
    else:
        visible = np.zeros((len(batch.token_ids), len(position)), bool)
        given = batch.mask[:, : len(position)]
        visible[:, : given.shape[1]] = given
        visible &= position < context
    if batch.query_lens.max() > 1:
        return np.where(visible, np.float32(0), np.float32(BLOCKED))
    if (visible != (position < context)).any():
        raise InputError("hides context from a sequence with one new token", where="spec_mask")
    return np.zeros((1, 1), np.float32)
