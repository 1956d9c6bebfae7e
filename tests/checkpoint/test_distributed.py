"""What training leaves, on any division over ranks: merged, converted, divided again, refused where it is not whole."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, cli
from helpers.checkpoints import MOE, make_checkpoint
from helpers.json_schemas import checked
from helpers.strategies import (
    Cut,
    counters,
    rank_arrays,
    with_optimizer,
    write_ckpt,
    write_run,
    write_strategy,
)
from safetensors.numpy import load_file

from telechat_mindie.checkpoint.convert import MindSporeForm, OutputOptions, to_hugging_face, to_mindspore
from telechat_mindie.checkpoint.formats import mindspore as mindspore_format
from telechat_mindie.checkpoint.formats import tensors
from telechat_mindie.checkpoint.formats.mindspore import read_mindspore_ckpt
from telechat_mindie.checkpoint.formats.tensors import TensorReader
from telechat_mindie.checkpoint.redistribute import Redistribution, redistribute
from telechat_mindie.checkpoint.source import open_checkpoint
from telechat_mindie.checkpoint.training_run import RunChoice
from telechat_mindie.errors import CheckpointError, ConfigError, InputError, OutputError, TelechatMindieError
from telechat_mindie.model_dir.build import BuildOptions, build
from telechat_mindie.model_dir.layout import ModelDir
from telechat_mindie.model_dir.verify import check_against


def load(path):
    with TensorReader() as reader:
        return {name: reader.load(tensor) for name, tensor in read_mindspore_ckpt(path).items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name


def layouts(arrays, *, tp=1, dp=1, stages=1, zero=0, vocab_dp=False, ep=False, interleaved=False):
    """A strategy as the published yamls divide: tp inside dp, optimizer parallelism over dp, experts over dp."""
    result = [{} for _ in range(stages)]
    for name, array in arrays.items():
        column = name.endswith(
            ("wq.weight", "wk_v.weight", "w_qkv.weight", "w1.weight", "w3.weight", "gate_hidden.weight")
        )
        tensor_map = [-1] * array.ndim
        if ep and ".ffn." in name:
            tensor_map[1 if name.endswith("bias") else 0] = 1
        elif column or (name.startswith(("lm_head", "model.tok_emb")) and not vocab_dp):
            tensor_map[array.ndim - 2] = 0
        elif name.endswith(("wo.weight", "w2.weight")):
            tensor_map[array.ndim - 1] = 0
        size = zero if array.ndim == 2 and 1 not in tensor_map else 0
        cut = Cut((dp, tp), tuple(tensor_map), size)
        layer = int(name.split(".")[2]) if ".layers." in name else -1
        stage = layer % stages if interleaved else max(0, layer) * stages // 2
        if name.startswith(("lm_head", "model.norm_out")):
            stage = stages - 1
        for prefix in ("", "adam_m.", "adam_v.", *(("accu_grads.",) if stages > 1 else ())):
            result[stage][prefix + name] = cut
    return result


DIVISIONS = {
    "tp2": {"tp": 2},
    "dp2": {"dp": 2},
    "dp4 zero": {"dp": 4, "zero": -1},
    "tp2 dp2 zero": {"tp": 2, "dp": 2, "zero": -1},
    "tp2 dp4 shard 2": {"tp": 2, "dp": 4, "zero": 2},
    "tp2 pp2": {"tp": 2, "stages": 2},
    "tp2 dp2 pp2 interleaved": {"tp": 2, "dp": 2, "stages": 2, "zero": -1, "interleaved": True},
    "tp4 vocabulary apart": {"tp": 4, "vocab_dp": True},
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """(Hugging Face folder, whole arrays by mindformers' names with the optimizer's state)."""
    return _model(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    return _model(tmp_path_factory.mktemp("moe"), **MOE)


def _model(folder, *, packed=False, **changes):
    make_checkpoint(folder / "hf", "float32", **changes)
    form = MindSporeForm(container="ckpt", qkv_concat=packed)
    to_mindspore(open_checkpoint(folder / "hf"), folder / "whole.ckpt", form)
    return folder / "hf", with_optimizer(load(folder / "whole.ckpt"))


def weights_of(arrays):
    return {name: array for name, array in arrays.items() if not name.startswith("adam_")}


@pytest.fixture
def run(dense, tmp_path):
    """Output of a run with tp 2 and dp 2, optimizer parallel."""
    _, arrays = dense
    write_run(tmp_path / "output", arrays, layouts(weights_of(arrays), tp=2, dp=2, zero=-1))
    return tmp_path / "output"


@pytest.mark.parametrize("redundant", [True, False])
@pytest.mark.parametrize("division", DIVISIONS.values(), ids=DIVISIONS)
def test_merged_and_divided_again(dense, tmp_path, division, redundant):
    _, arrays = dense
    stages = layouts(weights_of(arrays), **division)
    write_run(tmp_path / "output", arrays, stages, redundant=redundant)
    done = redistribute(tmp_path / "output", tmp_path / "whole.ckpt", Redistribution())
    assert (
        done.kind
        == f"mindformers training, {len(stages) * division.get('tp', 1) * division.get('dp', 1)} ranks, step 2_9"
    )
    assert_same(load(tmp_path / "whole.ckpt"), arrays | counters())
    options = Redistribution(strategy=tmp_path / "output" / "strategy", file="telechat_{rank}")
    redistribute(tmp_path / "whole.ckpt", tmp_path / "again", options)
    for rank, held in enumerate(rank_arrays(arrays, stages)):
        assert_same(load(tmp_path / "again" / f"rank_{rank}" / f"telechat_{rank}.ckpt"), held | counters())


@pytest.mark.parametrize("target", DIVISIONS.values(), ids=DIVISIONS)
def test_from_one_division_to_another(dense, run, tmp_path, target):
    _, arrays = dense
    stages = layouts(weights_of(arrays), **target)
    write_strategy(tmp_path / "other", stages, "json")
    redistribute(run, tmp_path / "again", Redistribution(strategy=tmp_path / "other", container="ckpt"))
    for rank, held in enumerate(rank_arrays(arrays, stages)):
        assert_same(load(tmp_path / "again" / f"rank_{rank}" / f"checkpoint_{rank}.ckpt"), held | counters())


@pytest.mark.parametrize("division", [*DIVISIONS.values(), {"dp": 2, "ep": True, "zero": -1}], ids=[*DIVISIONS, "ep2"])
def test_built_and_converted_as_the_whole_checkpoint(request, tmp_path, division):
    """Weights alone, whatever else there is: the bytes of a model directory and of Hugging Face are the same."""
    hf, arrays = request.getfixturevalue("moe" if "ep" in division else "dense")
    buffers = {"model.layers.0.feed_forward.router.router.expert_load": np.ones(4, np.float32)}
    write_run(tmp_path / "output", arrays, layouts(weights_of(arrays), **division))
    for file in (tmp_path / "output" / "checkpoint").glob("*/*.ckpt"):
        held = load(file) | buffers | {"fi_parameter": np.ones(1, np.float32)}
        file.unlink()
        write_ckpt(file, held)
    build(tmp_path / "usual", hf, BuildOptions(tp=2))
    build(tmp_path / "trained", tmp_path / "output", BuildOptions(tp=2, config_dir=hf))
    for file in (tmp_path / "usual").glob("rank_*/*"):
        assert (tmp_path / "trained" / file.relative_to(tmp_path / "usual")).read_bytes() == file.read_bytes()
    assert check_against(ModelDir.open(tmp_path / "usual"), tmp_path / "output", config_dir=hf) == []
    to_hugging_face(open_checkpoint(tmp_path / "output", hf), tmp_path / "a", OutputOptions())
    to_hugging_face(open_checkpoint(hf), tmp_path / "b", OutputOptions())
    for file in (tmp_path / "b").glob("*.safetensors"):
        assert (tmp_path / "a" / file.name).read_bytes() == file.read_bytes()


def test_experts_over_ranks_are_merged(moe, tmp_path):
    _, arrays = moe
    write_run(tmp_path / "output", arrays, layouts(weights_of(arrays), dp=2, ep=True, zero=-1))
    redistribute(tmp_path / "output", tmp_path / "whole.ckpt", Redistribution())
    assert_same(load(tmp_path / "whole.ckpt"), arrays | counters())


def test_the_strategy_wins_over_what_packed_names_suggest(tmp_path):
    hf, arrays = _model(tmp_path, packed=True)
    write_run(tmp_path / "output", arrays, layouts(weights_of(arrays), tp=2))
    redistribute(tmp_path / "output", tmp_path / "merged.ckpt", Redistribution())
    assert_same(load(tmp_path / "merged.ckpt"), arrays | counters())
    to_hugging_face(open_checkpoint(tmp_path / "output", hf), tmp_path / "a", OutputOptions())
    to_hugging_face(open_checkpoint(hf), tmp_path / "b", OutputOptions())
    assert (tmp_path / "a" / "model-00001-of-00001.safetensors").read_bytes() == (
        tmp_path / "b" / "model-00001-of-00001.safetensors"
    ).read_bytes()
    shutil.rmtree(tmp_path / "output" / "strategy")
    with pytest.raises(CheckpointError, match=r"is packed from several weights and cut.*output/strategy"):
        open_checkpoint(tmp_path / "output", hf)


def test_weights_that_were_packed_rank_by_rank(tmp_path):
    """The ranks hold [q0 k0 v0] and [q1 k1 v1], which is what mindformers' own graph computes with."""
    hf, whole = _model(tmp_path, packed=True)
    to_mindspore(open_checkpoint(hf), tmp_path / "ranks", MindSporeForm(container="ckpt", tp=2, qkv_concat=True))
    write_strategy(tmp_path / "output" / "strategy", layouts(weights_of(whole), tp=2))
    for rank in range(2):
        held = load(tmp_path / "ranks" / f"rank_{rank}" / f"checkpoint_{rank}.ckpt")
        write_ckpt(tmp_path / f"output/checkpoint/rank_{rank}/t_rank_{rank}-1_9.ckpt", held | counters())
    opened = open_checkpoint(tmp_path / "output", hf, choice=RunChoice(packed_by_rank=True))
    to_hugging_face(opened, tmp_path / "a", OutputOptions())
    to_hugging_face(open_checkpoint(hf), tmp_path / "b", OutputOptions())
    name = "model-00001-of-00001.safetensors"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert opened.note == "" and "--packed-by-rank" in open_checkpoint(tmp_path / "output", hf).note


