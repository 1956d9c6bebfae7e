"""Every released size's Ascend graphs, exported without an NPU and read back from the files."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from helpers.json_schemas import checked
from typer.testing import CliRunner

from telechat_mindie.checkpoint.mapping import mindformers_targets
from telechat_mindie.cli import app
from telechat_mindie.config import TelechatConfig
from telechat_mindie.errors import ConfigError, InputError, OutputError
from telechat_mindie.model.export import ExportReport, export
from telechat_mindie.model.kernels.ascend_graphs import GRAPHS
from telechat_mindie.model.mindir import GraphFile, parse_mindir
from telechat_mindie.model_dir.build import BuildOptions, build
from telechat_mindie.nano import write_checkpoint
from telechat_mindie.variants import VARIANTS

CASES = {
    "7b tp1": ("7b", 1, "float16", "flat"),
    "35b tp2": ("35b", 2, "float16", "flat"),
    "115b tp8": ("115b", 8, "float16", "split"),
    "39b-a12b tp2": ("39b-a12b", 2, "bfloat16", "split"),
    "39b-a12b tp8": ("39b-a12b", 8, "bfloat16", "flat"),
}


def read_mindir(path: Path) -> GraphFile:
    return parse_mindir(path.read_bytes(), path)


PARAMETERS_PER_RANK = {
    "7b tp1": 7_617_351_680,
    "35b tp2": 17_718_319_104,
    "115b tp8": 14_163_124_224,
    "39b-a12b tp2": 19_667_202_048,
    "39b-a12b tp8": 4_920_029_184,
}

SCRIPT = """
import json, pathlib, sys
from telechat_mindie.model.export import export
from telechat_mindie.variants import VARIANTS
for case, (variant, tp, dtype, form) in json.loads(sys.argv[1]).items():
    report = export(VARIANTS[variant], tp, pathlib.Path(sys.argv[2]), dtype, variant, layer_form=form)
    # Not ru_maxrss, in which a process begins with the size of the one that started it.
    status = pathlib.Path("/proc/self/status").read_text()
    peak_bytes = int(status.partition("VmHWM:")[2].split()[0]) * 1024
    print(json.dumps([case, report.as_dict(), peak_bytes]))
