"""The Ascend kernels: what they hand to the operators, checked against the CPU kernels with the operators emulated."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from helpers import ascend_cases
from helpers.ascend_operators import emulate
from hypothesis import given, settings
from hypothesis import strategies as st
from mindspore import Parameter, Tensor, nn
from mindspore.common.api import _cell_graph_executor

from telechat_mindie.config import TelechatConfig
from telechat_mindie.errors import ConfigError, InputError, TelechatMindieError
from telechat_mindie.model.batch import RaggedBatch
from telechat_mindie.model.decoder import TelechatForCausalLM
from telechat_mindie.model.kernels import ascend_graphs
from telechat_mindie.model.kernels.ascend import AscendKernels
from telechat_mindie.model.kernels.ascend_batches import BLOCKED, first_batch
from telechat_mindie.model.kernels.ascend_graphs import (
    DECODE,
    DRAFTS,
    GRAPHS,
    HISTORY,
    JIT_CONFIG,
    PREFILL,
    AscendCache,
    AscendCall,
    AscendGraphs,
    DecoderGraph,
)
from telechat_mindie.model.kernels.checks import check_tensor
from telechat_mindie.model.kernels.cpu import CpuKernels
from telechat_mindie.model.kv_cache import KVCache
from telechat_mindie.model.parallel import TensorParallel
from telechat_mindie.model.rope import RotaryTable


@pytest.fixture(scope="module", autouse=True)
def context() -> None:
    ms.set_context(jit_config=JIT_CONFIG)


BLOCK = 16
DENSE = TelechatConfig(64, 64, 2, 4, 96, num_kv_heads=2)
MOE = TelechatConfig(64, 64, 2, 4, 48, num_experts=6, experts_per_token=3)


def _batch(
    query_lens: list[int], context_lens: list[int], seed: int = 0, mask: np.ndarray | None = None, rows: str = "all"
) -> RaggedBatch:
    """Sequences on shuffled blocks of a cache of 32; the same lengths and seed give the same blocks."""
    rng = np.random.default_rng(seed)
    blocks = rng.permutation(32)
    width = 32 // len(query_lens)
    tables = blocks[: width * len(query_lens)].reshape(len(query_lens), width).astype(np.int32)
    positions = np.concatenate([np.arange(c - q, c) for q, c in zip(query_lens, context_lens, strict=True)])
    sequence = np.repeat(np.arange(len(query_lens)), query_lens)
    slots = tables[sequence, positions // BLOCK] * BLOCK + positions % BLOCK
    last = np.cumsum(query_lens) - 1
    return RaggedBatch(
        token_ids=rng.integers(0, 64, len(positions)).astype(np.int32),
        positions=positions.astype(np.int32),
        slots=slots.astype(np.int32),
        query_lens=np.asarray(query_lens, np.int32),
        context_lens=np.asarray(context_lens, np.int32),
        block_tables=tables,
        logits_rows=(np.arange(len(positions)) if rows == "all" else last).astype(np.int32),
        mask=mask,
    )


def _cache(config: TelechatConfig, dtype: str = "float16", block_size: int = BLOCK, blocks: int = 32) -> AscendCache:
    return AscendCache(
        config.num_layers, blocks, block_size, config.num_kv_heads, config.head_dim, dtype, on_device=False
    )


def _kernels(
    config: TelechatConfig = DENSE, dtype: str = "float16", rotary_dtype: str = "float32", **options: Any
) -> AscendKernels:
    rotary = RotaryTable(config.head_dim, rotary_dtype=rotary_dtype)
    return AscendKernels(config, 1, _cache(config, dtype), rotary, **options)


def _call(batch: RaggedBatch, **options: Any) -> AscendCall:
    (call,) = _kernels(**options).calls(batch)
    return call


def _values(call: AscendCall) -> dict[str, np.ndarray]:
    names = ("positions", "slots", "context_lens", "query_lens", "scale", "block_tables", "mask")
    pairs = zip(names, call.inputs, strict=True)
    return {name: tensor.asnumpy() for name, tensor in pairs if tensor is not None}


def _tensors(call: AscendCall) -> list[Tensor]:
    """What a call brings to the device."""
    return [call.token_ids, call.logits_rows, *(tensor for tensor in call.inputs if tensor is not None)]


class TestCalls:
    def test_without_history_the_context_is_the_prompt(self) -> None:
        batch = _batch([3, 5], [3, 5], rows="last")
        call = _call(batch)
        assert call.kind == PREFILL
        values = _values(call)
        assert values.keys() == {"positions", "slots", "context_lens", "query_lens"}
        assert values["positions"].tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
        assert values["slots"].tolist() == batch.slots.tolist()
        assert values["context_lens"].tolist() == values["query_lens"].tolist() == [3, 5]
        assert call.logits_rows.asnumpy().tolist() == [2, 7]
        assert call.rows.tolist() == [0, 1]

    @pytest.mark.parametrize(
        ("query_lens", "context_lens", "kind"),
        [([1, 1], [9, 30], DECODE), ([2], [9], HISTORY), ([1, 1, 5], [9, 4, 30], HISTORY), ([1, 5], [9, 5], HISTORY)],
    )
    def test_history_needs_no_mask(self, query_lens: list[int], context_lens: list[int], kind: str) -> None:
        call = _call(_batch(query_lens, context_lens))
        assert call.kind == kind
        values = _values(call)
        assert values.keys() == {"positions", "slots", "context_lens", "query_lens", "block_tables"}
        assert values["block_tables"].shape == (len(query_lens), 32 // len(query_lens))

    def test_every_index_is_a_32_bit_word(self) -> None:
        for batch in (_batch([4], [4]), _batch([1, 1], [9, 30]), _batch([1, 3], [9, 30])):
            call = _call(batch)
            assert {tensor.dtype for tensor in _tensors(call)} == {ms.int32}

    @pytest.mark.parametrize(("dtype", "blocked"), [("float16", BLOCKED), ("bfloat16", 1.0)])
    def test_the_triangle_is_what_the_kernel_takes(self, dtype: str, blocked: float) -> None:
        mask = _kernels(dtype=dtype).triangle.asnumpy().astype(np.float32)
        assert (mask == np.triu(np.full((128, 128), blocked), 1)).all()

    def test_tables_in_float32_where_asked(self) -> None:
        kernels = _kernels()
        assert kernels.cos.dtype == kernels.sin.dtype == ms.float32
        assert kernels.cos.shape == (8192, 16)
        assert (kernels.cos.asnumpy()[:, :8] == kernels.cos.asnumpy()[:, 8:]).all()
        assert _kernels(rotary_dtype="float16", dtype="bfloat16").cos.dtype == ms.bfloat16

    def test_tokens_that_are_not_kept_stay_so(self) -> None:
        batch = _batch([3], [3])
        batch.slots[1:] = -1  # as MindIE's warm-up
        assert _values(_call(batch))["slots"].tolist()[1:] == [-1, -1]

    def test_split_layers_have_an_axis_more(self) -> None:
        for batch, shape in ((_batch([4], [4]), (1, 4)), (_batch([1, 1], [9, 30]), (2, 1)), (_batch([2], [9]), (1, 2))):
            assert _call(batch).token_ids.shape == (len(batch.token_ids),)
            assert _call(batch, layer_form="split").token_ids.shape == shape

    def test_a_tree_of_drafts_keeps_its_mask(self) -> None:
        seen = np.zeros((4, 12), bool)
        seen[:3, :5] = True  # three drafts after 5 tokens; the third follows the first
        seen[0, 5] = seen[1, 6] = True
        seen[2, [5, 7]] = True
        seen[3, :9] = True
        call = _call(_batch([3, 1], [8, 9], mask=seen))
        assert call.kind == DRAFTS
        mask = _values(call)["mask"]
        assert mask.dtype == np.float16 and mask.shape == (4, 9)
        assert ((mask == 0) == seen[:, :9]).all()
        assert (mask[~seen[:, :9]] == BLOCKED).all()

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 40)), min_size=1, max_size=4), st.integers(0, 3))
    def test_drafts_in_a_row_are_history(self, lens: list[tuple[int, int]], wider: int) -> None:
        """A mask that says what causality says is not uploaded, whatever its width."""
        queries = [query for query, _ in lens]
        contexts = [query + past for query, past in lens]
        ends = np.concatenate([past + 1 + np.arange(query) for query, past in lens])
        mask = np.arange(max(contexts) + wider) < ends[:, None]
        call = _call(_batch(queries, contexts, mask=mask))
        assert call.kind != DRAFTS and "mask" not in _values(call)
        assert call.kind == _call(_batch(queries, contexts)).kind

    def test_a_mask_that_the_kernel_would_ignore_is_refused(self) -> None:
        seen = np.ones((2, 9), bool)
        seen[1, 3] = False
        with pytest.raises(InputError, match="hides context"):
            _call(_batch([1, 1], [9, 9], mask=seen))
        seen[1, 3] = True
        assert _call(_batch([1, 1], [9, 9], mask=seen)).kind == DECODE

    def test_the_first_batches_are_of_their_graphs_and_write_nothing(self) -> None:
        for kind in (DECODE, HISTORY, DRAFTS):
            batch = first_batch(kind)
            assert _call(batch).kind == kind
            assert (batch.slots == -1).all() and (batch.block_tables == 0).all()


class TestUploads:
    """What a call brings to the device, in bytes: the same for every size of model."""

    @pytest.mark.parametrize(
        ("query_lens", "context_lens", "most"),
        [
            ([1] * 32, [8192] * 32, 64 << 10),
            ([1] * 200, [32768] * 200, 256 << 10),
            ([2048], [8192], 1 << 20),
            ([2048], [32768], 1 << 20),
            ([8192], [8192], 1 << 20),
            ([1] * 100 + [512], [4096] * 101, 1 << 20),
        ],
    )
    @pytest.mark.parametrize("training", [8192, 4096])
    def test_bytes(self, query_lens: list[int], context_lens: list[int], most: int, training: int) -> None:
        """With a training length of 4096 the longer sequences' tables are stretched and scaled."""
        rotary = RotaryTable(16, training, training)
        kernels = AscendKernels(DENSE, 1, _cache(DENSE), rotary, max_seq_len=32768)
        (call,) = kernels.calls(ascend_cases.batch(query_lens, context_lens))
        assert sum(tensor.nbytes for tensor in _tensors(call)) <= most