@pytest.mark.parametrize("other", [{"packed_by_rank": True}, {"strategy": "crossed"}], ids=str)
def test_what_was_read_in_another_way_is_not_resumed(tmp_path, monkeypatch, other):
    """The files are the same ones."""
    monkeypatch.setattr("telechat_mindie.checkpoint.convert.HUGGING_FACE_SHARD_BYTES", 50_000)
    hf, arrays = _model(tmp_path, packed=True)
    stages = layouts(weights_of(arrays), tp=4)
    write_run(tmp_path / "output", arrays, stages)
    crossed = stages[0] | {"lm_head.weight": Cut((2, 2), ([0, 1], -1))}
    write_strategy(tmp_path / "crossed", [crossed])

    def interrupt_midway(total):
        done = 0

        def advance(count):
            nonlocal done
            done += count
            if done > total // 2:
                raise KeyboardInterrupt

        return advance

    first, again = OutputOptions(), OutputOptions(resume=True)
    with pytest.raises(KeyboardInterrupt):
        to_hugging_face(open_checkpoint(tmp_path / "output", hf), tmp_path / "out", first, interrupt_midway)
    choice = RunChoice(**{key: tmp_path / value if key == "strategy" else value for key, value in other.items()})
    with pytest.raises(OutputError, match="again without --resume"):
        to_hugging_face(open_checkpoint(tmp_path / "output", hf, choice=choice), tmp_path / "out", again)
    choice = RunChoice(strategy=tmp_path / "output" / "strategy")  # what it took of itself
    to_hugging_face(open_checkpoint(tmp_path / "output", hf, choice=choice), tmp_path / "out", again)


