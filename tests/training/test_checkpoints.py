"""Checkpoints of a run are whole or not there, checked when read, and of the newest few."""

from __future__ import annotations

import json
import threading

import numpy as np
import pytest

from telechat_mindie.errors import CheckpointError, OutputError
from telechat_mindie.training.checkpoints import Checkpoints

SETTINGS = {"--seed": 3}


@pytest.fixture
def checkpoints(tmp_path):
    made = Checkpoints(tmp_path / "checkpoints", keep=2)
    made.clean()
    return made


def state(value):
    return {"a": np.full((3, 4), value, np.float32), "adam_m.a": np.zeros(5, np.float32), "global_step": np.array([7])}


def save(checkpoints, step, value=1.0, ranks=1):
    for rank in range(ranks):
        checkpoints.save_rank(step, rank, state(value + rank))
    return checkpoints.commit(step, (1, 2), ranks, SETTINGS)


def test_what_is_saved_is_read(checkpoints):
    path = save(checkpoints, 120, ranks=2)
    assert path.name == "step-00000120" and checkpoints.steps() == [120]
    assert sorted(file.name for file in path.iterdir()) == ["rank_0.safetensors", "rank_1.safetensors", "run.json"]
    facts = checkpoints.facts(120)
    assert (facts.step, facts.epoch, facts.row, facts.ranks, facts.settings) == (120, 1, 2, 2, SETTINGS)
    for rank in range(2):
        loaded = checkpoints.load_rank(facts, rank)
        for name, array in state(1.0 + rank).items():
            assert loaded[name].dtype == array.dtype and np.array_equal(loaded[name], array)


def test_the_newest_are_kept(checkpoints):
    for step in (5, 10, 100_000_000, 20):
        save(checkpoints, step)
    assert checkpoints.steps() == [20, 100_000_000]


def test_a_checkpoint_has_no_name_before_every_rank_has_written(checkpoints):
    checkpoints.save_rank(4, 0, state(1.0))
    with pytest.raises(OutputError, match=r"was not written by every rank \(expected rank_1.done\)"):
        checkpoints.commit(4, (0, 0), 2, SETTINGS, wait=0.05)
    assert checkpoints.steps() == []
    late = threading.Timer(0.1, checkpoints.save_rank, (4, 1, state(2.0)))
    late.start()
    checkpoints.commit(4, (0, 0), 2, SETTINGS)
    assert checkpoints.steps() == [4] and late.join() is None


def test_what_a_killed_run_left_is_removed(checkpoints, tmp_path):
    save(checkpoints, 4)
    checkpoints.save_rank(6, 1, state(9.0))
    (tmp_path / "checkpoints/.step-00000002.old").mkdir()
    checkpoints.clean()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000004"]


def test_a_full_disk_leaves_the_checkpoints_before(checkpoints, monkeypatch):
    save(checkpoints, 4)

    def full(self, pieces):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("telechat_mindie.checkpoint.direct_io.SequentialFile.write", full)
    with pytest.raises(OutputError, match=r"No space left on device.*Free some space"):
        save(checkpoints, 6)
    assert checkpoints.steps() == [4]


@pytest.mark.parametrize("damage", [lambda raw: raw[:-1], lambda raw: raw[:-1] + b"\x01", lambda raw: b""])
def test_a_damaged_file_is_named_and_what_to_do(checkpoints, damage):
    file = save(checkpoints, 4) / "rank_0.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CheckpointError, match=r"step-00000004/rank_0.safetensors: .*Remove .*step-00000004"):
        checkpoints.load_rank(checkpoints.facts(4), 0)


def test_another_file_in_its_place_is_refused(checkpoints):
    path = save(checkpoints, 4)
    (path / "run.json").write_text(json.dumps({"step": 4}))
    with pytest.raises(CheckpointError, match="is not a checkpoint of `finetune`"):
        checkpoints.facts(4)
