"""The decoder's kernels in Ascend's fused operators: float16 or bfloat16, dynamic shapes, every mode in one call.

Which operators, with which layouts and masks, follows mindformers' own TeleChat2 inference (research/telechat2/infer
and mindformers/modules/flash_attention.py, branch r1.6.0). What a comment calls the kernel's is from MindSpore's
plugin/device/ascend/kernel/internal.

Out of scope: chips whose cache is stored in the NZ layout (Atlas 300I Duo and the first 910), as for mindformers'
TeleChat2.
"""

from __future__ import annotations

import numpy as np
from mindspore import Parameter, Tensor, mint, nn, ops
from mindspore import dtype as mstype
from mindspore.ops import auto_generate as fused

from telechat_mindie.config import TelechatConfig
from telechat_mindie.dtypes import DTYPES, HALF_DTYPES
from telechat_mindie.errors import ConfigError, InputError
from telechat_mindie.kv_budget import BLOCK_SIZES
from telechat_mindie.model.batch import RaggedBatch
from telechat_mindie.model.kernels.ascend_batches import BLOCKED, draft_mask
from telechat_mindie.model.kernels.ascend_graphs import (
    DECODE,
    DRAFTS,
    FLAT,
    HISTORY,
    PREFILL,
    SPLIT,
    AscendCache,
    AscendCall,
    CallShape,
)
from telechat_mindie.model.kernels.checks import traced_check
from telechat_mindie.model.layout import flat, laid_out
from telechat_mindie.model.parameters import parameter_over
from telechat_mindie.model.rope import ResidentRotary, RotaryTable

HALF_TABLES = 2
"""ApplyRotaryPosEmb's cos_format: one row of cosines a token, the two halves of a head side by side (neox)."""

TRIANGLE = 128
"""FlashAttentionScore's kernel takes a mask of [128, 128] as one tile of the causal triangle, for any length."""

MAX_BLOCK = 128 * 128
"""PagedAttention holds a block of one head's keys on the chip: block size x head dimension may not exceed this."""

INDICES = ("int32",)
"""The kernels read lengths, slots and tables as 32-bit words, whatever the tensor's dtype says."""


