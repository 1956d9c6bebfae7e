"""What stands around the Ascend kernels: the cache, and the two graphs that a decoder is compiled into."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mindspore import Parameter, ParameterTuple, Tensor, mint, mutable, nn
from mindspore import dtype as mstype
from mindspore.common.initializer import Zero

TRIANGLE = 128
"""FlashAttentionScore's kernel takes a mask of [128, 128] as one tile of the causal triangle, for any length."""

DECODE_INPUTS = 7
"""Kernel inputs of a call with history: cos, sin, slots, context and query lengths, mask, block tables."""


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
        shape = (num_blocks, block_size, kv_heads, head_dim)
        self.keys = _parameters("key_cache", num_layers, shape, dtype, on_device)
        self.values = _parameters("value_cache", num_layers, shape, dtype, on_device)


def _parameters(name: str, count: int, shape: tuple[int, ...], dtype: str, on_device: bool) -> ParameterTuple:
    kind = getattr(mstype, dtype)
    return ParameterTuple(
        [
            Parameter(
                # Given without a name of its own: a parameter copies a tensor that anything else refers to.
                mint.empty(shape, dtype=kind, device="Ascend") if on_device else Tensor(None, kind, shape, Zero()),
                name=f"{name}.{layer}",
                requires_grad=False,
            )
            for layer in range(count)
        ]
    )


class DecoderGraph(nn.Cell):
    """The decoder for sequences without history, or, with block tables, for those that have some.

    The latter are decode, prefix hits, chunks and draft tokens. The arguments' names matter: the attention kernels look
    up the graph inputs `batch_valid_length` and `q_seq_lens` by name and read the lengths there, on the host.
    `key_cache` and `value_cache`, every layer's, come from MindIE where it owns the cache (npu_mem_size -1).
    """

    def __init__(self, model: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.model = model

    def construct(
        self,
        token_ids: Tensor,
        logits_rows: Tensor,
        cos: Tensor,
        sin: Tensor,
        slot_mapping: Tensor,
        batch_valid_length: Tensor,
        q_seq_lens: Tensor,
        attention_mask: Tensor,
        block_tables: Tensor | None = None,
        key_cache: tuple[Tensor, ...] | None = None,
        value_cache: tuple[Tensor, ...] | None = None,
    ) -> Tensor:
        inputs = (cos, sin, slot_mapping, batch_valid_length, q_seq_lens, attention_mask)
        tables = () if block_tables is None else (block_tables,)
        caches = None if key_cache is None else (key_cache, value_cache)
        return self.model(token_ids, logits_rows, inputs + tables, caches)


@dataclass(frozen=True)
class CallShape:
    """What of a call's shapes is the same every time.

    Args:
        table_dtype: of the cosines and sines.
        external_layers: layers whose keys and values come as arguments; 0 where the model has its own cache.
    """

    head_dim: int
    kv_heads: int
    block_size: int
    dtype: str
    table_dtype: str
    external_layers: int = 0

    def inputs(self, history: bool) -> tuple[Tensor | tuple[Tensor, ...] | None, ...]:
        """The arguments of DecoderGraph; a size is None where calls differ in it.

        Those are T tokens, R rows of logits, B sequences, W blocks and, in decode, both axes of the mask.
        """
        arguments: list[Tensor | tuple[Tensor, ...] | None] = [
            _unknown(None),  # token_ids
            _unknown(None),  # logits_rows
            _unknown(None, self.head_dim, dtype=self.table_dtype),  # cos
            _unknown(None, self.head_dim, dtype=self.table_dtype),  # sin
            _unknown(None),  # slot_mapping
            _unknown(None),  # batch_valid_length
            _unknown(None),  # q_seq_lens
        ]
        if history:
            arguments += [_unknown(None, None, dtype=self.dtype), _unknown(None, None)]
        else:
            arguments += [_unknown(TRIANGLE, TRIANGLE, dtype=self.dtype), None]
        if self.external_layers:
            block = (None, self.block_size, self.kv_heads, self.head_dim)
            caches = [_unknown(*block, dtype=self.dtype) for _ in range(self.external_layers)]
            arguments += [mutable(tuple(caches)), mutable(tuple(caches))]
        return tuple(arguments)


def _unknown(*shape: int | None, dtype: str = "int32") -> Tensor:
    return Tensor(shape=list(shape), dtype=getattr(mstype, dtype))


class AscendGraphs:
    """A decoder compiled twice, called with what `AscendKernels.calls` gives; neither graph is compiled again."""

    def __init__(self, model: nn.Cell, shape: CallShape) -> None:
        self.prefill = DecoderGraph(model)
        self.decode = DecoderGraph(model)
        self.prefill.set_inputs(*shape.inputs(history=False))
        self.decode.set_inputs(*shape.inputs(history=True))

    def __call__(
        self,
        token_ids: Tensor,
        logits_rows: Tensor,
        inputs: tuple[Tensor, ...],
        caches: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None,
    ) -> Tensor:
        history = len(inputs) == DECODE_INPUTS
        graph, arguments = (self.decode, inputs) if history else (self.prefill, (*inputs, None))
        external = () if caches is None else (mutable(tuple(caches[0])), mutable(tuple(caches[1])))
        return graph(token_ids, logits_rows, *arguments, *external)