@pytest.fixture
def pynative() -> Iterator[None]:
    yield from _in_mode(ms.PYNATIVE_MODE)


@pytest.fixture
def graph_mode() -> Iterator[None]:
    yield from _in_mode(ms.GRAPH_MODE)


def _in_mode(mode: int) -> Iterator[None]:
    before = ms.get_context("mode")
    ms.set_context(mode=mode)
    yield
    ms.set_context(mode=before)


class Weights:
    """The same random weights for every decoder that asks, rounded to float16."""

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype
        self.asked: dict[str, str] = {}

    def __call__(self, name: str, shape: tuple[int, ...], dtype: str = "") -> Parameter:
        self.asked[name] = dtype
        rng = np.random.default_rng(list(name.encode()))
        array = rng.normal(0, 1 if "embedding" in name else shape[-1] ** -0.5, shape)
        if name.endswith("norm.weight") or "norm_out" in name:
            array = 1 + array / 4
        return Parameter(Tensor(array.astype(np.float16).astype(dtype or self.dtype)), requires_grad=False)


# Prompts; then a decode, a chunk, and a prefix hit together with one more prompt; then drafts that form a tree.
TREE = np.zeros((5, 14), bool)
TREE[:3, :10] = TREE[3, :7] = TREE[4, :6] = True
TREE[0, 10] = TREE[1, 11] = TREE[2, 10] = TREE[2, 12] = TREE[4, 6] = True
STEPS = [
    _batch([9, 6, 4, 2], [9, 6, 4, 2], seed=3, rows="last"),
    _batch([1, 1, 1, 1], [10, 7, 5, 3], seed=3),
    _batch([1, 7, 20, 5], [11, 14, 25, 5], seed=3, rows="last"),
    _batch([3, 1, 1, 1], [13, 8, 6, 4], seed=3, mask=np.concatenate([TREE, np.arange(14) < 4 + np.zeros((1, 1))])),
]


