"""The sharding rule, the name table and the blocks of targets, held against each other."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from helpers.checkpoints import CONFIG, MOE, make_weights
from hypothesis import given
from hypothesis import strategies as st

from telechat_mindie.checkpoint.blocks import blocks
from telechat_mindie.checkpoint.mapping import check_weights, hugging_face_targets, mindformers_targets, weights
from telechat_mindie.checkpoint.plan import make_plan
from telechat_mindie.checkpoint.sharding import Role, rank_shape, split
from telechat_mindie.config import TelechatConfig
from telechat_mindie.errors import CheckpointError

DENSE = TelechatConfig.from_dict(CONFIG)
EXPERTS = TelechatConfig.from_dict(CONFIG | MOE)


@given(st.sampled_from(list(Role)), st.sampled_from([1, 2, 4, 8]))
def test_the_ranks_parts_make_up_the_tensor(role, tp):
    array = np.arange(8 * 16 * 24).reshape(8, 16, 24)
    parts = [array[np.ix_(*split(array.shape, role, rank, tp))] for rank in range(tp)]
    assert all(part.shape == rank_shape(array.shape, role, tp) for part in parts)
    joined = parts[0] if role.axis is None else np.concatenate(parts, axis=role.axis)
    np.testing.assert_array_equal(joined, array)


def test_uneven_split_is_refused():
    with pytest.raises(CheckpointError, match="multiple of 3"):
        split((8, 2), Role.COLUMN, 0, 3)


def reference(target, arrays, config, rank, tp):
    """A rank's tensor by plain numpy: pick, split and put together whole arrays."""
    parts = []
    for part in target.parts:
        array = arrays[part.source]
        if part.pick != "all":
            pairs = array.reshape(-1, 2, config.head_dim, array.shape[1])
            array = pairs[:, ("keys", "values").index(part.pick)].reshape(-1, array.shape[1])
        role = target.role.per_expert
        array = array if role.axis is None else np.split(array, tp, role.axis)[rank]
        parts.append(array.T if target.transposed else array)
    return np.concatenate(parts).reshape(target.rank_shape(tp))


def by_blocks(target, arrays, tp, elements):
    """Every rank's tensor as the converter writes it: the bytes in the order of the blocks."""
    streams = [[] for _ in range(tp)]
    for block in itertools.chain.from_iterable(block.cut(elements) for block in blocks(target, tp)):
        matrix = arrays[block.source].reshape(arrays[block.source].shape[0], -1)[np.ix_(block.rows, block.columns)]
        for rank, part in block.split(matrix.T if block.transposed else matrix):
            streams[rank].append(part.ravel())
    return [np.concatenate(stream).reshape(target.rank_shape(tp)) for stream in streams]


@pytest.mark.parametrize("config", [DENSE, EXPERTS], ids=["dense", "moe"])
@pytest.mark.parametrize("qkv_concat", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_blocks_give_what_numpy_gives(config, qkv_concat, transposed, tp):
    arrays = make_weights(config, "float32")
    for target in mindformers_targets(config, qkv_concat=qkv_concat, transposed_experts=transposed):
        for rank, found in enumerate(by_blocks(target, arrays, tp, 1000)):
            np.testing.assert_array_equal(found, reference(target, arrays, config, rank, tp), target.name)


def test_each_source_byte_is_read_once():
    for config in (DENSE, EXPERTS):
        read: dict[str, list[tuple[int, int]]] = {}
        for target in mindformers_targets(config, qkv_concat=True, transposed_experts=True):
            for block in blocks(target, 4):
                read.setdefault(block.source, []).append((block.rows.start, block.rows.stop))
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
    shapes = {name: weight.shape for name, weight in weights(DENSE).items()}
    check_weights(shapes, DENSE, "x")
    check_weights(dict.fromkeys(shapes), DENSE, "x")
    with pytest.raises(CheckpointError, match=r"1 of 23 weights are missing: transformer.h.1.mlp.down_proj.bias"):
        check_weights({n: s for n, s in shapes.items() if n != "transformer.h.1.mlp.down_proj.bias"}, DENSE, "x")
    with pytest.raises(CheckpointError, match=r"7 weights are unknown: extra.0.*and 2 more"):
        check_weights(shapes | {f"extra.{i}": (1,) for i in range(7)}, DENSE, "x")
    with pytest.raises(CheckpointError, match=r"1 weights have the wrong shape: lm_head.weight is \[2\] and should be"):
        check_weights(shapes | {"lm_head.weight": (2,)}, DENSE, "x")


def test_a_shard_holds_a_tensor_at_least_and_the_limit_at_most():
    targets = mindformers_targets(DENSE, qkv_concat=True, transposed_experts=False)
    plan = make_plan(DENSE, targets, "float16", 2, shard_bytes=20_000)
    assert [target.name for shard in plan.shards for target in shard.targets] == [target.name for target in targets]
    assert len(plan.shards) > 3
    for shard in plan.shards:
        assert len(shard.targets) == 1 or sum(frame.nbytes for frame in shard.frames) <= 20_000
