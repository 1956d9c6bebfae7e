"""`ModelRunner.dtype` is what the caches are: on both sets of CPU kernels, for its own caches and for MindIE's."""

from __future__ import annotations

from unittest import mock

import mindspore as ms
import numpy as np
import pytest
from helpers import reference
from helpers.checkpoints import CONFIG, make_checkpoint
from helpers.driver import Driver

from telechat_mindie import ModelRunner
from telechat_mindie.config import TelechatConfig
from telechat_mindie.dtypes import DTYPES, HALF_DTYPES, WEIGHT_DTYPES
from telechat_mindie.errors import InputError
from telechat_mindie.model.kv_cache import rows_of
from telechat_mindie.model_dir.build import BuildOptions, build

BLOCK, NUM_BLOCKS = 16, 32
LENGTHS = (3, 17, 40)

EXACT = 5e-4
"""Against float32 keys and values."""

ROUNDED = {"float16": 0.02, "bfloat16": 0.18}
"""Against float32 keys and values where ours have 16 bits, for logits up to 8.1: twice what was measured (0.010 and
0.088; 0.0015 and 0.012 in the mean square). The two differ by 8, as their steps do."""

SAME_ROUNDING = {"float32": 1e-4, "float16": 2e-3, "bfloat16": 1e-2}
"""Against numpy that rounds keys and values alike: what is left are numbers next to the middle of two steps, which
float32 sums put on one side and float64 sums on the other. Rounding half of them wrong would give ten times this."""


@pytest.fixture(params=["native", "mindspore"], autouse=True)
def kernels(request, monkeypatch):
    if request.param == "native":
        from telechat_mindie.model.kernels import native_build

        try:
            native_build.library()
        except native_build.NativeUnavailable as reason:
            pytest.skip(str(reason))
    monkeypatch.setenv("TELECHAT_CPU_KERNELS", request.param)
    return request.param


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """dtype -> (model directory, its weights)"""
    made = {}

    def get(dtype):
        if dtype not in made:
            root = tmp_path_factory.mktemp(dtype)
            weights = make_checkpoint(root / "ckpt", dtype)
            build(root / "model", root / "ckpt", BuildOptions(dtype=dtype))
            made[dtype] = root / "model", weights
        return made[dtype]

    return get


def runner_of(path, **options):
    return ModelRunner(str(path), **({"npu_mem_size": 1, "cpu_mem_size": 1, "block_size": BLOCK} | options))


def mindies_caches(runner, dtype=None):
    """As generator_ms.py allocates them where npu_mem_size is -1."""
    shape = (NUM_BLOCKS, BLOCK, runner.num_kv_heads, runner.head_size)
    keys, values = ([ms.ops.zeros(shape, dtype or runner.dtype) for _ in range(runner.num_layers)] for _ in range(2))
    return {"key_cache": ms.mutable(keys), "value_cache": ms.mutable(values)}


def conversation(runner, **caches):
    """The ids of three sequences, and their logits after a prefill and after each of four decode steps."""
    rng = np.random.default_rng(5)
    driver = Driver(runner, BLOCK, NUM_BLOCKS)
    sequences = [rng.integers(0, CONFIG["vocab_size"], length + 4) for length in LENGTHS]
    tables = [driver.table(len(ids)) for ids in sequences]
    found = [driver.prefill([ids[:-4] for ids in sequences], tables, **caches)]
    for step in range(4):
        at = [length + step for length in LENGTHS]
        tokens = [ids[position] for ids, position in zip(sequences, at, strict=True)]
        found.append(driver.decode(tokens, at, tables, **caches))
    return sequences, np.stack(found)


