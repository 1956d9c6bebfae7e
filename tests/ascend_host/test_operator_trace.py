"""The recorded operator calls are those that MindSpore compiles of the same Python."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from helpers.ascend_cases import BLOCK, NUM_BLOCKS, TRAINED, batch
from helpers.operator_trace import Recorder, Traced
from mindspore.common.api import _cell_graph_executor

from telechat_mindie.config import TelechatConfig
from telechat_mindie.model.export import rank_decoder
from telechat_mindie.model.kernels.ascend_graphs import JIT_CONFIG, AscendGraphs
from telechat_mindie.model.mindir import Value, operator_nodes
from telechat_mindie.model_dir.serving import LAYER_FORMS

DENSE = TelechatConfig(256, 256, 1, 4, 384, num_kv_heads=2)
MOE = TelechatConfig(256, 256, 1, 4, 384, num_experts=6, experts_per_token=3)

BATCHES = {
    "prefill": batch([3, 5], [3, 5]),
    "decode": batch([1, 1], [9, 300]),
    "history": batch([3, 1], [40, 7]),
    "drafts": batch([2, 3], [12, 5], tree=True),
}

COMPARED = frozenset(
    {
        *("MatMul", "RmsNorm", "SplitWithSize", "ApplyRotaryPosEmb", "ReshapeAndCache", "FlashAttentionScore"),
        *("PagedAttention", "Swiglu", "SiLU", "Mul", "Add", "Gather", "AllReduce", "AllGather", "GroupedMatmulV4"),
        *("MoeGatingTopKSoftmax", "MoeInitRouting", "MoeComputeExpertTokens", "MoeFinalizeRouting"),
    }
)
"""Operators that the compiler leaves as they are called."""


FLAT, SPLIT = LAYER_FORMS


@pytest.mark.parametrize(
    ("config", "tp", "form", "kind"),
    [
        (DENSE, 1, FLAT, "prefill"),
        (DENSE, 2, SPLIT, "decode"),
        (DENSE, 1, SPLIT, "history"),
        (DENSE, 1, FLAT, "drafts"),
        (MOE, 2, FLAT, "decode"),
    ],
)
def test_the_record_is_what_is_compiled(config: TelechatConfig, tp: int, form: str, kind: str) -> None:
    ms.set_context(mode=ms.GRAPH_MODE, jit_config=JIT_CONFIG)
    model = rank_decoder(config, tp, "bfloat16", NUM_BLOCKS, BLOCK, max_seq_len=TRAINED, layer_form=form)
    graphs = AscendGraphs(model, model.kernels.call_shape())
    (call,) = model.kernels.calls(BATCHES[kind])
    with Recorder() as recorder:
        trace = recorder.trace(graphs, call)
    assert trace.named["batch_valid_length"].values.tolist() == BATCHES[kind].context_lens.tolist()
    compiled, _ = _cell_graph_executor.compile(
        graphs.graphs[kind], call.token_ids, call.logits_rows, *call.inputs, phase="export.mindir", do_convert=False
    )
    data = _cell_graph_executor._get_func_graph_proto(graphs.graphs[kind], compiled, "mind_ir")
    found = sorted(_plain(node.operator, node.arguments) for node in operator_nodes(data))
    recorded = sorted(_plain(one.name, one.inputs) for one in trace.calls)
    assert [one for one in recorded if one[0] in COMPARED] == [one for one in found if one[0] in COMPARED]


def _plain(name: str, arguments: tuple[Any, ...]) -> tuple[str, str]:
    """Operator, and its tensors' dtypes and shapes, without what the compiler makes of numbers and lengths."""
    if name == "FlashAttentionScore":
        arguments = arguments[:7]
    return name, " ".join(f"{dtype}{list(shape)}" for dtype, shape in _tensors(arguments) if shape)


def _tensors(arguments: Any) -> Iterator[tuple[str, tuple[int | None, ...]]]:
    for one in arguments:
        if isinstance(one, (Traced, Value)):
            yield getattr(one, "kind", None) or one.dtype, one.shape
        elif isinstance(one, tuple):
            yield from _tensors(one)


def test_an_operator_without_a_rule_is_named() -> None:
    model = rank_decoder(DENSE, 1, "bfloat16", NUM_BLOCKS, BLOCK)
    (call,) = model.kernels.calls(BATCHES["decode"])
    model.kernels.swiglu = ms.ops.GeLU()
    graphs = AscendGraphs(model, model.kernels.call_shape())
    with Recorder() as recorder, pytest.raises(NotImplementedError, match="GeLU"):
        recorder.trace(graphs, call)
    assert np.asarray(ms.Tensor([1.0]) + 1).tolist() == [2.0]  # MindSpore's own again
