"""Strategy files: what MindSpore writes is read as MindSpore reads it, and anything else is refused in one sentence."""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers.strategies import Cut, as_json, nested, number, protobuf, write_strategy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from telechat_mindie.checkpoint.formats import strategy
from telechat_mindie.checkpoint.formats.strategy import read_strategy
from telechat_mindie.checkpoint.formats.strategy_layout import Layout
from telechat_mindie.errors import CheckpointError, TelechatMindieError

LAYOUTS = {
    "model.norm_out.weight": Cut((2, 2), (-1,)),
    "lm_head.weight": Cut((2, 2), (0, -1), -1),
    "model.layers.0.attention.wo.weight": Cut((2, 2), (-1, 0), 2),
    "model.layers.0.feed_forward.ffn.w2.bias": Cut((4,), (-1, 0, -1, -1)),
}
FOUND = {
    "model.norm_out.weight": Layout((2, 2), ((),)),
    "lm_head.weight": Layout((2, 2), ((1,), ()), 2),
    "model.layers.0.attention.wo.weight": Layout((2, 2), ((), (1,)), 2),
    "model.layers.0.feed_forward.ffn.w2.bias": Layout((4,), ((), (0,), (), ())),
}


def read(tmp_path, content, name="ckpt_strategy_rank_0.ckpt"):
    (tmp_path / name).write_bytes(content)
    return read_strategy([tmp_path / name])


@pytest.mark.parametrize("packed", [True, False])
def test_protobuf_is_read(tmp_path, packed):
    found = read(tmp_path, protobuf(LAYOUTS, packed=packed))
    assert found.stages == (FOUND,)
    assert (found.ranks, found.stage_ranks) == (4, 4)


def test_json_says_the_same(tmp_path):
    assert read(tmp_path, as_json(LAYOUTS), "strategy.json").stages == (FOUND,)


def test_an_axis_may_be_divided_by_several_device_axes(tmp_path):
    cuts = {"a": Cut((2, 3, 2), ([2, 0], [-1])), "b": Cut((2, 3, 2), ([1, 0],)), "c": Cut((2, 3, 2), (1, -1))}
    axes = {"a": ((0, 2), ()), "b": ((1, 2),), "c": ((1,), ())}
    expected = {name: Layout((2, 3, 2), found) for name, found in axes.items()}
    assert read(tmp_path, protobuf(cuts)).stages == (expected,)
    assert read(tmp_path, as_json(cuts), "s.json").stages == (expected,)
    for name, cut in cuts.items():
        assert [expected[name].place(rank) for rank in range(12)] == [cut.place(rank) for rank in range(12)]


@pytest.mark.parametrize("form", ["ckpt", "json"])
def test_the_files_of_all_ranks_make_up_the_stages(tmp_path, form):
    stages = [{"a": Cut((2,), (0,)), "shared": Cut((2,), (-1,))}, {"b": Cut((2,), (-1,)), "shared": Cut((2,), (-1,))}]
    write_strategy(tmp_path / "strategy", stages, form)
    found = read_strategy([tmp_path / "strategy"])
    assert [sorted(stage) for stage in found.stages] == [["a", "shared"], ["b", "shared"]]
    assert found.ranks == 4


def test_a_merged_file_says_the_stage_in_each_name(tmp_path):
    first = protobuf({"a": Cut((2,), (0,))}, merged=True)
    found = read(tmp_path, first + protobuf({"a": Cut((2,), (-1,))}, 1, merged=True))
    assert [stage["a"].cuts for stage in found.stages] == [(2,), (1,)]


def test_fields_that_a_newer_mindspore_adds_are_passed_over(tmp_path):
    content = number(9, 7) + protobuf(LAYOUTS) + nested(12, b"new") + b"\x69" + bytes(8) + b"\x6d" + bytes(4)
    assert read(tmp_path, content).stages == (FOUND,)


WRONG = {
    "empty": (b"", "holds no layouts"),
    "no layouts": (number(1, 1), "holds no layouts"),
    "foreign": (b"PK\x03\x04" + bytes(60), "well-formed strategy file"),
    "unknown device": (protobuf({"a": Cut((2,), (1,))}), "tensor map"),
    "device twice": (protobuf({"a": Cut((2,), (0, 0))}), "tensor map"),
    "no device": (protobuf({"a": Cut((), (-1,))}), "device matrix"),
    "zero devices": (protobuf({"a": Cut((0,), (-1,))}), "device matrix"),
    "too many devices": (protobuf({"a": Cut((2**31, 2**31), (-1,))}), "device matrix"),
    "shards": (protobuf({"a": Cut((4,), (-1,), 3)}), "opt_weight_shard_size"),
    "shards of a scalar": (protobuf({"a": Cut((4,), (), 2)}), "has no layout|opt_weight_shard_size"),
    "two sizes": (protobuf({"a": Cut((4,), (-1,)), "b": Cut((2,), (-1,))}), "not divided over the ranks"),
    "twice": (protobuf({"a": Cut((4,), (-1,))}) * 2, "names a parameter twice"),
    "name": (protobuf({"a\n": Cut((4,), (-1,))}), "no tensor's"),
    "fields": (protobuf({"a": Cut((4,), (-1,))}).replace(number(5, 0), number(5, 3)), "split by fields"),
    "stage": (protobuf({"a": Cut((4,), (-1,))}, 99_999), "impossible pipeline stage"),
}


