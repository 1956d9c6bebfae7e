"""The Ascend kernels: what they hand to the operators, checked against the CPU kernels with the operators emulated."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mindspore import Parameter, Tensor, nn
from mindspore.common.api import _cell_graph_executor

from telechat_mindie.config import TelechatConfig
from telechat_mindie.errors import ConfigError, InputError, TelechatMindieError
from telechat_mindie.model.batch import RaggedBatch
from telechat_mindie.model.decoder import TelechatForCausalLM
from telechat_mindie.model.kernels import ascend_graphs
from telechat_mindie.model.kernels.ascend import BLOCKED, AscendKernels
from telechat_mindie.model.kernels.ascend_graphs import DECODE_INPUTS, AscendCache, AscendGraphs
from telechat_mindie.model.kernels.checks import check_tensor
from telechat_mindie.model.kernels.cpu import CpuKernels
from telechat_mindie.model.kv_cache import KVCache
from telechat_mindie.model.parallel import TensorParallel
from telechat_mindie.model.rope import RotaryTable
from tests.helpers.ascend_operators import emulate

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


def _kernels(config: TelechatConfig = DENSE, dtype: str = "float16", **options: str) -> AscendKernels:
    return AscendKernels(config, 1, _cache(config, dtype), RotaryTable(config.head_dim), **options)


class TestCalls:
    def test_without_history_the_context_is_the_prompt(self) -> None:
        batch = _batch([3, 5], [3, 5], rows="last")
        (call,) = _kernels().calls(batch)
        cos, sin, slots, context_lens, query_lens, mask = call.inputs
        assert cos.shape == sin.shape == (8, 16)
        assert (cos.asnumpy()[:, :8] == cos.asnumpy()[:, 8:]).all()
        assert slots.asnumpy().tolist() == batch.slots.tolist()
        assert context_lens.asnumpy().tolist() == query_lens.asnumpy().tolist() == [3, 5]
        assert mask.shape == (128, 128)
        assert mask.asnumpy()[3, 3] == 0 and mask.asnumpy()[3, 4] == BLOCKED
        assert call.logits_rows.asnumpy().tolist() == [2, 7]
        assert call.rows.tolist() == [0, 1]

    def test_decode_needs_no_mask(self) -> None:
        (call,) = _kernels().calls(_batch([1, 1], [9, 30]))
        assert len(call.inputs) == DECODE_INPUTS
        assert call.inputs[5].shape == (1, 1)
        assert call.inputs[6].shape == (2, 16)

    def test_every_index_is_a_32_bit_word(self) -> None:
        for batch in (_batch([4], [4]), _batch([1, 3], [9, 30])):
            (call,) = _kernels().calls(batch)
            indices = [call.token_ids, call.logits_rows, *call.inputs[2:5], *call.inputs[6:]]
            assert {tensor.dtype for tensor in indices} == {ms.int32}

    @pytest.mark.parametrize(("dtype", "blocked"), [("float16", BLOCKED), ("bfloat16", 1.0)])
    def test_the_triangle_is_what_the_kernel_takes(self, dtype: str, blocked: float) -> None:
        (call,) = _kernels(dtype=dtype).calls(_batch([4], [4]))
        mask = call.inputs[5].asnumpy().astype(np.float32)
        assert (mask == np.triu(np.full((128, 128), blocked), 1)).all()

    def test_tables_in_float32_where_asked(self) -> None:
        (call,) = _kernels(rotary_dtype="float32").calls(_batch([4], [4]))
        assert call.inputs[0].dtype == call.inputs[1].dtype == ms.float32
        (call,) = _kernels(rotary_dtype="float16", dtype="bfloat16").calls(_batch([4], [4]))
        assert call.inputs[0].dtype == ms.bfloat16

    def test_tokens_that_are_not_kept_stay_so(self) -> None:
        batch = _batch([3], [3])
        batch.slots[1:] = -1  # as MindIE's warm-up
        (call,) = _kernels().calls(batch)
        assert call.inputs[2].asnumpy().tolist()[1:] == [-1, -1]

    @settings(max_examples=60, deadline=None)
    @given(
        st.lists(st.tuples(st.integers(1, 6), st.integers(0, 40)), min_size=1, max_size=4).filter(
            lambda lens: any(query > 1 and past for query, past in lens)
        )
    )
    def test_with_history_each_token_sees_what_came_before(self, lens: list[tuple[int, int]]) -> None:
        queries = [query for query, _ in lens]
        contexts = [query + past for query, past in lens]
        (call,) = _kernels().calls(_batch(queries, contexts))
        mask = call.inputs[5].asnumpy()
        assert mask.shape == (sum(queries), max(contexts))
        token = 0
        for query, past in lens:
            for index in range(query):
                assert (mask[token] == 0).sum() == past + index + 1
                assert (mask[token, : past + index + 1] == 0).all()
                token += 1

    def test_a_tree_of_drafts_keeps_its_mask(self) -> None:
        seen = np.zeros((4, 12), bool)
        seen[:3, :5] = True  # three drafts after 5 tokens; the third follows the first
        seen[0, 5] = seen[1, 6] = True
        seen[2, [5, 7]] = True
        seen[3, :9] = True
        (call,) = _kernels().calls(_batch([3, 1], [8, 9], mask=seen))
        mask = call.inputs[5].asnumpy() == 0
        assert mask.shape == (4, 9)
        assert (mask == seen[:, :9]).all()

    def test_a_mask_that_the_kernel_would_ignore_is_refused(self) -> None:
        seen = np.ones((2, 9), bool)
        seen[1, 3] = False
        with pytest.raises(InputError, match="hides context"):
            _kernels().calls(_batch([1, 1], [9, 9], mask=seen))
        seen[1, 3] = True
        assert _kernels().calls(_batch([1, 1], [9, 9], mask=seen))[0].inputs[5].shape == (1, 1)


@pytest.fixture
def pynative() -> Iterator[None]:
    before = ms.get_context("mode")
    ms.set_context(mode=ms.PYNATIVE_MODE)
    yield
    ms.set_context(mode=before)


class Weights:
    """The same random weights for every decoder that asks, rounded to float16."""

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype

    def __call__(self, name: str, shape: tuple[int, ...]) -> Parameter:
        rng = np.random.default_rng(list(name.encode()))
        array = rng.normal(0, 1 if "embedding" in name else shape[-1] ** -0.5, shape)
        if name.endswith("norm.weight") or "norm_out" in name:
            array = 1 + array / 4
        return Parameter(Tensor(array.astype(np.float16).astype(self.dtype)), requires_grad=False)


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
@pytest.mark.parametrize("config", [DENSE, MOE], ids=["gqa", "moe"])
def test_equals_the_cpu_kernels_in_every_mode(config: TelechatConfig) -> None:
    cache = _cache(config)
    ascend = emulate(AscendKernels(config, 1, cache, RotaryTable(config.head_dim)))
    model = TelechatForCausalLM(config, Weights("float16"), ascend, TensorParallel(), cache)
    rows = KVCache(config.num_layers, 32, BLOCK, config.kv_size, np.dtype(np.float32))
    cpu = CpuKernels(config, 1, rows, RotaryTable(config.head_dim))
    reference = TelechatForCausalLM(config, Weights("float32"), cpu, TensorParallel(), rows)
    for batch in STEPS:
        expected = np.empty((len(batch.logits_rows), config.vocab_size), np.float32)
        for part in cpu.calls(batch):
            out = reference(part.token_ids, part.logits_rows, part.inputs).asnumpy()
            expected[part.rows] = out[: len(part.rows)]
        (call,) = ascend.calls(batch)
        found = model(call.token_ids, call.logits_rows, call.inputs).asnumpy()
        assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()


@pytest.mark.usefixtures("pynative")
def test_the_ranks_parts_of_the_experts_add_up() -> None:
    """Gate and up cut by columns, down by rows, down's bias whole on every rank."""
    rng = np.random.default_rng(5)

    def tensor(*shape: int) -> Tensor:
        return Tensor(rng.normal(0, shape[-1] ** -0.5, shape).astype(np.float16))

    x, router, bias = tensor(7, 64), tensor(6, 64), tensor(1, 6, 1, 64)
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
    def __init__(self, kernels: AscendKernels) -> None:
        super().__init__()
        self.kernels = kernels

    def construct(self, qkv: Tensor, key_cache: Tensor, value_cache: Tensor, *inputs: Tensor) -> Tensor:
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
    "attn_mask": ((None, None), "float16"),
    "block_tables": ((None, None), "int32"),
}
"""DENSE's arguments of the attention kernel, with history."""

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

    def test_right_arguments_pass(self) -> None:
        _trace(AttentionProbe(_kernels()), *(_dynamic(*shape, dtype=dtype) for shape, dtype in ATTENTION.values()))

    @pytest.mark.parametrize(("name", "shape", "dtype"), WRONG_ATTENTION)
    def test_attention(self, name: str, shape: tuple[int | None, ...], dtype: str) -> None:
        arguments = {**ATTENTION, name: (shape, dtype)}
        with pytest.raises(InputError, match=f": {name}: has the wrong (shape|dtype)"):
            _trace(AttentionProbe(_kernels()), *(_dynamic(*sizes, dtype=kind) for sizes, kind in arguments.values()))

    def test_a_prefill_mask_of_the_prompts_length(self) -> None:
        arguments = list(ATTENTION.values())[:-1]  # without block tables
        with pytest.raises(
            InputError, match=r"FlashAttentionScore: attn_mask: .*expected \[128, 128\], found \[9, 9\]"
        ):
            _trace(
                AttentionProbe(_kernels()),
                *(_dynamic(*shape, dtype=dtype) for shape, dtype in arguments[:-1]),
                _dynamic(9, 9),
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
        _trace(Probe(_kernels(MOE), "routed_experts"), *(_dynamic(*sizes) for sizes in shapes))
        shapes[odd] = shape
        with pytest.raises(InputError, match=message):
            _trace(Probe(_kernels(MOE), "routed_experts"), *(_dynamic(*sizes) for sizes in shapes))


class TestLimits:
    def test_float32_is_refused(self) -> None:
        with pytest.raises(InputError, match=r"dtype: .*expected float16 or bfloat16, found float32.*--dtype"):
            _kernels(dtype="float32")

    @pytest.mark.parametrize("size", [0, 8, 24, 1040])
    def test_block_sizes_that_paged_attention_cannot_do(self, size: int) -> None:
        with pytest.raises(ConfigError, match=r"cacheBlockSize.*multiple of 16 up to 1024 with head dimension 16"):
            AscendKernels(DENSE, 1, _cache(DENSE, block_size=size), RotaryTable(16))

    def test_the_largest_block_of_the_released_head_dimension(self) -> None:
        config = TelechatConfig(64, 512, 1, 4, 96)
        AscendKernels(config, 1, _cache(config, block_size=128), RotaryTable(128))
        with pytest.raises(ConfigError, match="up to 128"):
            AscendKernels(config, 1, _cache(config, block_size=144), RotaryTable(128))

    def test_odd_head_dimensions(self) -> None:
        config = TelechatConfig(64, 96, 1, 4, 96)
        with pytest.raises(ConfigError, match="multiple of 16, found 24"):
            AscendKernels(config, 1, _cache(config), RotaryTable(24))

    def test_kv_heads_that_do_not_divide(self) -> None:
        with pytest.raises(ConfigError, match="one of 1, 2"):
            AscendKernels(DENSE, 4, _cache(DENSE), RotaryTable(16))


def test_the_cache_is_allocated_on_the_npu_in_the_operators_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def empty(shape: tuple[int, ...], dtype: object, device: str) -> Tensor:
        asked.append((shape, dtype, device))
        return Tensor(np.zeros(shape, np.float16))

    monkeypatch.setattr(ascend_graphs.mint, "empty", empty)
    cache = AscendCache(3, 8, BLOCK, kv_heads=2, head_dim=16, dtype="float16")
    assert asked == [((8, BLOCK, 2, 16), ms.float16, "Ascend")] * 6
    assert [len(cache.keys), len(cache.values)] == [3, 3]
    assert cache.keys[2].name.endswith("key_cache.2")


def test_each_call_goes_to_its_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = _kernels()
    graphs = AscendGraphs(nn.Cell(), kernels.call_shape())
    for name in ("prefill", "decode"):
        monkeypatch.setattr(graphs, name, lambda *inputs, name=name: (name, len(inputs)))
    for batch, expected in ((_batch([4], [4]), ("prefill", 9)), (_batch([1], [4]), ("decode", 9))):
        (call,) = kernels.calls(batch)
        assert graphs(call.token_ids, call.logits_rows, call.inputs) == expected
        external = graphs(call.token_ids, call.logits_rows, call.inputs, ([call.token_ids], [call.token_ids]))
        assert external == (expected[0], expected[1] + 2)


def test_a_check_says_what_where_expected_and_found() -> None:
    check_tensor("Op: x", (None, 4), ms.float16, (None, 4), ("float16",))
    check_tensor("Op: x", (3, None), ms.bfloat16, (None, 4), ("float16", "bfloat16"))
    with pytest.raises(
        TelechatMindieError, match=r"Op: x: has the wrong shape \(expected \[any, 4\], found \[3, 5\]\)"
    ):
        check_tensor("Op: x", (3, 5), ms.float16, (None, 4), ("float16",))
    with pytest.raises(TelechatMindieError, match=r"wrong dtype \(expected float16 or bfloat16, found int64\)"):
        check_tensor("Op: x", (3, 4), ms.int64, (None, 4), ("float16", "bfloat16"))