@pytest.mark.usefixtures("pynative")
@pytest.mark.parametrize("layer_form", ["flat", "split"])
@pytest.mark.parametrize("config", [DENSE, MOE], ids=["gqa", "moe"])
def test_equals_the_cpu_kernels_in_every_mode(config: TelechatConfig, layer_form: str) -> None:
    """The training length is 12, so that some of the sequences have tables of their own."""
    cache, rotary = _cache(config), RotaryTable(config.head_dim, 12, 6)
    ascend = emulate(AscendKernels(config, 1, cache, rotary, max_seq_len=40, layer_form=layer_form))
    weights = Weights("float16")
    graphs = AscendGraphs(
        TelechatForCausalLM(config, weights, ascend, TensorParallel(), cache), ascend.call_shape(external_layers=0)
    )
    assert {dtype for name, dtype in weights.asked.items() if "router" in name} <= {"float32"}
    assert not any(dtype for name, dtype in weights.asked.items() if "router" not in name)
    rows = KVCache(config.num_layers, 32, BLOCK, config.kv_size, np.dtype(np.float32))
    cpu = CpuKernels(config, 1, rows, rotary)
    reference = TelechatForCausalLM(config, Weights("float32"), cpu, TensorParallel(), rows)
    kinds = set()
    for batch in STEPS:
        expected = np.empty((len(batch.logits_rows), config.vocab_size), np.float32)
        for part in cpu.calls(batch):
            out = reference(part.token_ids, part.logits_rows, part.inputs).asnumpy()
            expected[part.rows] = out[: len(part.rows)]
        (call,) = ascend.calls(batch)
        kinds.add(call.kind)
        found = graphs(call)
        assert found.dtype == ms.float32
        assert np.abs(found.asnumpy() - expected).max() < 0.02 * np.abs(expected).max()
    assert kinds == set(GRAPHS)