class AscendKernels(nn.Cell):
    """See `interface.AscendKernelSet`.

    A call is one run of one of `ascend_graphs.GRAPHS`: a batch without history goes through FlashAttentionScore, any
    other through PagedAttention. Rotary tables and the masks that are always the same are parameters, on the device for
    good; what depends on the batch is a few integers a token, made on the host in `calls`; nothing in a graph waits for
    the device. Every fused operator is an attribute of this class and is called here alone.

    Layers have one of two forms. "flat": activations [T, h], gate and up through one Swiglu. "split": [B, 1, h] in
    decode and else [1, T, h], as mindformers has them, with SplitWithSize, SiLU and Mul. That is what MindSpore's pass
    InferenceMatmulSplit, on by default, fuses: Reshape, MatMul with a transposed weight, Reshape to three axes,
    SplitWithSize (ascend/optimizer/ir_fusion/inference_matmul_split_fusion.cc, GetSplitFusionPatternName and
    CheckSplitSize); with SiLU and Mul after it, its optional InferenceMatmulSplitSilu and InferenceGatedFFN as well.
    Which one is faster only a card can say.

    Args:
        config: the model's shape.
        tp: tensor parallel size; heads, kv heads and feed-forward are divided by it.
        cache: this rank's cache; its dtype is the dtype of all computing.
        rotary: gives the cosines and sines, handed over in float32 where that is its dtype, else in that of computing.
        max_seq_len: tokens of the longest sequence, which the tables go up to; by default the training length.
        layer_form: one of LAYER_FORMS.

    Raises:
        ConfigError: `tp` does not fit the model, or the operators cannot do its head dimension or block size.
        InputError: the cache's dtype is not one of HALF_DTYPES.
    """

    routes_experts = True

    def __init__(
        self,
        config: TelechatConfig,
        tp: int,
        cache: AscendCache,
        rotary: RotaryTable,
        *,
        max_seq_len: int | None = None,
        layer_form: str = FLAT,
    ) -> None:
        super().__init__(auto_prefix=False)
        config.check_tp(tp)
        self.weight_dtype(cache.dtype)
        _check_sizes(config.head_dim, cache.block_size)
        self.tp = tp
        self.layer_form = layer_form
        self.head_dim = config.head_dim
        self.heads = config.num_heads // tp
        self.kv_heads = config.num_kv_heads // tp
        self.query_width = self.heads * self.head_dim
        self.kv_width = self.kv_heads * self.head_dim
        self.ffn_width = config.ffn_size // tp
        self.block_size = cache.block_size
        self.num_experts = config.num_experts
        self.chosen = config.experts_per_token
        self.dtype = cache.dtype
        self.dtypes = (cache.dtype,)
        self.table_dtype = "float32" if rotary.dtype == "float32" else cache.dtype
        self.table_kind = getattr(mstype, self.table_dtype)
        self._resident = ResidentRotary(rotary, max_seq_len or config.training_seqlen)
        table_dtype = "float32" if self._resident.has_scale else self.table_dtype
        self.cos = _constant(self._resident.cos, table_dtype)
        self.sin = _constant(self._resident.sin, table_dtype)
        # The kernel multiplies a bfloat16 mask by its own large negative number.
        triangle = np.triu(np.full((TRIANGLE, TRIANGLE), 1.0 if self.dtype == "bfloat16" else BLOCKED), 1)
        self.triangle = _constant(triangle, self.dtype)
        # With one new token a sequence PagedAttention looks at no mask, but mindformers gives it one.
        self.no_mask = _constant(np.zeros((1, 1)), self.dtype)

        self.gather = ops.Gather()
        self.rms_norm = ops.RmsNorm(config.norm_eps)
        self.matmul = ops.MatMul(transpose_b=True)
        self.swiglu = fused.Swiglu()
        self.silu = fused.SiLU()
        # mint.split would give views, and the operators after it want contiguous tensors: a copy more of each.
        self.split = fused.SplitWithSize()
        self.rotate = ops.ApplyRotaryPosEmb(HALF_TABLES)
        self.write = fused.ReshapeAndCache()
        scale = config.head_dim**-0.5
        self.flash_attention = ops.operations.nn_ops.FlashAttentionScore(
            head_num=self.heads, scale_value=scale, next_tokens=0, input_layout="TH"
        )
        self.paged_attention = fused.PagedAttention(self.heads, scale, self.kv_heads)
        # Each new token sees its sequence up to itself: the last `query` rows of a triangle, and no mask in memory.
        self.causal_paged_attention = fused.PagedAttention(self.heads, scale, self.kv_heads, mask_mode="TRAPEZOIDAL")
        if config.is_moe:
            self.top_k_softmax = fused.MoeGatingTopKSoftmax()
            self.sort_by_expert = fused.MoeInitRouting()
            self.count_tokens = fused.MoeComputeExpertTokens()
            self.grouped_matmul = fused.GroupedMatmulV4()
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
        return CallShape(
            self.head_dim,
            self.kv_heads,
            self.block_size,
            self.dtype,
            self.layer_form,
            self._resident.has_scale,
            external_layers,
        )

    def embed(self, token_ids: Tensor, weight: Tensor) -> Tensor:
        return self.gather(weight, token_ids, 0)

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """The operator computes in float32 and rounds once, so that a weight of 16 bits costs nothing more."""
        traced_check("RmsNorm: weight", weight.shape, weight.dtype, (None,), self.dtypes)
        traced_check("RmsNorm: x", x.shape, x.dtype, (None, weight.shape[0]), self.dtypes, True)
        return self.rms_norm(x, weight)[0]

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        return laid_out(self.flat_linear(x, weight), x, weight.shape[0])

    def flat_linear(self, x: Tensor, weight: Tensor) -> Tensor:
        traced_check("MatMul: weight", weight.shape, weight.dtype, (None, None), self.dtypes)
        traced_check("MatMul: x", x.shape, x.dtype, (None, weight.shape[1]), self.dtypes, True)
        return self.matmul(flat(x, weight.shape[1]), weight)

    def linear_add(self, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        width = weight.shape[0]
        traced_check("Add: bias", bias.shape, bias.dtype, (width,), self.dtypes)
        traced_check("Add: residual", residual.shape, residual.dtype, (None, width), self.dtypes, True)
        return laid_out(self.flat_linear(x, weight) + bias, x, width) + residual

    def norm_linear(self, x: Tensor, norm_weight: Tensor, weight: Tensor) -> Tensor:
        return self.linear(self.norm(x, norm_weight), weight)

    def norm_swiglu(self, x: Tensor, norm_weight: Tensor, weight: Tensor) -> Tensor:
        """Swiglu takes the gate from the first half of the columns, as `w_gate_hidden` stores it."""
        both = self.norm_linear(x, norm_weight, weight)
        if self.layer_form == SPLIT:
            gate, up = self.split(both, (self.ffn_width, self.ffn_width), -1)
            return self.silu(gate) * up
        return self.swiglu(both, -1)

    def rotary_rows(self, positions: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
        """Cosines and sines [T, head_dim] of rows [T] of the tables, times `scale` [T] where there is one."""
        cos, sin = self.gather(self.cos, positions, 0), self.gather(self.sin, positions, 0)
        if scale is None:
            return cos, sin
        scale = scale.reshape(-1, 1)
        return ops.cast(cos * scale, self.table_kind), ops.cast(sin * scale, self.table_kind)

    def attention(self, qkv: Tensor, key_cache: Tensor, value_cache: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        """`inputs`: the graph's kind, cos and sin [T, head_dim], slots [T], context and query lengths [B], block tables
        [B, W] or None, mask [T, C] or None.

        In prefill the context is the new tokens themselves. Caches are [blocks, block_size, kv_heads, head_dim].
        """
        kind, cos, sin, slots, context_lens, query_lens, tables, mask = inputs
        self.check_attention(qkv, key_cache, value_cache, inputs)
        query, key, value = self.split(qkv, (self.query_width, self.kv_width, self.kv_width), -1)
        query, key = self.rotate(query, key, cos, sin, context_lens)
        written = self.write(key, value, key_cache, value_cache, slots)
        query = ops.depend(query, written)
        if kind == PREFILL:
            # Lengths, not the running sums that the operator's documentation speaks of: that is what the kernel reads.
            query, key, value = (
                flat(query, self.query_width),
                flat(key, self.kv_width),
                flat(value, self.kv_width),
            )
            found = self.flash_attention(
                query, key, value, None, None, None, self.triangle, None, query_lens, context_lens
            )[3]
        elif kind == DECODE:
            # Both kernels take a query of three axes; the custom one refuses two, which it reads as [batch, heads, ..].
            query = query.reshape(-1, 1, self.query_width)
            found = self.paged_attention(
                query, key_cache, value_cache, tables, context_lens, None, None, self.no_mask, query_lens
            )
        else:
            query = query.reshape(1, -1, self.query_width)
            if kind == HISTORY:
                found = self.causal_paged_attention(
                    query, key_cache, value_cache, tables, context_lens, None, None, None, query_lens
                )
            else:
                found = self.paged_attention(
                    query, key_cache, value_cache, tables, context_lens, None, None, mask, query_lens
                )
        return laid_out(found.reshape(-1, self.query_width), qkv, self.query_width)

    def check_attention(self, qkv: Tensor, key_cache: Tensor, value_cache: Tensor, inputs: tuple[Tensor, ...]) -> None:
        kind, cos, sin, slots, context_lens, query_lens, tables, mask = inputs
        packed = (None, self.query_width + 2 * self.kv_width)
        block = (None, self.block_size, self.kv_heads, self.head_dim)
        table = (None, self.head_dim)
        traced_check("attention: qkv", qkv.shape, qkv.dtype, packed, self.dtypes, self.layer_form == SPLIT)
        traced_check("ReshapeAndCache: key_cache", key_cache.shape, key_cache.dtype, block, self.dtypes)
        traced_check("ReshapeAndCache: value_cache", value_cache.shape, value_cache.dtype, block, self.dtypes)
        traced_check("ReshapeAndCache: slot_mapping", slots.shape, slots.dtype, (None,), INDICES)
        traced_check("ApplyRotaryPosEmb: cos", cos.shape, cos.dtype, table, (self.table_dtype,))
        traced_check("ApplyRotaryPosEmb: sin", sin.shape, sin.dtype, table, (self.table_dtype,))
        traced_check("attention: batch_valid_length", context_lens.shape, context_lens.dtype, (None,), INDICES)
        traced_check("attention: q_seq_lens", query_lens.shape, query_lens.dtype, (None,), INDICES)
        if kind != PREFILL:
            traced_check("PagedAttention: block_tables", tables.shape, tables.dtype, (None, None), INDICES)
        if kind == DRAFTS:
            traced_check("PagedAttention: attn_mask", mask.shape, mask.dtype, (None, None), self.dtypes)

    def routed_experts(self, x: Tensor, router: Tensor, gate: Tensor, up: Tensor, down: Tensor, bias: Tensor) -> Tensor:
        """This rank's part of the chosen experts' weighted sum: [T, h].

        x is [T, h], `router` [E, h] in float32, since a choice can turn on its last bits; `gate` and `up` [E, h, f],
        `down` [E, f, h]; `bias` [1, E, 1, h], down's, of which a rank adds one `tp`th, so that the sum over ranks has
        it once.
        """
        tokens, hidden = x.shape
        inner = gate.shape[2]
        traced_check("experts: x", x.shape, x.dtype, (None, router.shape[1]), self.dtypes)
        traced_check("experts: router", router.shape, router.dtype, (self.num_experts, None), ("float32",))
        traced_check("GroupedMatmulV4: gate", gate.shape, gate.dtype, (self.num_experts, hidden, None), self.dtypes)
        traced_check("GroupedMatmulV4: up", up.shape, up.dtype, (self.num_experts, hidden, inner), self.dtypes)
        traced_check("GroupedMatmulV4: down", down.shape, down.dtype, (self.num_experts, inner, hidden), self.dtypes)
        bias_shape = (1, self.num_experts, 1, hidden)
        traced_check("MoeFinalizeRouting: bias", bias.shape, bias.dtype, bias_shape, self.dtypes)

        logits = self.matmul(ops.cast(x, mstype.float32), router)
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

    def calls(self, batch: RaggedBatch) -> list[AscendCall]:
        """One run of the decoder for the whole batch.

        Raises:
            InputError: a mask hides context from a sequence's only new token, which the kernel cannot do.
        """
        mask = None if batch.mask is None else draft_mask(batch)
        longest = batch.query_lens.max()
        if mask is not None:
            kind = DRAFTS
        elif (batch.context_lens == batch.query_lens).all():
            kind = PREFILL
        else:
            kind = DECODE if longest == 1 else HISTORY
        lengths = batch.context_lens if longest == 1 else np.repeat(batch.context_lens, batch.query_lens)
        positions, scale = self._resident.rows(batch.positions, lengths)
        token_ids = batch.token_ids
        if self.layer_form == SPLIT:
            token_ids = token_ids.reshape((-1, 1) if kind == DECODE else (1, -1))
        inputs = (
            positions,
            batch.slots,
            batch.context_lens,
            batch.query_lens,
            scale,
            None if kind == PREFILL else batch.block_tables,
            None if mask is None else mask.astype(DTYPES[self.dtype].numpy),
        )
        return [
            AscendCall(
                _tensor(token_ids),
                _tensor(batch.logits_rows),
                tuple(None if array is None else _tensor(array) for array in inputs),
                np.arange(len(batch.logits_rows)),
                kind,
            )
        ]


def _tensor(array: np.ndarray) -> Tensor:
    return Tensor.from_numpy(np.ascontiguousarray(array))


def _constant(array: np.ndarray, dtype: str) -> Parameter:
    return parameter_over(_tensor(array.astype(DTYPES[dtype].numpy)))


def _check_sizes(head_dim: int, block_size: int) -> None:
    if head_dim % 16:
        raise ConfigError(
            "FlashAttentionScore cannot do this head dimension",
            where="hidden_size / n_head",
            expected="a multiple of 16",
            found=head_dim,
        )
    fitting = [size for size in BLOCK_SIZES if size * head_dim <= MAX_BLOCK]
    if block_size not in fitting:
        raise ConfigError(
            "PagedAttention cannot do this block size",
            where="cacheBlockSize",
            expected=f"one of {', '.join(map(str, fitting))} with head dimension {head_dim}",
            found=block_size,
        )