"""


@dataclasses.dataclass
class Exported:
    """One case: the report, the most memory that it took, and the files as they are read here."""

    report: dict[str, Any]
    peak_bytes: int
    config: TelechatConfig
    tp: int
    dtype: str
    layer_form: str

    def graph(self, kind: str) -> GraphFile:
        return read_mindir(Path(self.report["graphs"][kind]["path"]))


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    """All cases in one process of their own, so that its memory is theirs alone."""
    target = tmp_path_factory.mktemp("mindir")
    command = [sys.executable, "-c", SCRIPT, json.dumps(CASES), str(target)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=580, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    found = {}
    for line in run.stdout.splitlines():
        if line.startswith("["):
            case, report, peak_bytes = json.loads(line)
            variant, *options = CASES[case]
            found[case] = Exported(report, peak_bytes, VARIANTS[variant], *options)
    return found


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest, exports: dict[str, Exported]) -> Exported:
    return exports[request.param]


def _published(moe: bool, tp: int, prefill: bool) -> Counter[str]:
    """The operators of one layer of mindformers' graph, read off the constructs of research/telechat2/infer, r1.6.0.

    In graph mode, with the switches of the published predict yamls (qkv_concat for dense models, not for the MoE);
    casts between equal dtypes are left out, they leave nothing in a graph.
    """
    count: Counter[str] = Counter()
    count.update(RmsNorm=2, Cast=4)  # norm.py: to float32 and back
    count.update(ApplyRotaryPosEmb=1, Contiguous=2)  # modules/infer_attention.py, InferRotaryEmbedding
    count.update(ReshapeAndCache=1, Contiguous=2)  # parallel_paged_attention_mgr.py
    if prefill:
        count.update(Reshape=3, Contiguous=3, FlashAttentionScore=1)  # modules/flash_attention.py
    else:
        count.update(PagedAttention=1)
    # Every linear of layers.py flattens its input and restores its shape; row linears of a rank add up (tp > 1).
    linears = 3 if moe else 2  # telechat_transformers.py: wq, wk_v, wo | w_qkv, wo
    count.update(MatMul=linears, Reshape=2 * linears, SplitWithSize=1, Add=1)
    count.update(Add=2)  # transformer.py: the residuals
    if moe:
        count.update(Reshape=3)  # key_value by heads, then keys and values back
        count.update(Reshape=2, Cast=1, MatMul=1, MoeGatingTopKSoftmax=1)  # moe.py, the router in float32
        count.update(MoeInitRouting=1, MoeComputeExpertTokens=1, Cast=1)
        count.update(ReduceSum=1, Add=1, Div=1, Cast=1)  # the chosen experts' weights
        count.update(StridedSlice=3, Sub=1)  # counts from running sums
        count.update(GroupedMatmulV4=3, Reshape=6, SiLU=1, Mul=1)
        count.update(Div=1, Cast=1, Reshape=1, Zeros=1, MoeFinalizeRouting=1)
    else:
        count.update(MatMul=2, Reshape=4, SplitWithSize=1, SiLU=1, Mul=1, Add=1)
    if tp > 1:
        count.update(AllReduce=2)
    return count


SAME = {"Divs": {"Div": 1}, "Swiglu": {"SplitWithSize": 1, "SiLU": 1, "Mul": 1}}
"""Operators of ours and what does the same in the published graph: a division by a number, and a fused one."""


@pytest.mark.slow
class TestReleasedSizes:
    def test_memory_is_not_the_models(self, case: Exported) -> None:
        assert case.peak_bytes < 3e9

    def test_inputs_have_mindies_dtypes_and_dynamic_axes(self, case: Exported) -> None:
        names = ("logits_rows", "positions", "slot_mapping", "batch_valid_length", "q_seq_lens")
        shared = dict.fromkeys(names, ("int32", (None,)))
        tables = {"block_tables": ("int32", (None, None))}
        own: dict[str, dict[str, Any]] = {
            "prefill": {},
            "decode": tables,
            "history": tables,
            "drafts": tables | {"attention_mask": (case.dtype, (None, None))},
        }
        for kind, others in own.items():
            tokens: tuple[int | None, ...] = (None,)
            if case.layer_form == "split":
                tokens = (None, 1) if kind == "decode" else (1, None)
            others = {**others, "token_ids": ("int32", tokens)}
            inputs = {value.name: (value.dtype, value.shape) for value in case.graph(kind).inputs}
            assert inputs == shared | others

    def test_logits_of_the_whole_vocabulary_in_float32(self, case: Exported) -> None:
        for kind in GRAPHS:
            (logits,) = case.graph(kind).outputs
            assert (logits.dtype, logits.shape) == ("float32", (None, 131072))

    def test_every_parameter_has_the_ranks_shape(self, case: Exported) -> None:
        two = dataclasses.replace(case.config, num_layers=2)
        targets = mindformers_targets(two, qkv_concat=not two.is_moe, transposed_experts=two.is_moe)
        expected = {target.name: target.rank_shape(case.tp) for target in targets}
        if two.is_moe:  # the decoder packs q, k and v of every model
            for layer in range(2):
                name = f"model.layers.{layer}.attention."
                query, key_value = expected.pop(f"{name}wq.weight"), expected.pop(f"{name}wk_v.weight")
                expected[f"{name}w_qkv.weight"] = (query[0] + key_value[0], query[1])
        cache = (1024, 128, two.num_kv_heads // case.tp, two.head_dim)
        constants = {
            "prefill": {"triangle": (128, 128)},
            "decode": {"no_mask": (1, 1)},
            "history": {},
            "drafts": {},
        }
        for kind in GRAPHS:
            parameters = case.graph(kind).parameters
            routers = {value for value in parameters if value.name.endswith("router.dense.weight")}
            assert {value.dtype for value in routers} <= {"float32"} and len(routers) == (2 if two.is_moe else 0)
            rotary = {value for value in parameters if value.name.endswith(("kernels.cos", "kernels.sin"))}
            assert {value.dtype for value in rotary} == {"float32"} and len(rotary) == 2
            assert {value.dtype for value in parameters if value not in routers | rotary} == {case.dtype}
            shapes = {value.name: value.shape for value in parameters}
            tables = dict.fromkeys(("cos", "sin"), (8192, two.head_dim))
            own = {name.partition("kernels.")[2]: shapes.pop(name) for name in list(shapes) if "kernels." in name}
            assert own == tables | constants[kind]
            caches = {name: shapes.pop(name) for name in list(shapes) if "_cache." in name}
            assert shapes == expected
            assert {name.split("cache.", 1)[1] for name in caches} == {
                f"{side}_cache.{layer}" for side in ("key", "value") for layer in range(2)
            }
            assert set(caches.values()) == {cache}

    def test_no_operator_more_than_the_published_layer_has(self, case: Exported) -> None:
        for kind, graph in case.report["graphs"].items():
            published = _published(case.config.is_moe, case.tp, kind == "prefill")
            published["Reshape"] += 2 if case.layer_form == "flat" else 0  # its query has three axes all along
            ours: Counter[str] = Counter()
            for operator, count in graph["layer_operators"].items():
                for name, times in SAME.get(operator, {operator: 1}).items():
                    ours[name] += times * count
            assert not ours - published
            assert sum(graph["layer_operators"].values()) < published.total()

    def test_fused_operators_and_nothing_that_waits_for_the_device(self, case: Exported) -> None:
        for kind in GRAPHS:
            attention = "FlashAttentionScore" if kind == "prefill" else "PagedAttention"
            operators = case.graph(kind).operators
            for operator in (attention, "ApplyRotaryPosEmb", "ReshapeAndCache"):
                assert operators[operator] == 2
            assert operators["RmsNorm"] == 5
            assert operators["AllReduce"] == (5 if case.tp > 1 else 0)
            assert operators["AllGather"] == (1 if case.tp > 1 else 0)
            if case.config.is_moe:
                assert operators["GroupedMatmulV4"] == 6
            elif case.layer_form == "flat":
                assert operators["Swiglu"] == 2
            else:
                assert (operators["SiLU"], operators["SplitWithSize"], operators["Swiglu"]) == (2, 4, 0)
            # FlashAttentionScore's lengths, once for all layers, as in the published graph.
            assert operators["TensorToTuple"] == (2 if kind == "prefill" else 0)
            waiting = {"TensorToScalar", "TupleToTensor", "ScalarToTensor", "NonZero", "Unique", "MaskedSelect"}
            assert not waiting & set(operators)

    def test_parameters_of_the_whole_model(self, exports: dict[str, Exported]) -> None:
        assert {name: case.report["parameters_per_rank"] for name, case in exports.items()} == PARAMETERS_PER_RANK
        for name, case in exports.items():
            # Only norms, router and the row linears' biases are on every rank.
            assert 0 <= PARAMETERS_PER_RANK[name] * case.tp / case.config.parameter_count - 1 < 1e-3


TINY = TelechatConfig(64, 64, 3, 4, 96, num_kv_heads=2)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> ExportReport:
    return export(TINY, 2, tmp_path_factory.mktemp("out") / "new", "bfloat16", "tiny", num_blocks=8, block_size=16)


class TestExport:
    def test_files_are_named_after_model_and_split(self, report: ExportReport) -> None:
        names = [Path(graph.path).name for graph in report.graphs.values()]
        assert names == [f"tiny_tp2_{kind}.mindir" for kind in GRAPHS]
        for graph in report.graphs.values():
            assert Path(graph.path).stat().st_mode & 0o777 == 0o640

    def test_figures(self, report: ExportReport) -> None:
        assert (report.num_layers, report.written_layers) == (3, 2)
        targets = mindformers_targets(TINY, qkv_concat=True, transposed_experts=False)
        assert report.parameters_per_rank == sum(math.prod(target.rank_shape(2)) for target in targets)
        decode = report.graphs["decode"]
        assert decode.cache.shape == (8, 16, 1, 16)
        read = read_mindir(Path(decode.path)).operators
        assert read == Counter({name: 2 * count for name, count in decode.layer_operators.items()}) + Counter(
            decode.other_operators
        )

    def test_the_base_of_the_tables(self, tmp_path: Path, report: ExportReport) -> None:
        """The tables are parameters, so the graphs are those of any base, and the report says which is meant."""
        given = export(dataclasses.replace(TINY, rope_theta=1e6), 2, tmp_path, "bfloat16", "tiny", max_seq_len=100)
        assert (report.rope_theta, given.as_dict()["rope_theta"]) == (1e4, 1e6)
        assert "of base 1,000,000" in given.table()
        for kind, graph in given.graphs.items():
            shapes = {value.name: value.shape for value in read_mindir(Path(graph.path)).parameters}
            assert shapes["model.kernels.cos"] == shapes["model.kernels.sin"] == (100, 16)
            assert graph.layer_operators == report.graphs[kind].layer_operators

    def test_both_forms_of_a_layer_side_by_side(self, tmp_path: Path) -> None:
        flat, split = (
            export(TINY, 2, tmp_path, "float16", "tiny", layer_form=form, block_size=16) for form in ("flat", "split")
        )
        assert len(list(tmp_path.iterdir())) == 2 * len(GRAPHS)
        assert Path(split.graphs["decode"].path).name == "tiny_tp2_split_decode.mindir"
        assert "Layers are split" in split.table()
        for kind in GRAPHS:
            fused, apart = (report.graphs[kind].layer_operators for report in (flat, split))
            assert (fused["Swiglu"], "SiLU" in fused, fused["SplitWithSize"]) == (1, False, 1)
            assert ("Swiglu" in apart, apart["SiLU"], apart["Mul"], apart["SplitWithSize"]) == (False, 1, 1, 2)
            assert fused["MatMul"] == apart["MatMul"] == 4

    def test_json_and_table(self, report: ExportReport) -> None:
        data = checked("export", json.loads(json.dumps(report.as_dict())))
        assert data["graphs"]["prefill"]["inputs"][0] == {"name": "token_ids", "dtype": "int32", "shape": [None]}
        table = report.table()
        assert "The files hold 2 of 3 layers" in table
        assert "logits float32 [*, 64]" in table
        row = next(line.split() for line in table.splitlines() if line.startswith("MatMul"))
        assert row == ["MatMul", *("4", "1") * len(GRAPHS)]

    def test_caches_that_mindie_owns_are_arguments(self, tmp_path: Path, report: ExportReport) -> None:
        given = export(TINY, 2, tmp_path, "bfloat16", "tiny", block_size=16, external_cache=True)
        for kind, graph in given.graphs.items():
            read = read_mindir(Path(graph.path))
            caches = {value.name: (value.dtype, value.shape) for value in read.inputs if "_cache" in value.name}
            names = [f"{side}_cache.{layer}" for side in ("key", "value") for layer in range(2)]
            assert caches == dict.fromkeys(names, ("bfloat16", (None, 16, 1, 16)))
            assert not any("_cache" in value.name for value in read.parameters)
            assert graph.external_cache
            assert graph.inputs == report.graphs[kind].inputs
            assert graph.layer_operators == report.graphs[kind].layer_operators
        assert "cache  key and value of each layer bfloat16 [*, 16, 1, 16], an argument" in given.table()

    def test_a_model_of_one_layer(self, tmp_path: Path) -> None:
        report = export(dataclasses.replace(TINY, num_layers=1), 1, tmp_path, "float16", "one")
        assert report.written_layers == 1
        assert report.graphs["decode"].layer_operators["PagedAttention"] == 1
        assert report.graphs["decode"].other_operators == {}

    def test_existing_files_are_kept(self, tmp_path: Path) -> None:
        kept = tmp_path / "tiny_tp1_decode.mindir"
        kept.write_text("mine")
        with pytest.raises(OutputError, match=r"tiny_tp1_decode.mindir: exists already.*--force"):
            export(TINY, 1, tmp_path, "float16", "tiny")
        assert [path.name for path in tmp_path.iterdir()] == [kept.name]
        export(TINY, 1, tmp_path, "float16", "tiny", force=True)
        assert len(read_mindir(kept).inputs) == 7

    def test_a_directorys_graphs_have_its_own_tables_and_blocks(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, report: ExportReport
    ) -> None:
        write_checkpoint(tmp_path / "nano")
        build(tmp_path / "model", tmp_path / "nano", BuildOptions(block_size=32))
        yaml = next((tmp_path / "model").glob("*.yaml"))
        text = yaml.read_text().replace("rotary_dtype: 'float32'", "rotary_dtype: 'float16'")
        yaml.write_text(text.replace("extend_method: 'DYNAMIC_NTK'", "extend_method: 'None'"))
        given: dict[str, Any] = {}
        monkeypatch.setattr(
            "telechat_mindie.model.export.export", lambda *_, **options: given.update(options) or report
        )
        result = CliRunner().invoke(app, ["export", str(tmp_path / "model")])
        assert result.exit_code == 0, result.exception
        rotary = given["rotary"]
        assert (rotary.dtype, rotary.extension(1 << 20), given["block_size"]) == ("float16", (1.0, 1.0), 32)

    @pytest.mark.parametrize(
        ("tp", "dtype", "block_size", "error", "message"),
        [
            (4, "float16", 16, ConfigError, "tensor parallel size: .*expected one of 1, 2, found 4"),
            (1, "float32", 16, InputError, "expected float16 or bfloat16, found float32"),
            (1, "int8", 16, InputError, "found int8"),
            (1, "float16", 20, ConfigError, "cacheBlockSize"),
        ],
    )
    def test_misuse_leaves_nothing(
        self, tmp_path: Path, tp: int, dtype: str, block_size: int, error: type[Exception], message: str
    ) -> None:
        with pytest.raises(error, match=message):
            export(TINY, tp, tmp_path / "out", dtype, "tiny", block_size=block_size)
        assert not list(tmp_path.iterdir())

    def test_a_target_that_cannot_be_made(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(OutputError, match="cannot be written"):
            export(TINY, 1, tmp_path / "file" / "out", "float16", "tiny")


@pytest.mark.parametrize("content", [b"not a graph", b"", b"\x08\x01"])
def test_other_files_are_not_read_as_graphs(content: bytes) -> None:
    with pytest.raises(InputError, match=r"x.mindir: (is not a MINDIR file|holds no graph)"):
        parse_mindir(content, "x.mindir")