@pytest.mark.usefixtures("pynative")
def test_the_ranks_parts_of_the_experts_add_up() -> None:
    """Gate and up cut by columns, down by rows, down's bias whole on every rank."""
    rng = np.random.default_rng(5)

    def tensor(*shape: int) -> Tensor:
        return Tensor(rng.normal(0, shape[-1] ** -0.5, shape).astype(np.float16))

    x, router, bias = tensor(7, 64), tensor(6, 64).astype(ms.float32), tensor(1, 6, 1, 64)
    gate, up, down = tensor(6, 64, 48), tensor(6, 64, 48), tensor(6, 48, 64)
    whole = emulate(_kernels(MOE)).routed_experts(x, router, gate, up, down, bias).asnumpy()
    half = emulate(AscendKernels(MOE, 2, _cache(MOE), RotaryTable(16)))
    parts = [
        half.routed_experts(x, router, gate[:, :, part], up[:, :, part], down[:, part], bias).asnumpy()
        for part in (slice(0, 24), slice(24, 48))
    ]
    assert np.abs(whole).max() > 0.1
    assert np.abs(parts[0] + parts[1] - whole).max() < 2e-3


class Probe(nn.Cell):
    """One kernel's method as a graph of its own."""

    def __init__(self, kernels: AscendKernels, method: str) -> None:
        super().__init__()
        self.run = getattr(kernels, method)

    def construct(self, *tensors: Tensor) -> Tensor:
        return self.run(*tensors)