def test_weights_alone_on_wish(dense, run, tmp_path):
    redistribute(run, tmp_path / "whole.ckpt", Redistribution(training_state=False))
    assert_same(load(tmp_path / "whole.ckpt"), weights_of(dense[1]))
    inference = [{n: c for n, c in stage.items() if "adam" not in n} for stage in layouts(weights_of(dense[1]), tp=4)]
    write_strategy(tmp_path / "inference", inference)
    options = Redistribution(strategy=tmp_path / "inference", training_state=False)
    redistribute(run, tmp_path / "ranks", options)
    for rank, held in enumerate(rank_arrays(weights_of(dense[1]), inference)):
        assert_same(load(tmp_path / "ranks" / f"rank_{rank}" / f"checkpoint_{rank}.ckpt"), held)
    with pytest.raises(CheckpointError, match="without an optimizer; leave the optimizer's state out"):
        redistribute(run, tmp_path / "no", Redistribution(strategy=tmp_path / "inference"))
    assert not (tmp_path / "no").exists()


def test_the_folders_of_several_machines(dense, run, tmp_path):
    second = tmp_path / "second" / "output"
    for rank in (2, 3):
        for kind, name in (("checkpoint", f"rank_{rank}"), ("strategy", f"ckpt_strategy_rank_{rank}.ckpt")):
            (second / kind).mkdir(parents=True, exist_ok=True)
            shutil.move(run / kind / name, second / kind / name)
    with pytest.raises(CheckpointError, match=r"2 of the run's 4 ranks are missing: rank_2, rank_3.*--source"):
        redistribute(run, tmp_path / "whole.ckpt", Redistribution())
    redistribute(run, tmp_path / "whole.ckpt", Redistribution(choice=RunChoice(sources=(second,))))
    assert_same(load(tmp_path / "whole.ckpt"), dense[1] | counters())
    with pytest.raises(CheckpointError, match="rank 0 is in two folders"):
        redistribute(run, tmp_path / "x.ckpt", Redistribution(choice=RunChoice(sources=(second, run))))


def test_the_newest_step_or_the_one_that_is_named(dense, run, tmp_path):
    _, arrays = dense
    older = {name: array + 1 for name, array in arrays.items()}
    stages = layouts(weights_of(arrays), tp=2, dp=2, zero=-1)
    for rank, held in enumerate(rank_arrays(older, stages)):
        write_ckpt(run / "checkpoint" / f"rank_{rank}" / f"telechat_rank_{rank}-1_10.ckpt", held | counters(10))
    redistribute(run, tmp_path / "new.ckpt", Redistribution())
    assert_same(load(tmp_path / "new.ckpt"), arrays | counters())
    for number, step in enumerate(("1_10", "10")):
        redistribute(run, tmp_path / f"{number}.ckpt", Redistribution(choice=RunChoice(step=step)))
        assert_same(load(tmp_path / f"{number}.ckpt"), older | counters(10))
    with pytest.raises(InputError, match=r"3_1, which no rank has.*1_10, 2_9"):
        redistribute(run, tmp_path / "x.ckpt", Redistribution(choice=RunChoice(step="3_1")))
    (run / "checkpoint" / "rank_3" / "telechat_rank_3-2_9.ckpt").unlink()
    with pytest.raises(CheckpointError, match=r"different steps.*2_9 in rank_0, 1_10 in rank_3.*--step 1_10"):
        redistribute(run, tmp_path / "x.ckpt", Redistribution())
    with pytest.raises(CheckpointError, match="step 2_9 is missing in rank_3"):
        redistribute(run, tmp_path / "x.ckpt", Redistribution(choice=RunChoice(step="2_9")))