@pytest.fixture(scope="module")
def own(directory):
    """(kernels, dtype) -> (a runner with a cache of its own, the ids of its conversation, the logits)"""
    made = {}

    def get(*key):
        if key not in made:
            runner = runner_of(directory(key[1])[0], num_blocks=NUM_BLOCKS)
            made[key] = runner, *conversation(runner)
        return made[key]

    return get


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_what_kvcache_gives_is_written_to(own, kernels, dtype):
    """In the runner's dtype, but where MindSpore's operators do not take that."""
    runner, _, _ = own(kernels, dtype)
    held = {("mindspore", "bfloat16"): "int16"}.get((kernels, dtype), dtype)
    for layer in range(runner.num_layers):
        for side in runner.model.kvcache(layer):
            assert side.dtype is getattr(ms, held)
            written = rows_of(side, side.shape[1], DTYPES[dtype].numpy).astype(np.float32)
            assert np.isfinite(written).all() and np.count_nonzero(written[:-1].any(axis=1)) == 72


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_caches_in_the_runners_dtype_are_served(directory, own, kernels, dtype):
    _, _, wanted = own(kernels, dtype)
    runner = runner_of(directory(dtype)[0], npu_mem_size=-1)
    assert runner.dtype is getattr(ms, dtype)
    caches = mindies_caches(runner)
    np.testing.assert_array_equal(conversation(runner, **caches)[1], wanted)
    written = [cache.asnumpy().astype(np.float32) for side in caches.values() for cache in side]
    # Three sequences of 7, 21 and 44 tokens; with MindSpore's operators the last slot takes what is not kept.
    assert all(np.count_nonzero(cache.any(axis=(2, 3))[:-1]) == 72 for cache in written)


def test_caches_in_another_dtype_are_refused(directory):
    runner = runner_of(directory("bfloat16")[0], npu_mem_size=-1)
    with pytest.raises(InputError, match=r"key_cache\[0\]"):
        conversation(runner, **mindies_caches(runner, ms.float32))


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_keys_and_values_are_rounded_once_to_nearest(directory, own, kernels, dtype):
    """Logits are numpy's over rounded keys and values, whatever of the context came in the same call."""
    _, weights = directory(dtype)
    _, sequences, found = own(kernels, dtype)
    config = TelechatConfig.from_dict(CONFIG)

    def store(x):
        return x.astype(np.float32).astype(DTYPES[dtype].numpy).astype(np.float64)

    with mock.patch.object(reference, "store", store):
        wanted = [reference.logits(weights, config, ids)[-5:] for ids in sequences]
    assert np.abs(found - np.stack(wanted, axis=1)).max() < SAME_ROUNDING[dtype]


@pytest.mark.parametrize("kernels", ["native"], indirect=True)
@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_what_16_bits_cost(directory, shared, tmp_path, dtype):
    """The published code's logits, over float32 keys and values, of a model with bfloat16 weights."""
    oracle = np.load(shared("oracle/gqa_bf16") / "oracle.npz")
    build(tmp_path / "model", shared("oracle/gqa_bf16") / "ckpt", BuildOptions(dtype=dtype))
    driver = Driver(runner_of(tmp_path / "model", num_blocks=64), BLOCK, 64)
    prompts = [oracle[f"input_ids_{i}"].reshape(-1) for i in range(4)]
    tokens = np.stack([oracle[f"greedy_cached_{i}_rope32"].reshape(-1) for i in range(4)])
    wanted = np.stack([oracle[f"greedy_cached_logits_{i}_rope32"].reshape(tokens.shape[1], -1) for i in range(4)])
    tables = [driver.table(len(prompt) + 33) for prompt in prompts]
    found = [driver.prefill(prompts, tables)]
    for step in range(tokens.shape[1] - 1):
        found.append(driver.decode(tokens[:, step], [len(prompt) + step for prompt in prompts], tables))
    difference = np.abs(np.stack(found, axis=1) - wanted).max()
    assert EXACT < difference < ROUNDED[dtype]
    np.testing.assert_array_equal(np.argmax(found, axis=2).T, tokens)


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_swapped_blocks_come_back_bit_by_bit(own, kernels, dtype):
    runner, _, _ = own(kernels, dtype)
    driver = Driver(runner, BLOCK, NUM_BLOCKS)
    table, other = driver.table(40), driver.table(40)
    driver.prefill([np.arange(4, 37)], [table])
    before = driver.decode([5], [33], [table])
    host = np.array([7, 1, 3])
    runner.swap(np.stack([table, host], axis=1), True)
    driver.prefill([np.arange(50, 83)], [table])
    runner.swap(np.stack([host, other], axis=1), False)
    np.testing.assert_array_equal(driver.decode([5], [33], [other]), before)
