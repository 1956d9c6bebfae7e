"""The sharding rule, the name table and the plan's steps, held against each other."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from helpers.checkpoints import CONFIG, MOE, make_weights
from hypothesis import given
from hypothesis import strategies as st

from telechat_mindie.checkpoint.mapping import (
    check_names,
    hugging_face_targets,
    mindformers_targets,
    weights,
)
from telechat_mindie.checkpoint.plan import make_plan, steps
from telechat_mindie.checkpoint.sharding import Role, join, rank_shape, split
from telechat_mindie.config import TelechatConfig
from telechat_mindie.errors import CheckpointError

DENSE = TelechatConfig.from_dict(CONFIG)
EXPERTS = TelechatConfig.from_dict(CONFIG | MOE)


@given(st.sampled_from(list(Role)), st.sampled_from([1, 2, 4, 8]))
def test_split_and_join_are_inverse(role, tp):
    array = np.arange(8 * 16 * 24).reshape(8, 16, 24)
    parts = [split(array, role, rank, tp) for rank in range(tp)]
    assert all(part.shape == rank_shape(array.shape, role, tp) for part in parts)
    np.testing.assert_array_equal(join(parts, role), array)


def test_uneven_split_is_refused():
    with pytest.raises(CheckpointError, match="multiple of 3"):
        split(np.zeros((8, 2)), Role.COLUMN, 0, 3)


def reference(target, arrays, config, rank, tp):
    """A rank's tensor by plain numpy: pick, split and put together whole arrays."""
    parts = []
    for part in target.parts:
        array = arrays[part.source]
        if part.pick != "all":
            pairs = array.reshape(-1, 2, config.head_dim, array.shape[1])
            array = pairs[:, ("keys", "values").index(part.pick)].reshape(-1, array.shape[1])
        array = split(array, target.role.per_expert, rank, tp)
        parts.append(array.T if target.transposed else array)
    whole = np.stack(parts) if target.stacked else np.concatenate(parts)
    return whole.reshape(target.rank_shape(tp))


def by_steps(target, arrays, config, tp):
    """Every rank's tensor as the converter writes it: the bytes in the order of the steps."""
    streams = [[] for _ in range(tp)]
    for step in steps(target, config, tp):
        block = arrays[step.source].reshape(-1, step.columns)[slice(*step.rows)]
        for rank, (begin, end) in step.takers:
            taken = block[:, begin:end]
            streams[rank].append((taken.T if step.transposed else taken).ravel())
    return [np.concatenate(stream).reshape(target.rank_shape(tp)) for stream in streams]


@pytest.mark.parametrize("config", [DENSE, EXPERTS], ids=["dense", "moe"])
@pytest.mark.parametrize("qkv_concat", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_steps_give_what_numpy_gives(config, qkv_concat, transposed, tp):
    arrays = make_weights(config, "float32")
    for target in mindformers_targets(config, qkv_concat=qkv_concat, transposed_experts=transposed):
        for rank, found in enumerate(by_steps(target, arrays, config, tp)):
            np.testing.assert_array_equal(found, reference(target, arrays, config, rank, tp), target.name)


def test_each_source_byte_is_read_once():
    for config in (DENSE, EXPERTS):
        read: dict[str, list[tuple[int, int]]] = {}
        for target in mindformers_targets(config, qkv_concat=True, transposed_experts=True):
            for step in steps(target, config, 4):
                read.setdefault(step.source, []).append(step.rows)
        for name, weight in weights(config).items():
            ranges = sorted(read[name])
            assert ranges[0][0] == 0 and ranges[-1][1] == weight.shape[0], name
            assert all(left[1] == right[0] for left, right in itertools.pairwise(ranges)), name


def test_packed_names_and_shapes():
    targets = {t.name: t for t in mindformers_targets(DENSE, qkv_concat=True, transposed_experts=False)}
    assert targets["model.layers.0.attention.w_qkv.weight"].shape == (64 + 2 * 32, 64)
    assert targets["model.layers.1.feed_forward.w_gate_hidden.weight"].shape == (192, 64)
    assert not any("wk_v" in name or ".w1." in name or ".wq." in name for name in targets)


def test_expert_names_and_shapes():
    targets = {t.name: t for t in mindformers_targets(EXPERTS, qkv_concat=False, transposed_experts=True)}
    stem = "model.layers.0.feed_forward."
    assert targets[stem + "ffn.w1.weight"].rank_shape(2) == (4, 64, 48)
    assert targets[stem + "ffn.w2.weight"].rank_shape(2) == (4, 48, 64)
    assert targets[stem + "ffn.w2.bias"].rank_shape(2) == (1, 4, 1, 64)
    assert targets[stem + "router.dense.weight"].shape == (4, 64)


def test_hugging_face_targets_are_the_weights():
    assert [t.name for t in hugging_face_targets(EXPERTS)] == list(weights(EXPERTS))


def test_every_name_is_accounted_for():
    names = set(weights(DENSE))
    check_names(names, DENSE, "x")
    check_names(names | {"transformer.h.0.self_attention.rotary_emb.inv_freq"}, DENSE, "x")
    with pytest.raises(CheckpointError, match=r"1 of 23 weights are missing: transformer.h.1.mlp.down_proj.bias"):
        check_names(names - {"transformer.h.1.mlp.down_proj.bias"}, DENSE, "x")
    with pytest.raises(CheckpointError, match=r"7 weights are unknown: extra.0.*and 2 more"):
        check_names(names | {f"extra.{i}" for i in range(7)}, DENSE, "x")


def test_a_shard_holds_a_tensor_at_least_and_the_limit_at_most():
    targets = mindformers_targets(DENSE, qkv_concat=True, transposed_experts=False)
    plan = make_plan(DENSE, targets, "float16", 2, shard_bytes=20_000)
    assert [target.name for shard in plan.shards for target in shard.targets] == [target.name for target in targets]
    assert len(plan.shards) > 3
    for shard in plan.shards:
        assert len(shard.targets) == 1 or sum(frame.nbytes for frame in shard.frames) <= 20_000
