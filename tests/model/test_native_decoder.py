"""The decoder on the native kernels against the same decoder on MindSpore's own: random ragged steps over one cache.

Each new size is a graph to compile, so most lengths share the buckets of 8 tokens a sequence and 16 in all; those of
`test_long_batches_go_in_runs` and `test_only_some_rows` do not.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from telechat_mindie.config import TelechatConfig
from telechat_mindie.dtypes import DTYPES
from telechat_mindie.errors import TelechatMindieError
from telechat_mindie.model.batch import RaggedBatch
from telechat_mindie.model.kernels import native_build
from telechat_mindie.model.kernels.native_build import NativeUnavailable

BLOCK_SIZE, NUM_BLOCKS, VOCAB = 4, 40, 96
TOLERANCE = {"float32": 2e-5, "float16": 1e-3, "bfloat16": 5e-3}
"""Of the largest logit, about 1, by the dtype of the cache. Both compute in float32; a key or value next to the middle
of two 16-bit numbers may be rounded to either, as the order of a sum has it."""
SHAPES = {
    "mha-float32": (8, {}),
    "gqa-bfloat16": (2, {}),
    "gqa-float16-ntk": (4, {"training_seqlen": 8, "base_seqlen": 4}),
    "moe-bfloat16": (4, {"num_experts": 4, "experts_per_token": 2}),
    "normed-float32": (2, {"embed_layernorm": True}),
}


def make_config(kv_heads: int, **changes: int) -> TelechatConfig:
    shape = {"vocab_size": VOCAB, "hidden_size": 96, "num_layers": 2, "num_heads": 8, "ffn_size": 80}
    return TelechatConfig(**shape, num_kv_heads=kv_heads, **changes)  # type: ignore[arg-type]


class Model:
    """A decoder with random weights of a stored dtype, the same for every set of kernels."""

    def __init__(self, kernels: type, config: TelechatConfig, stored: str) -> None:
        import mindspore as ms

        from telechat_mindie.backend.ranks import use_device
        from telechat_mindie.model.decoder import TelechatForCausalLM
        from telechat_mindie.model.kv_cache import KVCache
        from telechat_mindie.model.parallel import TensorParallel
        from telechat_mindie.model.rope import RotaryTable

        ms.set_context(mode=ms.GRAPH_MODE)
        use_device("cpu")
        random = np.random.default_rng(0)

        def take(name: str, shape: tuple[int, ...]) -> ms.Parameter:
            values = random.standard_normal(shape, np.float32) * 0.15 + ("norm" in name)
            held = DTYPES[kernels.weight_dtype(stored)].numpy  # type: ignore[attr-defined]
            return ms.Parameter(
                ms.Tensor.from_numpy(values.astype(DTYPES[stored].numpy).astype(held)), requires_grad=False
            )

        dtype = kernels.cache_dtype(stored)  # type: ignore[attr-defined]
        cache = KVCache(config.num_layers, NUM_BLOCKS, BLOCK_SIZE, config.kv_size, dtype)
        rotary = RotaryTable(config.head_dim, config.training_seqlen, config.base_seqlen)
        self.tolerance = TOLERANCE[stored]
        self.kernels = kernels(config, 1, cache, rotary)
        self._decoder = TelechatForCausalLM(config, take, self.kernels, TensorParallel(), cache)
        self.single_rank = self.kernels.single_rank_decoder(self._decoder)

    def logits(self, batch: RaggedBatch) -> np.ndarray:
        """From the graph; the same without one, where there is that."""
        out = np.full((len(batch.logits_rows), VOCAB), np.nan, np.float32)
        for call in self.kernels.calls(batch):
            found = self._decoder(call.token_ids, call.logits_rows, call.inputs).asnumpy()
            out[call.rows] = found[: len(call.rows)]
        if self.single_rank is not None:
            np.testing.assert_allclose(self.single_rank.logits(batch), out, rtol=0, atol=self.tolerance)
        return out


@dataclass
class Traffic:
    """Sequences that come, grow by some tokens a step in any order, and go; their blocks are shuffled and reused."""

    random: np.random.Generator
    free: list[int] = field(default_factory=lambda: list(range(NUM_BLOCKS)))
    lengths: dict[int, int] = field(default_factory=dict)
    blocks: dict[int, list[int]] = field(default_factory=dict)
    arrived: int = 0

    def step(self, new: list[int], arrivals: list[int]) -> RaggedBatch:
        """`new` tokens for sequences that are there, in random order, and prompts of `arrivals` tokens."""
        chosen = self.random.permutation(list(self.lengths))[: len(new)].tolist()
        counts = new[: len(chosen)] + arrivals
        for _ in arrivals:
            chosen.append(self.arrived)
            self.lengths[self.arrived], self.blocks[self.arrived] = 0, []
            self.arrived += 1
        self.random.shuffle(self.free)
        slots, positions = [], []
        for name, count in zip(chosen, counts, strict=True):
            begin = self.lengths[name]
            self.lengths[name] = end = begin + count
            while len(self.blocks[name]) * BLOCK_SIZE < end:
                self.blocks[name].append(self.free.pop())
            positions += range(begin, end)
            slots += [self.blocks[name][p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in range(begin, end)]
        tables = np.full((len(chosen), max(len(self.blocks[name]) for name in chosen)), -1, np.int32)
        for row, name in enumerate(chosen):
            tables[row, : len(self.blocks[name])] = self.blocks[name]
        return RaggedBatch(
            token_ids=self.random.integers(0, VOCAB, len(slots)).astype(np.int32),
            positions=np.int32(positions),
            slots=np.int32(slots),
            query_lens=np.int32(counts),
            context_lens=np.int32([self.lengths[name] for name in chosen]),
            block_tables=tables,
            logits_rows=np.arange(len(slots), dtype=np.int32),
        )

    def leave(self) -> None:
        name = int(self.random.choice(list(self.lengths)))
        self.free += self.blocks.pop(name)
        del self.lengths[name]


@pytest.fixture(scope="module", params=SHAPES)
def models(request: pytest.FixtureRequest) -> tuple[Model, Model]:
    """(native, MindSpore's)"""
    try:
        native_build.library()
    except NativeUnavailable as reason:
        pytest.skip(str(reason))
    from telechat_mindie.model.kernels.cpu import CpuKernels
    from telechat_mindie.model.kernels.native import NativeKernels

    kv_heads, changes = SHAPES[request.param]
    config, stored = make_config(kv_heads, **changes), request.param.split("-")[1]
    return Model(NativeKernels, config, stored), Model(CpuKernels, config, stored)


def agree(models: tuple[Model, Model], batch: RaggedBatch) -> np.ndarray:
    native, reference = (model.logits(batch) for model in models)
    assert np.isfinite(reference).all()
    assert np.abs(native - reference).max() <= models[0].tolerance * max(1.0, np.abs(reference).max())
    return native


@pytest.mark.slow
def test_any_mix_of_sequences(models: tuple[Model, Model]) -> None:
    traffic = Traffic(np.random.default_rng(1))
    agree(models, traffic.step([], [7]))
    agree(models, traffic.step([1], [5, 8]))  # a decode beside two prompts
    agree(models, traffic.step([1, 1, 1], []))
    agree(models, traffic.step([5, 1], [1]))  # a chunk, a decode, a prompt of one token
    traffic.leave()
    agree(models, traffic.step([1, 1, 1], []))
    agree(models, traffic.step([7], [8]))


@pytest.mark.slow
def test_draft_tokens_see_what_their_mask_says(models: tuple[Model, Model]) -> None:
    traffic = Traffic(np.random.default_rng(2))
    agree(models, traffic.step([], [6, 5]))
    batch = traffic.step([4, 3], [])
    mask = np.zeros((7, int(batch.context_lens.max())), bool)
    for row in range(7):
        first = 0 if row < 4 else 4
        context, new = int(batch.context_lens[row // 4]), int(batch.query_lens[row // 4])
        mask[row, : context - new + 1] = True  # history and the first draft token
        mask[row, context - new + row - first] = True  # itself: siblings do not see each other
    agree(models, replace(batch, mask=mask))


@pytest.mark.slow
def test_tokens_that_are_not_written_are_seen_by_their_own_prompt(models: tuple[Model, Model]) -> None:
    traffic = Traffic(np.random.default_rng(3))
    before = traffic.step([], [6])
    expected = agree(models, before)
    # As MindIE warms up: one slot, the rest nowhere, and a table that names block 0 throughout.
    unwritten = replace(
        before, slots=np.int32([0, -1, -1, -1, -1, -1]), block_tables=np.zeros_like(before.block_tables)
    )
    difference = np.abs(agree(models, unwritten) - expected).max()
    assert difference <= models[0].tolerance * max(1.0, np.abs(expected).max())


@pytest.mark.slow
def test_long_batches_go_in_runs(models: tuple[Model, Model], monkeypatch: pytest.MonkeyPatch) -> None:
    from telechat_mindie.model.kernels import native

    monkeypatch.setattr(native, "MAX_TOKENS", 6)
    traffic = Traffic(np.random.default_rng(4))
    agree(models, traffic.step([], [4, 15, 1]))  # the second prompt lies in four runs
    agree(models, traffic.step([1, 1, 7], [2]))


@pytest.mark.slow
def test_only_some_rows(models: tuple[Model, Model]) -> None:
    """The last layer goes on with the rows that are wanted, in whatever order and from whatever run."""
    batch = Traffic(np.random.default_rng(6)).step([], [4, 15, 2])
    agree(models, batch)
    rows_alone_are_the_same(models[0], batch)


@pytest.mark.parametrize("models", ["mha-float32"], indirect=True)
def test_only_some_rows_by_mindspores_operators(models: tuple[Model, Model]) -> None:
    """Which rows a call gives is the same for every shape of a model."""
    rows_alone_are_the_same(models[1], Traffic(np.random.default_rng(6)).step([], [4, 15, 2]))


def rows_alone_are_the_same(model: Model, batch: RaggedBatch) -> None:
    every = model.logits(batch)
    for rows in ([3, 18, 20], [20, 0], [7]):
        some = model.logits(replace(batch, logits_rows=np.int32(rows)))
        np.testing.assert_allclose(some, every[rows], rtol=0, atol=model.tolerance)


def test_buckets_cover_and_are_few() -> None:
    from telechat_mindie.model.kernels.native import bucket

    sizes = [bucket(size) for size in range(1, 513)]
    assert all(size <= found <= max(size, 1.5 * size) for size, found in enumerate(sizes, 1))
    assert sorted(set(sizes)) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512]
    assert bucket(3, least=8) == 8 and bucket(9, least=8) == 12


@pytest.mark.parametrize("models", ["mha-float32"], indirect=True)
def test_unusable_arguments_end_in_an_error_not_in_a_crash(
    capfd: pytest.CaptureFixture[str], models: tuple[Model, Model]
) -> None:
    batch = Traffic(np.random.default_rng(5)).step([], [22])  # a size of its own: MindSpore runs its graph no more
    wrong = replace(batch, slots=np.full(22, (NUM_BLOCKS + 1) * BLOCK_SIZE, np.int32))
    with pytest.raises(RuntimeError, match="telechat_attention"):
        models[0].logits(wrong)
    assert "lies outside the cache" in capfd.readouterr().err
    assert models[0].single_rank is not None
    for unusable, reason in (
        (wrong, "outside the cache"),
        (replace(batch, token_ids=batch.token_ids + 96), "token id"),
    ):
        with pytest.raises(TelechatMindieError, match="standard error"):
            models[0].single_rank.logits(unusable)
        assert reason in capfd.readouterr().err
    agree(models, Traffic(np.random.default_rng(5)).step([], [3]))