def rewrite(file, change):
    held = load(file)
    change(held)
    file.unlink()
    write_ckpt(file, held)


def bump(name, index=0):
    def change(held):
        held[name].reshape(-1)[index] += 1

    return change


def drop(name):
    return lambda held: held.pop(name)


def narrow(held):
    held["lm_head.weight"] = held["lm_head.weight"].astype(np.float16)


def foreign_strategy(run):
    shutil.rmtree(run / "strategy")
    write_strategy(run / "strategy", [{"other.weight": Cut((2, 2), (0, -1))}])


def smaller_strategy(run):
    shutil.rmtree(run / "strategy")
    write_strategy(run / "strategy", [{"lm_head.weight": Cut((2,), (0, -1))}])


def truncated_strategy(run):
    for file in (run / "strategy").iterdir():
        content = file.read_bytes()[:-40]
        file.unlink()
        file.write_bytes(content)


def ranks_of(number, change):
    def apply(run):
        rewrite(run / "checkpoint" / f"rank_{number}" / f"telechat_rank_{number}-2_9.ckpt", change)

    return apply


LAST = "adam_v.lm_head.weight"
REFUSED = {
    "missing rank": (lambda run: shutil.rmtree(run / "checkpoint" / "rank_2"), "ranks are missing: rank_2"),
    "empty rank": (lambda run: next((run / "checkpoint/rank_1").glob("*.ckpt")).unlink(), "rank_1: holds no .ckpt"),
    "foreign strategy": (foreign_strategy, "does not know .*strategy is that of another run"),
    "strategy of fewer ranks": (smaller_strategy, "another number of ranks than the strategy .expected 2, found 4"),
    "truncated strategy": (truncated_strategy, "is not a well-formed strategy file"),
    "copies": (ranks_of(2, bump("model.norm_out.weight", 7)), "norm_out.weight: is not the same in two ranks.*rank_2"),
    "counters": (ranks_of(3, bump("global_step")), "different steps: global_step is 18 in rank 0 and 19 in rank 3"),
    "loss scale": (ranks_of(3, bump("loss_scale")), "loss_scale: is not the same in two ranks"),
    "lost piece": (ranks_of(1, drop(LAST)), f"rank 1: lacks {LAST}"),
    "dtype": (ranks_of(1, narrow), "rank 1: lm_head.weight has another dtype or shape than in rank 0"),
}