class AttentionProbe(nn.Cell):
    def __init__(self, kernels: AscendKernels, kind: str) -> None:
        super().__init__()
        self.kernels = kernels
        self.kind = kind

    def construct(
        self,
        qkv: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        cos: Tensor,
        sin: Tensor,
        slots: Tensor,
        context_lens: Tensor,
        query_lens: Tensor,
        tables: Tensor,
        mask: Tensor,
    ) -> Tensor:
        inputs = (self.kind, cos, sin, slots, context_lens, query_lens, tables, mask)
        return self.kernels.attention(qkv, key_cache, value_cache, inputs)


def _trace(cell: nn.Cell, *tensors: Tensor) -> None:
    _cell_graph_executor.compile(cell, *tensors, phase="export.mindir", do_convert=False)


def _dynamic(*shape: int | None, dtype: str = "float16") -> Tensor:
    return Tensor(shape=list(shape), dtype=getattr(ms, dtype))


ATTENTION = {
    "qkv": ((None, 128), "float16"),
    "key_cache": ((32, 16, 2, 16), "float16"),
    "value_cache": ((32, 16, 2, 16), "float16"),
    "cos": ((None, 16), "float16"),
    "sin": ((None, 16), "float16"),
    "slot_mapping": ((None,), "int32"),
    "batch_valid_length": ((None,), "int32"),
    "q_seq_lens": ((None,), "int32"),
    "block_tables": ((None, None), "int32"),
    "attn_mask": ((None, None), "float16"),
}
"""DENSE's arguments of the attention kernel, for drafts."""

WRONG_ATTENTION = [
    ("qkv", (None, 120), "float16"),
    ("qkv", (1, None, 128), "float16"),
    ("qkv", (None, 128), "float32"),
    ("key_cache", (512, 32), "float16"),  # the CPU's layout
    ("key_cache", (32, 16, 4, 16), "float16"),
    ("value_cache", (32, 32, 2, 16), "float16"),
    ("value_cache", (32, 16, 2, 16), "bfloat16"),
    ("cos", (None, 8), "float16"),
    ("sin", (None, 16), "float32"),
    ("slot_mapping", (None,), "int64"),
    ("slot_mapping", (None, None), "int32"),
    ("batch_valid_length", (None,), "int64"),
    ("q_seq_lens", (None,), "float16"),
    ("attn_mask", (None, None), "float32"),
    ("block_tables", (None,), "int32"),
    ("block_tables", (None, None), "int64"),
]


@pytest.fixture
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # MindSpore leaves its analysis of a failed graph in the working directory


