"""Compares the graphs of mindformers' TeleChat2 with ours, operator by operator, without an NPU.

python tools/compare_graphs.py RESEARCH_PARENT        (see tools/mindformers_seam.sh for the environment)

RESEARCH_PARENT holds the `research` folder of a mindformers r1.6.0 checkout, which has the model. Of each operator of
COMPARED, in the order of the graph, the constants, dtypes and trailing axes of every argument must be mindformers',
outside of graph_differences.yaml, where each difference that is meant stands with its reason; one that no longer
occurs fails, too.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import yaml
from mindspore.common.api import _cell_graph_executor

from telechat_mindie.config import TelechatConfig
from telechat_mindie.model.export import compiled_graph, rank_decoder
from telechat_mindie.model.kernels.ascend_graphs import JIT_CONFIG
from telechat_mindie.model.mindir import OperatorNode, Value, operator_nodes
from telechat_mindie.model.rope import RotaryTable
from telechat_mindie.model_dir.serving import LAYER_FORMS

REVIEWED = Path(__file__).with_name("graph_differences.yaml")
GRAPHS = ("prefill", "decode")
NUM_BLOCKS, BLOCK_SIZE, LONGEST = 64, 128, 2048

MOE = TelechatConfig(1024, 1024, 1, 8, 512, num_experts=16, experts_per_token=4)
MODELS = {
    "dense": (TelechatConfig(1024, 1024, 3, 8, 2048, num_kv_heads=2), "float16", True),
    "moe": (MOE, "bfloat16", True),
    "moe unpacked": (MOE, "bfloat16", False),
}
"""Shape, dtype, and whether mindformers packs q, k and v, as we do, and with them the experts' gate and up."""

COMPARED = (
    *("MatMul", "RmsNorm", "SplitWithSize", "ApplyRotaryPosEmb", "ReshapeAndCache"),
    *("FlashAttentionScore", "PagedAttention", "SiLU", "Swiglu"),
    *("MoeGatingTopKSoftmax", "MoeInitRouting", "MoeComputeExpertTokens", "GroupedMatmulV4", "MoeFinalizeRouting"),
)

Graphs = dict[str, list[OperatorNode]]


@dataclasses.dataclass(frozen=True)
class Difference:
    """What differs; `argument` is an index, or "arguments" or "calls" for their number."""

    model: str
    form: str
    graph: str
    operator: str
    argument: int | str
    theirs: str
    ours: str

    def __str__(self) -> str:
        where = f"{self.model}, {self.form}, {self.graph}: {self.operator}, {self.argument}"
        return f"{where}: mindformers {self.theirs}, ours {self.ours}"


def mindformers_graphs(config: TelechatConfig, dtype: str, packed: bool) -> Graphs:
    """mindformers' own inference model of this shape (research/telechat2/infer), compiled."""
    from mindformers.modules.transformer.moe import MoEConfig
    from research.telechat2.infer.telechat import ParallelTelechatForCausalLM  # type: ignore[import-not-found]
    from research.telechat2.telechat_config import TelechatConfig as TheirConfig  # type: ignore[import-not-found]

    moe = {}
    if config.is_moe:
        moe["moe_config"] = MoEConfig(
            expert_num=config.num_experts, num_experts_chosen=config.experts_per_token, routing_policy="TopkRouterV2"
        )
    theirs = TheirConfig(
        batch_size=1,
        seq_length=LONGEST,
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        n_kv_heads=config.num_kv_heads,
        vocab_size=config.vocab_size,
        rms_norm_eps=config.norm_eps,
        intermediate_size=config.ffn_size,
        **dict.fromkeys(("res_dtype", "compute_dtype", "rotary_dtype", "param_init_type"), dtype),
        **dict.fromkeys(("layernorm_compute_type", "softmax_compute_type"), "float32"),
        use_past=True,
        extend_method="None",
        use_flash_attention=True,
        block_size=BLOCK_SIZE,
        num_blocks=NUM_BLOCKS,
        is_dynamic=True,
        out_proj_has_bias=True,
        qkv_concat=packed,
        **moe,
    )
    theirs.checkpoint_name_or_path = None
    if config.is_moe:
        theirs.moe_config.moe_intermediate_size = config.ffn_size
        theirs.moe_config.norm_topk_prob = True
        theirs.moe_config.router_dense_type = theirs.router_dense_type = "float32"
    construct = ParallelTelechatForCausalLM.construct
    ParallelTelechatForCausalLM.construct = getattr(construct, "__wrapped__", construct)  # without an NPU's jit
    model = ParallelTelechatForCausalLM(theirs)
    model.set_train(False)
    model.phase = "predict"
    model.set_dynamic_inputs()
    inputs = model.get_inputs()
    graphs = {}
    for kind in GRAPHS:
        model.add_flags_custom(is_first_iteration=kind == "prefill")
        compiled, _ = _cell_graph_executor.compile(model, *inputs, phase=f"export.mindir.{kind}", do_convert=False)
        graphs[kind] = operator_nodes(_cell_graph_executor._get_func_graph_proto(model, compiled, "mind_ir"))
    return graphs