@pytest.mark.parametrize(("content", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_said(tmp_path, content, message):
    with pytest.raises(CheckpointError, match=message) as refused:
        read(tmp_path, content)
    assert "ckpt_strategy_rank_0.ckpt" in str(refused.value)


WRONG_JSON = {
    "list": (b"[]", "no JSON object"),
    "no layouts": (b"{}", "has no layouts"),
    "gbk": ("中".encode("gbk"), "not UTF-8"),
    "number": (json.dumps({"parallel_layout_item": {"a": 1}}).encode(), "has no layout"),
    "text": (as_json({"a": Cut((2,), ("0",))}), "lists of integers"),
    "flag": (as_json({"a": Cut((True,), (0,))}), "lists of integers"),
    "matrix": (json.dumps({"parallel_layout_item": {"a": {"tensor_map": [0]}}}).encode(), "lists of integers"),
    "stage": (as_json({"a": Cut((4,), (-1,))}, -1), "impossible pipeline stage .found -1"),
}


@pytest.mark.parametrize(("content", "message"), WRONG_JSON.values(), ids=WRONG_JSON)
def test_what_is_wrong_in_json_is_said(tmp_path, content, message):
    with pytest.raises(TelechatMindieError, match=message):
        read(tmp_path, content, "s.json")


def test_a_truncated_file_is_refused_or_knows_less(tmp_path):
    content = protobuf(LAYOUTS)
    refused = 0
    for end in range(len(content)):
        try:
            stage = read(tmp_path, content[:end]).stages[0]
        except CheckpointError:
            refused += 1
        else:
            assert stage.items() < FOUND.items()
    assert refused > 0.98 * len(content)


def test_files_of_two_runs_are_refused(tmp_path):
    (tmp_path / "ckpt_strategy_rank_0.ckpt").write_bytes(protobuf({"a": Cut((2,), (0,))}))
    (tmp_path / "ckpt_strategy_rank_1.ckpt").write_bytes(protobuf({"a": Cut((2,), (-1,))}))
    with pytest.raises(CheckpointError, match="differs from the strategy of the same stage"):
        read_strategy([tmp_path])


def test_a_missing_stage_is_named_with_a_file_that_would_do(tmp_path):
    (tmp_path / "s.ckpt").write_bytes(protobuf({"a": Cut((4,), (0,))}, 2))
    with pytest.raises(CheckpointError, match=r"stages is missing: 0, 1.*ckpt_strategy_rank_0\.ckpt"):
        read_strategy([tmp_path])


def test_an_empty_folder_and_a_large_file_are_refused(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no strategy file"):
        read_strategy([tmp_path / "empty"])
    monkeypatch.setattr(strategy, "MAX_FILE_BYTES", 100)
    with pytest.raises(CheckpointError, match="too large"):
        read(tmp_path, protobuf(LAYOUTS))


def test_mindspore_reads_our_bytes_so():
    from mindspore.train.node_strategy_pb2 import ParallelStrategyMap

    parsed = ParallelStrategyMap()
    parsed.ParseFromString(protobuf(LAYOUTS, 3))
    assert parsed.parallel_strategy_item[0].parallel_strategys.stage == 3
    for item, (name, cut) in zip(parsed.parallel_layout_item, LAYOUTS.items(), strict=True):
        layouts = item.parallel_layouts
        assert (item.param_name, tuple(layouts.dev_matrix[0].dim)) == (name, cut.dev_matrix)
        assert (tuple(layouts.tensor_map[0].dim), layouts.opt_weight_shard_size) == (cut.tensor_map, cut.size)


@pytest.mark.parametrize("name", ["dp4tp2zero_shard2", "moe_dp2ep2_seqpar", "tp2pp2"])
def test_real_files_as_mindspore_reads_them(shared, name):
    from mindspore.train.node_strategy_pb2 import ParallelStrategyMap

    folder = shared(f"training/strategies/{name}")
    found = read_strategy([folder])
    for file in folder.glob("*.ckpt"):
        parsed = ParallelStrategyMap()
        parsed.ParseFromString(file.read_bytes())
        stage = found.stages[parsed.parallel_strategy_item[0].parallel_strategys.stage]
        assert len(stage) == len(parsed.parallel_layout_item)
        for item in parsed.parallel_layout_item:
            layouts = item.parallel_layouts
            cut = Cut(tuple(layouts.dev_matrix[0].dim), tuple(layouts.tensor_map[0].dim))
            layout, copies = stage[item.param_name], cut.ranks // int(np.prod(stage[item.param_name].cuts))
            assert layout.shards == {0: 1, -1: copies}.get(layouts.opt_weight_shard_size, layouts.opt_weight_shard_size)
            assert [layout.place(rank) for rank in range(cut.ranks)] == [cut.place(rank) for rank in range(cut.ranks)]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_raise_nothing_else(tmp_path, data):
    content = bytearray(data.draw(st.sampled_from([protobuf(LAYOUTS), as_json(LAYOUTS)])))
    for _ in range(data.draw(st.integers(1, 4))):
        begin = data.draw(st.integers(0, len(content)))
        end = data.draw(st.integers(begin, min(len(content), begin + 8)))
        content[begin:end] = data.draw(st.binary(max_size=8))
    name = data.draw(st.sampled_from(["s.ckpt", "s.json"]))
    try:
        found = read(tmp_path, bytes(content), name)
    except TelechatMindieError as error:
        assert str(error).isprintable()
    else:
        assert all(layout.ranks == found.stage_ranks for stage in found.stages for layout in stage.values())


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200))
def test_any_bytes_raise_nothing_else(tmp_path, content):
    with pytest.raises(TelechatMindieError):
        read(tmp_path, content)
