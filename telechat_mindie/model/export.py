"""A rank's Ascend graphs as MINDIR files, for every size on any machine: no NPU, no weights, little memory."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, cast

import mindspore as ms
from mindspore import Parameter, Tensor, ops
from mindspore.common.api import _cell_graph_executor
from mindspore.common.initializer import Zero
from mindspore.nn.utils import no_init_parameters

from telechat_mindie.checkpoint.mapping import mindformers_targets
from telechat_mindie.config import TelechatConfig
from telechat_mindie.errors import OutputError
from telechat_mindie.model.decoder import TelechatForCausalLM
from telechat_mindie.model.kernels.ascend import AscendKernels
from telechat_mindie.model.kernels.ascend_graphs import FLAT, GRAPHS, JIT_CONFIG, AscendCache, DecoderGraph
from telechat_mindie.model.mindir import GraphFile, Value, parse_mindir
from telechat_mindie.model.parallel import TensorParallel
from telechat_mindie.model.rope import RotaryTable
from telechat_mindie.staging import reporting_os_errors, write_file

WRITTEN_LAYERS = 2
"""Layers of a graph file: all of a model's are alike, and the second is there to show what one adds."""


@dataclasses.dataclass(frozen=True)
class GraphReport:
    """One graph: what it is called with, and the operators of each layer and of the rest of the model.

    `inputs` leaves out the caches, which are arguments where `external_cache`; `cache` is one of them.
    """

    path: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    cache: Value
    external_cache: bool
    layer_operators: dict[str, int]
    other_operators: dict[str, int]


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """What was exported. `parameters_per_rank` counts the elements of all `num_layers` layers and the embeddings;
    `rope_theta` is the base of the rotary tables, which are parameters."""

    name: str
    tp: int
    dtype: str
    layer_form: str
    num_layers: int
    written_layers: int
    parameters_per_rank: int
    rope_theta: float
    graphs: dict[str, GraphReport]

    def as_dict(self) -> dict[str, Any]:
        """For JSON; an axis whose size changes from call to call is null."""
        return dataclasses.asdict(self)

    def table(self) -> str:
        """For people: operators down, graphs across, then shapes."""
        lines = [
            f"{self.name}, tensor parallel {self.tp}, {self.dtype}: {self.parameters_per_rank:,} parameters a rank",
            f"The files hold {self.written_layers} of {self.num_layers} layers, which are alike, and no weights.",
            f"Layers are {self.layer_form}; the rotary tables are parameters, of base {self.rope_theta:,.0f}.",
            "",
        ]
        names = list(self.graphs)
        lines.append("operator".ljust(24) + "".join(f"{name + ' layer':>16}{name + ' rest':>16}" for name in names))
        columns = [
            counts for graph in self.graphs.values() for counts in (graph.layer_operators, graph.other_operators)
        ]
        for operator in sorted(set().union(*columns)):
            lines.append(operator.ljust(24) + "".join(f"{counts.get(operator, 0) or '':>16}" for counts in columns))
        lines.append("total".ljust(24) + "".join(f"{sum(counts.values()):>16}" for counts in columns))
        for name, graph in self.graphs.items():
            lines += ["", f"{name}: {graph.path}"]
            lines += [f"  in     {value}" for value in graph.inputs]
            owner = "an argument" if graph.external_cache else "the model's"
            lines.append(f"  cache  {graph.cache}, {owner}, written in place")
            lines += [f"  out    {value}" for value in graph.outputs]
        return "\n".join(lines)


