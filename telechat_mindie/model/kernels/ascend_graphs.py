"""What stands around the Ascend kernels: the cache, and the graphs that a decoder is compiled into."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mindspore import Parameter, ParameterTuple, Tensor, mint, mutable, nn, ops
from mindspore import dtype as mstype
from mindspore.common.initializer import Zero

from telechat_mindie.model.kernels.interface import Call
from telechat_mindie.model.parameters import parameter_over
from telechat_mindie.model_dir.serving import LAYER_FORMS

PREFILL, DECODE, HISTORY, DRAFTS = "prefill", "decode", "history", "drafts"
GRAPHS = (PREFILL, DECODE, HISTORY, DRAFTS)
"""Prompts without history; one new token a sequence; several after a history (chunks, prefix hits, drafts in a row);
drafts that form a tree, with a mask."""

PHASES = {PREFILL: "prefill", DECODE: "increment", HISTORY: "increment", DRAFTS: "increment"}
"""MindSpore looks for these words in a graph's phase. With "increment" the runtime keeps kernels' shapes while the
inputs' are unchanged (DataPrepareActor::RecordInputAndConvertStatic), with either a Cell skips the check of its
arguments (nn/cell.py, _predict), and the fusion of MatMul with AllReduce tells the two apart. mindformers r1.6.0
generation/text_generator.py sets them."""

PLUGIN_GRAPHS = {
    "splitfuse": (HISTORY,),
    "prefix_cache": (HISTORY,),
    "la": (DRAFTS, HISTORY),
    "memory_decoding": (HISTORY,),
}
"""MindIE's plugin -> the graphs that its calls take beside prefill and decode. Drafts in a row, as all of
memory_decoding's and some of lookahead's are, are history."""

FLAT, SPLIT = LAYER_FORMS

JIT_CONFIG = {"jit_level": "O0", "infer_boost": "on"}
"""What these graphs are compiled under: kernel by kernel with MindSpore's internal kernels, the only ones that
ReshapeAndCache and PagedAttention have (mindformers r1.6.0 core/context/build_context.py:160-183). Without it MindSpore
2.7 refuses FlashAttentionScore's mask while it compiles, on any device."""


class AscendCache(nn.Cell):
    """Keys and values of every layer, each [num_blocks, block_size, kv_heads, head_dim], as the operators want them.

    Args:
        kv_heads: of this rank.
        on_device: allocate it on the NPU, without clearing it, since a slot is written before it is read; otherwise
            it is left to MindSpore's initialiser, which does nothing where a graph is only compiled.
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: str,
        on_device: bool = True,
    ) -> None:
        super().__init__(auto_prefix=False)
        self.block_size = block_size
        self.dtype = dtype
        shape, kind = (num_blocks, block_size, kv_heads, head_dim), getattr(mstype, dtype)

        def side(name: str) -> ParameterTuple:
            return ParameterTuple(
                [
                    parameter_over(mint.empty(shape, dtype=kind, device="Ascend"), f"{name}.{layer}")
                    if on_device
                    else Parameter(Tensor(None, kind, shape, Zero()), name=f"{name}.{layer}", requires_grad=False)
                    for layer in range(num_layers)
                ]
            )

        self.keys = side("key_cache")
        self.values = side("value_cache")


class DecoderGraph(nn.Cell):
    """The decoder as one of GRAPHS, for calls of that kind.

    The arguments' names matter: the attention kernels look up the graph inputs `batch_valid_length` and `q_seq_lens` by
    name and read the lengths there, on the host. `key_cache` and `value_cache`, every layer's, come from MindIE where
    it owns the cache (npu_mem_size -1).
    """

    def __init__(self, model: nn.Cell, kind: str) -> None:
        super().__init__(auto_prefix=False)
        self.model = model
        self.kernels = model.kernels
        self.kind = kind
        self.set_train(False)
        self.phase = PHASES[kind]

    def construct(
        self,
        token_ids: Tensor,
        logits_rows: Tensor,
        positions: Tensor,
        slot_mapping: Tensor,
        batch_valid_length: Tensor,
        q_seq_lens: Tensor,
        rotary_scale: Tensor | None = None,
        block_tables: Tensor | None = None,
        attention_mask: Tensor | None = None,
        key_cache: tuple[Tensor, ...] | None = None,
        value_cache: tuple[Tensor, ...] | None = None,
    ) -> Tensor:
        """Logits [R, vocabulary] in float32, the dtype that MindIE's sampler computes in."""
        cos, sin = self.kernels.rotary_rows(positions, rotary_scale)
        inputs = (self.kind, cos, sin, slot_mapping, batch_valid_length, q_seq_lens, block_tables, attention_mask)
        caches = None if key_cache is None else (key_cache, value_cache)
        return ops.cast(self.model(token_ids, logits_rows, inputs, caches), mstype.float32)


@dataclass(frozen=True)
class AscendCall(Call):
    """A run of one of the graphs; `inputs` are DecoderGraph's arguments from `positions` to `attention_mask`."""

    kind: str


@dataclass(frozen=True)
class CallShape:
    """What of a call's shapes is the same every time.

    Args:
        layer_form: one of LAYER_FORMS.
        has_scale: the rotary tables are scaled by token.
        external_layers: layers whose keys and values come as arguments; 0 where the model has its own cache.
    """

    head_dim: int
    kv_heads: int
    block_size: int
    dtype: str
    layer_form: str
    has_scale: bool
    external_layers: int = 0

    def inputs(self, kind: str) -> tuple[Tensor | tuple[Tensor, ...] | None, ...]:
        """The arguments of a DecoderGraph; a size is None where calls differ in it.

        Those are T tokens, R rows of logits, B sequences, W blocks and, for drafts, both axes of the mask.
        """
        tokens: tuple[int | None, ...] = (None,)
        if self.layer_form == SPLIT:
            tokens = (None, 1) if kind == DECODE else (1, None)
        arguments: list[Tensor | tuple[Tensor, ...] | None] = [
            _unknown(*tokens),  # token_ids
            _unknown(None),  # logits_rows
            _unknown(None),  # positions
            _unknown(None),  # slot_mapping
            _unknown(None),  # batch_valid_length
            _unknown(None),  # q_seq_lens
            _unknown(None, dtype="float32") if self.has_scale else None,
            None if kind == PREFILL else _unknown(None, None),  # block_tables
            _unknown(None, None, dtype=self.dtype) if kind == DRAFTS else None,
        ]
        if self.external_layers:
            block = (None, self.block_size, self.kv_heads, self.head_dim)
            caches = [_unknown(*block, dtype=self.dtype) for _ in range(self.external_layers)]
            arguments += [mutable(tuple(caches)), mutable(tuple(caches))]
        return tuple(arguments)


def _unknown(*shape: int | None, dtype: str = "int32") -> Tensor:
    return Tensor(shape=list(shape), dtype=getattr(mstype, dtype))


class AscendGraphs:
    """A decoder's graphs, each compiled at its first call and never again."""

    def __init__(self, model: nn.Cell, shape: CallShape) -> None:
        self.graphs = {kind: DecoderGraph(model, kind) for kind in GRAPHS}
        for kind, graph in self.graphs.items():
            graph.set_inputs(*shape.inputs(kind))

    def __call__(self, call: AscendCall, caches: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None) -> Tensor:
        """Logits [R, vocabulary] float32, on the device.

        Args:
            call: what `AscendKernels.calls` gave.
            caches: every layer's keys and values, each side `mutable`, where the model has none.
        """
        return self.graphs[call.kind](call.token_ids, call.logits_rows, *call.inputs, *(caches or ()))