@pytest.mark.usefixtures("in_tmp_path")
class TestMisuse:
    """Refused while the graph is traced, with the operator's and the argument's names."""

    @pytest.mark.parametrize("kind", GRAPHS)
    def test_right_arguments_pass(self, kind: str) -> None:
        arguments = [_dynamic(*shape, dtype=dtype) for shape, dtype in ATTENTION.values()]
        _trace(AttentionProbe(_kernels(rotary_dtype="float16"), kind), *arguments)

    @pytest.mark.parametrize(("name", "shape", "dtype"), WRONG_ATTENTION)
    def test_attention(self, name: str, shape: tuple[int | None, ...], dtype: str) -> None:
        arguments = {**ATTENTION, name: (shape, dtype)}
        with pytest.raises(InputError, match=f": {name}: has the wrong (shape|dtype)"):
            _trace(
                AttentionProbe(_kernels(rotary_dtype="float16"), DRAFTS),
                *(_dynamic(*sizes, dtype=kind) for sizes, kind in arguments.values()),
            )

    @pytest.mark.parametrize(
        ("method", "tensors", "message"),
        [
            ("norm", [_dynamic(None, 64), _dynamic(64, dtype="int32")], "RmsNorm: weight: has the wrong dtype"),
            ("norm", [_dynamic(None, 64), _dynamic(60)], "RmsNorm: x: has the wrong shape"),
            ("linear", [_dynamic(None, 64), _dynamic(64, 96)], "MatMul: x: has the wrong shape"),
            ("linear", [_dynamic(None, 64), _dynamic(96, 64, dtype="float32")], "MatMul: weight: has the wrong dtype"),
            (
                "linear_add",
                [_dynamic(None, 64), _dynamic(32, 64), _dynamic(31), _dynamic(None, 32)],
                "Add: bias: has the wrong shape",
            ),
            (
                "linear_add",
                [_dynamic(None, 64), _dynamic(32, 64), _dynamic(32), _dynamic(None, 64)],
                "Add: residual: has the wrong shape",
            ),
        ],
    )
    def test_linear_and_norm(self, method: str, tensors: list[Tensor], message: str) -> None:
        with pytest.raises(InputError, match=message):
            _trace(Probe(_kernels(), method), *tensors)

    @pytest.mark.parametrize(
        ("odd", "shape", "message"),
        [
            (1, (4, 64), "experts: router"),
            (2, (6, 48, 64), "GroupedMatmulV4: gate"),
            (3, (6, 64, 40), "GroupedMatmulV4: up"),
            (4, (6, 64, 48), "GroupedMatmulV4: down"),
            (5, (6, 64), "MoeFinalizeRouting: bias"),
        ],
    )
    def test_experts(self, odd: int, shape: tuple[int, ...], message: str) -> None:
        shapes: list[tuple[int | None, ...]] = [
            (None, 64),
            (6, 64),
            (6, 64, 48),
            (6, 64, 48),
            (6, 48, 64),
            (1, 6, 1, 64),
        ]

        def experts() -> list[Tensor]:
            return [_dynamic(*sizes, dtype="float32" if at == 1 else "float16") for at, sizes in enumerate(shapes)]

        _trace(Probe(_kernels(MOE), "routed_experts"), *experts())
        shapes[odd] = shape
        with pytest.raises(InputError, match=message):
            _trace(Probe(_kernels(MOE), "routed_experts"), *experts())


class TestLimits:
    def test_float32_is_refused(self) -> None:
        with pytest.raises(InputError, match=r"dtype: .*expected float16 or bfloat16, found float32.*--dtype"):
            _kernels(dtype="float32")

    @pytest.mark.parametrize("size", [0, 8, 48, 80, 96, 256])
    def test_block_sizes_that_paged_attention_cannot_do(self, size: int) -> None:
        with pytest.raises(ConfigError, match=r"cacheBlockSize.*one of 16, 32, 64, 128 with head dimension 16"):
            AscendKernels(DENSE, 1, _cache(DENSE, block_size=size), RotaryTable(16))

    def test_the_largest_block_of_the_released_head_dimension(self) -> None:
        config = TelechatConfig(64, 512, 1, 4, 96)
        AscendKernels(config, 1, _cache(config, block_size=128), RotaryTable(128))
        config = TelechatConfig(64, 1024, 1, 4, 96)
        with pytest.raises(ConfigError, match="one of 16, 32, 64 with head dimension 256"):
            AscendKernels(config, 1, _cache(config, block_size=128), RotaryTable(256))

    def test_odd_head_dimensions(self) -> None:
        config = TelechatConfig(64, 96, 1, 4, 96)
        with pytest.raises(ConfigError, match="multiple of 16, found 24"):
            AscendKernels(config, 1, _cache(config), RotaryTable(24))

    def test_kv_heads_that_do_not_divide(self) -> None:
        with pytest.raises(ConfigError, match="one of 1, 2"):
            AscendKernels(DENSE, 4, _cache(DENSE), RotaryTable(16))


def test_the_cache_is_allocated_on_the_npu_and_stays_there(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def empty(shape: tuple[int, ...], dtype: object, device: str) -> Tensor:
        made.append((shape, dtype, device, np.zeros(shape, np.float16)))
        return Tensor.from_numpy(made[-1][3])

    def asnumpy(self: Tensor) -> None:
        raise AssertionError("copied through host memory")

    monkeypatch.setattr(ascend_graphs.mint, "empty", empty)
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "asnumpy", asnumpy)
        cache = AscendCache(3, 8, BLOCK, kv_heads=2, head_dim=16, dtype="float16")
    assert [asked[:3] for asked in made] == [((8, BLOCK, 2, 16), ms.float16, "Ascend")] * 6
    assert [len(cache.keys), len(cache.values)] == [3, 3]
    assert cache.keys[2].name.endswith("key_cache.2") and not cache.keys[2].requires_grad
    made[2][3][1, 2, 0, 3] = 7  # the very memory that was given
    assert cache.keys[2].asnumpy()[1, 2, 0, 3] == 7