def our_graphs(config: TelechatConfig, dtype: str, layer_form: str) -> Graphs:
    rotary = RotaryTable.of(config, rotary_dtype=dtype)  # as in mindformers' yamls
    options: dict[str, Any] = {"rotary": rotary, "max_seq_len": LONGEST, "layer_form": layer_form}
    decoder = rank_decoder(config, 1, dtype, NUM_BLOCKS, BLOCK_SIZE, **options)
    return {kind: operator_nodes(compiled_graph(decoder, kind, external_cache=False)) for kind in GRAPHS}


def differences(model: str, form: str, theirs: Graphs, ours: Graphs) -> Iterator[Difference]:
    """What COMPARED operators' calls differ in."""
    for kind in GRAPHS:
        for operator in COMPARED:
            at = model, form, kind, operator
            calls, own = ([node for node in graphs[kind] if node.operator == operator] for graphs in (theirs, ours))
            if len(calls) != len(own):
                yield Difference(*at, "calls", str(len(calls)), str(len(own)))
                continue
            for their_call, our_call in zip(calls, own, strict=True):
                counts = len(their_call.arguments), len(our_call.arguments)
                if counts[0] != counts[1]:
                    yield Difference(*at, "arguments", *map(str, counts))
                pairs = zip(their_call.arguments, our_call.arguments, strict=False)
                for index, pair in enumerate(pairs):
                    if _essence(pair[0]) != _essence(pair[1]):
                        yield Difference(*at, index, *map(_written, pair))


def _essence(argument: Any) -> Any:
    """An argument without its name and leading axes: those of one, or of sizes that differ from call to call."""
    if isinstance(argument, Value):
        axes = argument.shape
        while axes and axes[0] in (None, 1):
            axes = axes[1:]
        return argument.dtype, axes
    if isinstance(argument, tuple):
        return tuple(map(_essence, argument))
    return round(argument, 9) if isinstance(argument, float) else argument


def _written(argument: Any) -> str:
    if isinstance(argument, tuple):
        return f"({', '.join(map(_written, argument))})"
    return str(argument).strip()


def judge(found: list[Difference], reviewed: list[dict[str, Any]]) -> list[str]:
    """What is wrong: differences that no entry of the list names, and entries that name none.

    An entry says `operator` and `argument`, `why`, and where it is narrower `model`, `form` and `graph`.
    """
    keys = ("model", "form", "graph", "operator", "argument")
    used = set()
    wrong = {}
    for difference in found:
        meant = [
            index
            for index, entry in enumerate(reviewed)
            if all(entry.get(key, getattr(difference, key)) == getattr(difference, key) for key in keys)
        ]
        used.update(meant)
        if not meant:
            wrong[str(difference)] = f"DIFFERENT  {difference}"
    stale = [f"STALE  {entry}" for index, entry in enumerate(reviewed) if index not in used]
    return [*wrong.values(), *stale]


def on_host(empty: Callable[..., ms.Tensor]) -> Callable[..., ms.Tensor]:
    """mint.empty for a machine without an NPU, on which mindformers allocates its weights."""

    def allocate(*shape: Any, dtype: Any = None, device: str | None = None, **rest: Any) -> ms.Tensor:
        sizes = shape[0] if isinstance(shape[0], (tuple, list)) else shape
        return ms.Tensor(np.zeros(sizes, np.float16)).astype(dtype)

    return allocate


def main(research_parent: str) -> None:
    os.environ["RUN_MODE"] = "predict"  # which mindformers reads when it is imported
    sys.path.insert(0, research_parent)
    ms.set_context(mode=ms.GRAPH_MODE, jit_config=JIT_CONFIG)
    ms.mint.empty = on_host(ms.mint.empty)
    found: list[Difference] = []
    for name, (config, dtype, packed) in MODELS.items():
        theirs = mindformers_graphs(config, dtype, packed)
        for form in LAYER_FORMS:
            ours = our_graphs(config, dtype, form)
            found += differences(name, form, theirs, ours)
            for kind in GRAPHS:
                print(f"{name}, {form}, {kind}: {len(theirs[kind])} nodes in mindformers, {len(ours[kind])} here")
    wrong = judge(found, yaml.safe_load(REVIEWED.read_text(encoding="utf-8")))
    print(f"{len(found)} differences, all of them reviewed" if not wrong else "\n".join(wrong))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main(sys.argv[1])