@pytest.mark.parametrize(("damage", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_whole_is_refused_by_name(run, tmp_path, damage, message):
    damage(run)
    with pytest.raises(TelechatMindieError, match=message):
        redistribute(run, tmp_path / "out", Redistribution(ranks=True))
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.partial").exists()


def test_a_strategy_that_does_not_fit_the_tensors_is_refused(dense, run, tmp_path):
    write_strategy(tmp_path / "other", layouts(weights_of(dense[1]), tp=3))
    with pytest.raises(CheckpointError, match=r"cannot be divided as the strategy says.*multiple of 3"):
        redistribute(run, tmp_path / "out", Redistribution(strategy=tmp_path / "other"))
    stages = layouts(weights_of(dense[1]) | {"more.weight": np.ones(4)}, tp=2)
    write_strategy(tmp_path / "more", stages)
    with pytest.raises(CheckpointError, match=r"asks for 1 weights that the checkpoint does not have: more.weight"):
        redistribute(run, tmp_path / "out", Redistribution(strategy=tmp_path / "more"))
    stages[0]["lm_head.weight"] = Cut((1, 2), (0,))
    del stages[0]["more.weight"]
    write_strategy(tmp_path / "axes", stages)
    with pytest.raises(CheckpointError, match="another number of axes than the strategy says"):
        redistribute(run, tmp_path / "out", Redistribution(strategy=tmp_path / "axes"))


@pytest.mark.parametrize(
    "division", [{"tp": 2}, {"dp": 2}, {"dp": 2, "zero": -1}, {"tp": 4, "vocab_dp": True}], ids=str
)
def test_shapes_without_doubt_need_no_strategy(dense, tmp_path, division):
    hf, arrays = dense
    write_run(tmp_path / "output", arrays, layouts(weights_of(arrays), **division))
    shutil.rmtree(tmp_path / "output" / "strategy")
    redistribute(tmp_path / "output", tmp_path / "whole.ckpt", Redistribution(), hf)
    assert_same(load(tmp_path / "whole.ckpt"), arrays | counters())
    assert open_checkpoint(tmp_path / "output", hf).config == open_checkpoint(hf).config
    with pytest.raises(CheckpointError, match=r"no config.json says.*ckpt_strategy_rank_N\.ckpt"):
        open_checkpoint(tmp_path / "output")


@pytest.mark.parametrize("kinds", [("moments", "accu_grads"), ("moment1", "moment2")], ids=str)
def test_every_optimizer_is_divided_as_its_parameters(dense, tmp_path, kinds):
    hf, arrays = dense
    optimizer = {"adam_m.": f"{kinds[0]}.", "adam_v.": f"{kinds[1]}."}
    for rank, held in enumerate(rank_arrays(arrays, layouts(weights_of(arrays), tp=2))):
        renamed = {optimizer.get(name[:7], name[:7]) + name[7:]: array for name, array in held.items()}
        write_ckpt(tmp_path / f"output/checkpoint/rank_{rank}/t_rank_{rank}-2_9.ckpt", renamed | counters())
    redistribute(tmp_path / "output", tmp_path / "whole.ckpt", Redistribution(), hf)
    expected = {optimizer.get(name[:7], name[:7]) + name[7:]: array for name, array in arrays.items()}
    assert_same(load(tmp_path / "whole.ckpt"), expected | counters())


def test_a_config_that_is_not_needed_is_not_read(dense, run, tmp_path, command):
    (run / "config.json").write_text("no JSON")
    redistribute(run, tmp_path / "whole.ckpt", Redistribution())
    assert_same(load(tmp_path / "whole.ckpt"), dense[1] | counters())
    assert command("info", run)[0] == 0
    shutil.rmtree(run / "strategy")
    assert command("info", run)[0] == 2
    with pytest.raises(ConfigError, match=r"config\.json"):
        redistribute(run, tmp_path / "x.ckpt", Redistribution())


def test_the_config_beside_a_file_is_taken(dense, tmp_path):
    hf, arrays = dense
    write_run(tmp_path / "output", arrays, layouts(weights_of(arrays), tp=2))
    first = tmp_path / "first" / "telechat_rank_0-2_9.ckpt"
    first.parent.mkdir()
    (tmp_path / "output/checkpoint/rank_0" / first.name).rename(first)
    shutil.rmtree(tmp_path / "output/checkpoint/rank_0")
    shutil.copy(hf / "config.json", first.parent)
    shutil.rmtree(tmp_path / "output" / "strategy")
    choice = RunChoice(sources=(tmp_path / "output",))
    redistribute(first, tmp_path / "whole.ckpt", Redistribution(choice=choice))
    assert_same(load(tmp_path / "whole.ckpt"), arrays | counters())


@pytest.mark.parametrize(
    ("division", "doubt"),
    [({"tp": 2, "dp": 2}, "is .* of"), ({"tp": 2, "stages": 2}, "as with pipeline stages")],
    ids=str,
)
def test_where_there_is_doubt_the_strategy_is_asked_for(dense, tmp_path, division, doubt):
    hf, arrays = dense
    write_run(tmp_path / "output", arrays, layouts(weights_of(arrays), **division))
    (tmp_path / "output" / "strategy").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=doubt + r".*--strategy: a folder of ckpt_strategy_rank_N\.ckpt"):
        open_checkpoint(tmp_path / "output", hf)
    choice = RunChoice(strategy=tmp_path / "elsewhere")
    assert open_checkpoint(tmp_path / "output", hf, choice=choice).kind == "mindformers training, 4 ranks, step 2_9"


def test_files_of_all_ranks_in_one_folder_and_renamed_ones(dense, run, tmp_path):
    flat = tmp_path / "flat" / "checkpoint"
    flat.mkdir(parents=True)
    for file in (run / "checkpoint").glob("*/*.ckpt"):
        shutil.copy(file, flat / file.name)
    shutil.copytree(run / "strategy", tmp_path / "flat" / "strategy")
    redistribute(tmp_path / "flat", tmp_path / "flat.ckpt", Redistribution())
    for rank in range(4):
        folder = tmp_path / "renamed" / f"rank_{rank}"
        folder.mkdir(parents=True)
        shutil.copy(flat / f"telechat_rank_{rank}-2_9.ckpt", folder / f"checkpoint_{rank}.ckpt")
    choice = RunChoice(strategy=run / "strategy" / "ckpt_strategy_rank_0.ckpt")
    redistribute(tmp_path / "renamed", tmp_path / "renamed.ckpt", Redistribution(choice=choice))
    for name in ("flat", "renamed"):
        assert_same(load(tmp_path / f"{name}.ckpt"), dense[1] | counters())
    with pytest.raises(InputError, match="no steps"):
        redistribute(tmp_path / "renamed", tmp_path / "x", Redistribution(choice=RunChoice(step="2_9")))


def test_files_that_cannot_be_told_apart_are_refused(run, tmp_path):
    folder = run / "checkpoint" / "rank_1"
    shutil.copy(folder / "telechat_rank_1-2_9.ckpt", folder / "telechat_rank_1_1-2_9.ckpt")
    with pytest.raises(CheckpointError, match="one of several files of the same step"):
        redistribute(run, tmp_path / "x.ckpt", Redistribution())
    (folder / "telechat_rank_1_1-2_9.ckpt").rename(folder / "best.ckpt")
    with pytest.raises(CheckpointError, match=r"best\.ckpt: lies among the checkpoints of a training run"):
        redistribute(run, tmp_path / "x.ckpt", Redistribution())


def test_a_run_on_one_card_needs_no_strategy(dense, tmp_path):
    hf, arrays = dense
    for step in ("1_5", "1_9"):
        write_ckpt(
            tmp_path / "output/checkpoint/rank_0" / f"telechat_rank_0-{step}.ckpt", arrays | counters(int(step[2:]))
        )
    opened = open_checkpoint(tmp_path / "output", hf)
    assert opened.kind == "mindformers training, 1 rank, step 1_9"
    assert opened.weights.keys() == open_checkpoint(hf).weights.keys()


def test_more_ranks_than_files_may_be_open(dense, tmp_path, monkeypatch):
    """32 ranks, of which a reader keeps 3 files open at a time."""
    _, arrays = dense
    stages = layouts(weights_of(arrays), tp=2, dp=16, zero=-1)
    write_run(tmp_path / "output", arrays, stages)
    monkeypatch.setattr(tensors, "MAX_OPEN_FILES", 3)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = sum(1 for _ in Path("/proc/self/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (taken + 12, hard))
    try:
        redistribute(tmp_path / "output", tmp_path / "whole.ckpt", Redistribution())
        redistribute(
            tmp_path / "whole.ckpt", tmp_path / "ranks", Redistribution(strategy=tmp_path / "output" / "strategy")
        )
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert_same(load(tmp_path / "whole.ckpt"), arrays | counters())
    assert_same(load(tmp_path / "ranks/rank_31/checkpoint_31.ckpt"), rank_arrays(arrays, stages)[31] | counters())


def test_parameters_in_slices(dense, run, tmp_path, monkeypatch):
    """MindSpore cuts a parameter over 512 MiB into several values of one name."""
    monkeypatch.setattr(mindspore_format, "SLICE_BYTES", 1000)
    options = Redistribution(strategy=run / "strategy")
    redistribute(run, tmp_path / "sliced", options)
    stored = read_mindspore_ckpt(tmp_path / "sliced" / "rank_0" / "checkpoint_0.ckpt")
    assert len(stored["lm_head.weight"].extents) > 10
    choice = RunChoice(strategy=run / "strategy")
    redistribute(tmp_path / "sliced", tmp_path / "whole.ckpt", Redistribution(choice=choice))
    assert_same(load(tmp_path / "whole.ckpt"), dense[1] | counters())


def test_memory_stays_small(tmp_path):
    """96 MB, cut through its rows, so that every block is put together from both ranks and divided again."""
    cuts = [{"x.weight": Cut((2,), (-1, 0))}]
    array = np.arange(24 << 20, dtype=np.float32).reshape(-1, 4096)
    write_run(tmp_path / "output", {"x.weight": array}, cuts)
    write_strategy(tmp_path / "other", [{"x.weight": Cut((2, 2), (0, 1))}])
    tracemalloc.start()
    try:
        redistribute(tmp_path / "output", tmp_path / "whole.ckpt", Redistribution())
        redistribute(tmp_path / "output", tmp_path / "other_ranks", Redistribution(strategy=tmp_path / "other"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 48 << 20
    assert np.array_equal(load(tmp_path / "whole.ckpt")["x.weight"], array)
    last = load(tmp_path / "other_ranks" / "rank_3" / "checkpoint_3.ckpt")["x.weight"]
    assert np.array_equal(last, array[array.shape[0] // 2 :, 2048:])


def test_an_output_that_is_there_is_kept_but_for_force(run, tmp_path):
    (tmp_path / "out.ckpt").write_text("precious")
    with pytest.raises(TelechatMindieError, match="exists"):
        redistribute(run, tmp_path / "out.ckpt", Redistribution())
    assert (tmp_path / "out.ckpt").read_text() == "precious"
    redistribute(run, tmp_path / "out.ckpt", Redistribution(force=True))
    assert "lm_head.weight" in load(tmp_path / "out.ckpt")


@pytest.fixture
def command(monkeypatch, capfd):
    """Runs the command line in this process: exit code, stdout, stderr."""

    def main(*arguments):
        monkeypatch.setattr(sys, "argv", ["telechat-mindie", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as leave:
            code = leave.code or 0
        return code, *capfd.readouterr()

    return main


def test_every_command_takes_a_run(dense, run, tmp_path, command):
    hf, arrays = dense
    shutil.move(run / "strategy", tmp_path / "elsewhere")
    shutil.move(run / "checkpoint" / "rank_3", tmp_path / "second" / "rank_3")
    which = ("--strategy", tmp_path / "elsewhere", "--source", tmp_path / "second", "--step", "2_9")
    code, out, _ = command("info", run, *which, "--json")
    facts = checked("info-training-run", json.loads(out))
    assert (code, facts["ranks"], facts["step"], facts["stages"], facts["optimizer_shards"]) == (0, 4, "2_9", 1, 2)
    assert facts["counters"]["global_step"] == 18
    assert facts["optimizer"]["tensors"] == 2 * facts["weights"]["tensors"] == 2 * len(weights_of(arrays))
    which = (*which, "--config", hf)
    code, out, _ = command("plan", "--checkpoint", run, *which, "--no-probe", "--json")
    assert (code, json.loads(out)["source"]["dtype"]) == (0, "float32")
    assert command("build", tmp_path / "model", "--checkpoint", run, *which, "--tp", 2)[0] == 0
    code, out, _ = command("verify", tmp_path / "model", "--against", run, *which)
    assert code == 0 and "weights equal" in out
    assert command("convert", run, tmp_path / "hf", "--to", "hf", *which)[0] == 0
    stored = load_file(tmp_path / "hf" / "model-00001-of-00001.safetensors")
    assert_same({"lm_head.weight": stored["lm_head.weight"]}, {"lm_head.weight": arrays["lm_head.weight"]})
    code, out, _ = command("convert", run, tmp_path / "whole.ckpt", "--to", "ckpt", "--keep-optimizer", *which)
    assert code == 0 and "mindformers training, 4 ranks, step 2_9" in out
    assert_same(load(tmp_path / "whole.ckpt"), arrays | counters())
    other = layouts(weights_of(arrays), tp=4)
    write_strategy(tmp_path / "other", other)
    arguments = ("--to", "safetensors", "--to-strategy", tmp_path / "other", *which)
    assert command("convert", run, tmp_path / "ranks", *arguments)[0] == 0
    for rank, held in enumerate(rank_arrays(weights_of(arrays), other)):
        assert_same(load_file(tmp_path / f"ranks/rank_{rank}/checkpoint_{rank}.safetensors"), held)


def test_no_flag_is_ignored(dense, run, tmp_path, command):
    for flag in (("--tp", 2), ("--dtype", "float16"), ("--resume",), ("--qkv-concat",), ("--allow-nonfinite",)):
        code, _, err = command("convert", run, tmp_path / "x", "--to", "ckpt", "--keep-optimizer", *flag)
        assert code == 2 and flag[0] in err, err
    assert command("convert", run, tmp_path / "x", "--to", "hf", "--keep-optimizer")[0] == 2
    code, _, err = command("convert", run, tmp_path / "x", "--to", "hf", "--packed-by-rank", "--config", dense[0])
    assert code == 2 and "cuts no packed weights" in err
    for name, arguments in (("verify", (dense[0],)), ("info", (dense[0],)), ("plan", ("--variant", "7b"))):
        assert command(name, *arguments, "--strategy", run / "strategy")[0] == 2
    code, _, err = command("convert", run, tmp_path / "x", "--to", "ckpt", "--strategy", tmp_path / "nowhere")
    assert code == 2 and "nowhere: strategy is not there" in err


def test_what_holds_no_run_takes_no_flag_of_one(dense, tmp_path, command):
    """Neither a torch archive, nor an index or a config.json before the download."""
    hf, _ = dense
    for name, file in (("torch", "pytorch_model.bin"), ("index", "model.safetensors.index.json"), ("config", "x")):
        (tmp_path / name).mkdir()
        shutil.copy(hf / "config.json", tmp_path / name)
        (tmp_path / name / file).write_text("{}")
        for flag in (("--strategy", tmp_path / "nowhere"), ("--step", "5_1"), ("--packed-by-rank",)):
            for arguments in (
                ("plan", "--checkpoint", tmp_path / name, "--no-probe"),
                ("convert", tmp_path / name, tmp_path / "out", "--to", "hf"),
                ("build", tmp_path / "out", "--checkpoint", tmp_path / name),
            ):
                code, _, err = command(*arguments, *flag)
                assert code == 2 and "no .ckpt or .safetensors file of a training run" in err, err
    for flag in (("--strategy", tmp_path / "nowhere"), ("--step", "5_1"), ("--config", hf)):
        code, _, err = command("plan", "--checkpoint", hf / "config.json", "--no-probe", *flag)
        assert code == 2 and flag[0] in err, err
    assert command("plan", "--checkpoint", tmp_path / "config", "--no-probe")[0] == 0


def transform(*arguments):
    command = [sys.executable, ROOT / "tools" / "transform_ckpt.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_the_published_script_by_its_flags(dense, run, tmp_path):
    _, arrays = dense
    other = layouts(weights_of(arrays), dp=2)
    write_strategy(tmp_path / "other", other)
    source = ("--src_ckpt_dir", run / "checkpoint", "--src_ckpt_strategy", run / "strategy")
    done = transform(*source, "--dst_ckpt_dir", tmp_path / "a", "--prefix", "x_", "--dst_ckpt_strategy", "None")
    assert done.returncode == 0, done.stderr
    assert_same(load(tmp_path / "a" / "rank_0" / "x_0.ckpt"), arrays | counters())
    done = transform(*source, "--dst_ckpt_dir", tmp_path / "b", "--dst_ckpt_strategy", tmp_path / "other")
    assert done.returncode == 0, done.stderr
    for rank, held in enumerate(rank_arrays(arrays, other)):
        assert_same(load(tmp_path / "b" / f"rank_{rank}" / f"checkpoint_{rank}.ckpt"), held | counters())
    done = transform(*source[:2], "--dst_ckpt_dir", tmp_path / "c", "--src_ckpt_strategy", tmp_path / "other")
    assert done.returncode == 2 and "another number of ranks" in done.stderr and "Traceback" not in done.stderr


def test_the_order_of_packed_weights_is_asked_about_everywhere(tmp_path, command):
    hf, arrays = _model(tmp_path, packed=True)
    write_run(tmp_path / "output", arrays, layouts(weights_of(arrays), tp=2))
    which = (tmp_path / "output", "--config", hf)
    code, out, _ = command("plan", "--checkpoint", *which, "--no-probe", "--json")
    assert code == 0 and "--packed-by-rank" in json.loads(out)["note"]
    code, out, _ = command("plan", "--checkpoint", *which, "--no-probe", "--json", "--packed-by-rank")
    assert code == 0 and "note" not in json.loads(out)
    assert command("build", tmp_path / "model", "--checkpoint", hf)[0] == 0
    code, _, err = command("verify", tmp_path / "model", "--against", *which)
    assert code == 0 and "--packed-by-rank" in err
    arguments = ("--src_ckpt_dir", *which, "--tp", 2, "--dst_ckpt_dir")
    done = transform(*arguments, tmp_path / "a")
    assert done.returncode == 0 and "--packed-by-rank" in done.stderr, done.stderr
    done = transform(*arguments, tmp_path / "b", "--packed-by-rank")
    assert done.returncode == 0 and done.stderr == ""
    held = [load(tmp_path / kind / "rank_0" / "checkpoint_0.ckpt") for kind in "ab"]
    assert held[0].keys() == held[1].keys() == weights_of(arrays).keys()
    name = "model.layers.0.attention.w_qkv.weight"
    assert np.array_equal(held[1][name], arrays[name][: len(arrays[name]) // 2])
    assert not np.array_equal(held[0][name], held[1][name])
    done = transform("--src_ckpt_dir", *which, "--dst_ckpt_dir", tmp_path / "c", "--packed-by-rank")
    assert done.returncode == 2 and "is for --tp" in done.stderr


REAL = [
    "dp2pp2_plain",
    "dp2tp2zero",
    "dp2tp2zero_seqpar",
    "dp4tp2zero_shard2",
    "dp4zero_threshold64",
    "moe_dp2ep2_seqpar",
    "tp2",
    "tp2pp2",
    "tp2qkv",
    "tp2vocabdp",
    "tp2vocabdp_noopt",
]


def real_stages(folder):
    """The layouts of real strategy files, read by MindSpore's own class."""
    from mindspore.train.node_strategy_pb2 import ParallelStrategyMap

    stages = {}
    for file in folder.glob("*.ckpt"):
        parsed = ParallelStrategyMap()
        parsed.ParseFromString(file.read_bytes())
        stages[parsed.parallel_strategy_item[0].parallel_strategys.stage] = {
            item.param_name: Cut(
                tuple(item.parallel_layouts.dev_matrix[0].dim),
                tuple(item.parallel_layouts.tensor_map[0].dim),
                item.parallel_layouts.opt_weight_shard_size,
            )
            for item in parsed.parallel_layout_item
        }
    return [stages[number] for number in sorted(stages)]


@pytest.mark.parametrize("name", REAL)
def test_real_strategies_merge_and_divide(shared, tmp_path, name):
    folder = shared(f"training/strategies/{name}")
    rng = np.random.default_rng(0)
    shapes = json.loads((folder / "params.json").read_text())
    arrays = {n: rng.standard_normal(s, np.float32) for n, s in shapes.items() if s and not n.startswith("accu")}
    stages = real_stages(folder)
    arrays = {n: array for n, array in arrays.items() if any(n in stage for stage in stages)}
    for rank, held in enumerate(rank_arrays(arrays, stages)):
        write_ckpt(tmp_path / f"output/checkpoint/rank_{rank}/t_rank_{rank}-2_9.ckpt", held | counters())
    choice = RunChoice(strategy=folder)
    redistribute(tmp_path / "output", tmp_path / "whole.ckpt", Redistribution(choice=choice))
    assert_same(load(tmp_path / "whole.ckpt"), arrays | counters())
    redistribute(tmp_path / "whole.ckpt", tmp_path / "again", Redistribution(strategy=folder))
    for rank, held in enumerate(rank_arrays(arrays, stages)):
        assert_same(load(tmp_path / f"again/rank_{rank}/checkpoint_{rank}.ckpt"), held | counters())