def export(
    config: TelechatConfig,
    tp: int,
    out_dir: Path,
    dtype: str,
    name: str,
    *,
    num_blocks: int = 1024,
    block_size: int = 128,
    external_cache: bool = False,
    rotary: RotaryTable | None = None,
    max_seq_len: int | None = None,
    layer_form: str = FLAT,
    force: bool = False,
) -> ExportReport:
    """Write `name`_tp`tp`_`graph`.mindir of rank 0 for each of GRAPHS into `out_dir`, and report what the files hold.

    The graphs are the decoder's own, with dynamic shapes and two layers. Parameters are in the files by name, shape
    and dtype only; no weight is allocated here. Files of another form than the flat one have its name before the
    graph's.

    Args:
        config: the model's shape.
        tp: tensor parallel size.
        out_dir: made where it does not exist.
        dtype: "float16" or "bfloat16".
        name: of the model, for the file names.
        num_blocks: blocks of the key/value cache.
        block_size: tokens of a block.
        external_cache: keys and values come in with every call, as MindIE's npu_mem_size -1 has it.
        rotary: the tables; by default those of a directory that `build` makes.
        max_seq_len: tokens of the longest sequence, which the rotary tables go up to; by default the training length.
        layer_form: "flat" or "split", see AscendKernels.
        force: replace files that exist.

    Raises:
        ConfigError: the model cannot be split into `tp` ranks, or the operators cannot do its sizes.
        InputError: another dtype.
        OutputError: a file exists or cannot be written.
    """
    stem = f"{name}_tp{tp}" if layer_form == FLAT else f"{name}_tp{tp}_{layer_form}"
    paths = {kind: out_dir / f"{stem}_{kind}.mindir" for kind in GRAPHS}
    for path in paths.values():
        if path.exists() and not force:
            raise OutputError("exists already", where=path, advice="Use --force to replace it.")
    ms.set_context(mode=ms.GRAPH_MODE, jit_config=JIT_CONFIG)
    written = min(WRITTEN_LAYERS, config.num_layers)
    decoders = [
        rank_decoder(
            dataclasses.replace(config, num_layers=layers),
            tp,
            dtype,
            num_blocks,
            block_size,
            rotary=rotary,
            max_seq_len=max_seq_len,
            layer_form=layer_form,
        )
        for layers in sorted({1, written})
    ]
    with reporting_os_errors(out_dir):  # before the minutes that compiling takes
        out_dir.mkdir(parents=True, exist_ok=True)
    compiled = {kind: [compiled_graph(decoder, kind, external_cache) for decoder in decoders] for kind in GRAPHS}
    graphs = {}
    for kind, files in compiled.items():
        write_file(paths[kind], files[-1])
        graphs[kind] = _report(paths[kind], parse_mindir(files[0], kind), parse_mindir(files[-1], kind))
    parameters = sum(
        math.prod(target.rank_shape(tp))
        for target in mindformers_targets(config, qkv_concat=True, transposed_experts=config.is_moe)
    )
    return ExportReport(name, tp, dtype, layer_form, config.num_layers, written, parameters, config.rope_theta, graphs)


class NamedCollectives(TensorParallel):
    """The collectives of `size` ranks as graph nodes alone, without the communication group that ops.AllReduce needs.

    The nodes, their attributes and their shapes are those of MindSpore's own operators on Ascend.
    """

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, 1)
        self.size = size
        self._all_reduce = _collective("AllReduce", op="sum")
        self._all_gather = _collective("AllGather", rank_size=size)


def _collective(name: str, **attributes: Any) -> ops.Primitive:
    primitive = ops.Primitive(name)
    for key, value in {"group": "hccl_world_group", "fusion": 0, "index": 0, **attributes}.items():
        primitive.add_prim_attr(key, value)
    return primitive


def rank_decoder(
    config: TelechatConfig,
    tp: int,
    dtype: str,
    num_blocks: int,
    block_size: int,
    *,
    rotary: RotaryTable | None = None,
    max_seq_len: int | None = None,
    layer_form: str = FLAT,
) -> TelechatForCausalLM:
    """Rank 0's decoder whose parameters have a name, shape and dtype but no data."""
    AscendKernels.weight_dtype(dtype)
    config.check_tp(tp)

    def take(name: str, shape: tuple[int, ...], dtype: str = dtype) -> Parameter:
        return Parameter(Tensor(None, getattr(ms, dtype), shape, Zero()), requires_grad=False)

    kv_heads = config.num_kv_heads // tp
    with no_init_parameters():
        cache = AscendCache(
            config.num_layers, num_blocks, block_size, kv_heads, config.head_dim, dtype, on_device=False
        )
        rotary = rotary or RotaryTable.of(config)
        kernels = AscendKernels(config, tp, cache, rotary, max_seq_len=max_seq_len, layer_form=layer_form)
        return TelechatForCausalLM(config, take, kernels, NamedCollectives(0, tp), cache)


def compiled_graph(model: TelechatForCausalLM, kind: str, external_cache: bool) -> bytes:
    """The compiled graph, serialised. mindspore.export does the same and then writes every parameter's data."""
    graph, kernels = DecoderGraph(model, kind), cast(AscendKernels, model.kernels)
    shape = kernels.call_shape(external_layers=len(model.cache.keys) if external_cache else 0)
    inputs = shape.inputs(kind)
    graph.set_inputs(*inputs)
    compiled, _ = _cell_graph_executor.compile(graph, *inputs, phase="export.mindir", do_convert=False)
    data: bytes = _cell_graph_executor._get_func_graph_proto(graph, compiled, "mind_ir")
    return data


def _report(path: Path, one: GraphFile, written: GraphFile) -> GraphReport:
    """From the graph with one layer and the one with more: what a further layer adds, and what there is beside."""
    layer = written.operators - one.operators
    rest = one.operators - layer
    if not layer:  # a model of one layer: all of it counts as that layer's
        layer, rest = rest, layer
    own = [value for value in written.inputs if "_cache." not in value.name]
    caches = (value for value in (*written.parameters, *written.inputs) if value.name.endswith("key_cache.0"))
    return GraphReport(
        path=str(path),
        inputs=tuple(own),
        outputs=tuple(dataclasses.replace(value, name="logits") for value in written.outputs),
        cache=dataclasses.replace(next(caches), name="key and value of each layer"),
        external_cache=len(own) < len(written.inputs),
        layer_operators=dict(layer),
        other_operators=dict(rest),
    )