class Echo(nn.Cell):
    """In a decoder's place: what a machine without an NPU can run."""

    def __init__(self, kernels: AscendKernels) -> None:
        super().__init__()
        self.kernels = kernels

    def construct(self, token_ids: Tensor, logits_rows: Tensor, inputs: Any, caches: Any) -> Tensor:
        found = ms.ops.cast(token_ids.reshape(-1, 1) + inputs[3].reshape(-1, 1), ms.float16)
        return found if caches is None else found + caches[0][1].max() + caches[1][0].max()


@pytest.mark.usefixtures("graph_mode")
@pytest.mark.parametrize("layer_form", ["flat", "split"])
def test_graphs_are_compiled_once_in_the_phases_that_mindspore_looks_for(layer_form: str) -> None:
    """As they run on an NPU: graph mode and dynamic shapes."""
    kernels = _kernels(layer_form=layer_form)
    graphs = AscendGraphs(Echo(kernels), kernels.call_shape())
    for size in (1, 2, 3):
        for batch in (_batch([4] * size, [4] * size), _batch([1] * size, [4] * size), _batch([2] * size, [5] * size)):
            (call,) = kernels.calls(batch)
            found = graphs(call)
            assert found.dtype == ms.float32
            assert found.asnumpy()[:, 0].tolist() == (batch.token_ids + batch.slots).tolist()
    words = {PREFILL: "prefill", DECODE: "increment", HISTORY: "increment"}
    for kind, word in words.items():
        (phase,) = graphs.graphs[kind].phase_cache.values()
        assert phase.split(".")[0] == word
        assert _cell_graph_executor.has_compiled(phase)
        assert len(graphs.graphs[kind].compile_cache) == 1
    assert not graphs.graphs[DRAFTS].phase_cache


@pytest.mark.usefixtures("graph_mode")
def test_caches_of_mindies_reach_the_graph() -> None:
    """Of one block in its warm-up, of more afterwards; the graph is the same."""
    kernels = _kernels()
    graphs = AscendGraphs(Echo(kernels), kernels.call_shape(external_layers=2))
    (call,) = kernels.calls(_batch([1], [4]))
    for fill, blocks in ((1, 1), (2, 5), (3, 5)):
        keys, values = (
            ms.mutable(tuple(Tensor(np.full((blocks, BLOCK, 2, 16), fill + side, np.float16)) for _ in range(2)))
            for side in (0, 10)
        )
        expected = call.token_ids.asnumpy() + call.inputs[1].asnumpy() + 2 * fill + 10
        assert graphs(call, (keys, values)).asnumpy()[:, 0].tolist() == expected.tolist()
    assert len(graphs.graphs[DECODE].compile_cache) == 1


def test_a_graph_says_which_it_is() -> None:
    with pytest.raises(KeyError):
        DecoderGraph(Echo(_kernels()), "other")


def test_a_check_says_what_where_expected_and_found() -> None:
    check_tensor("Op: x", (None, 4), ms.float16, (None, 4), ("float16",))
    check_tensor("Op: x", (3, None), ms.bfloat16, (None, 4), ("float16", "bfloat16"))
    with pytest.raises(
        TelechatMindieError, match=r"Op: x: has the wrong shape \(expected \[any, 4\], found \[3, 5\]\)"
    ):
        check_tensor("Op: x", (3, 5), ms.float16, (None, 4), ("float16",))
    with pytest.raises(TelechatMindieError, match=r"wrong dtype \(expected float16 or bfloat16, found int64\)"):
        check_tensor("Op: x", (3, 4), ms.int64, (None, 4), ("float16", "bfloat16"))
