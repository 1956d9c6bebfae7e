"""The steps of a run: accumulation, evaluation, checkpoints, an early end, and a resume that changes nothing."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers import ROOT
from helpers.stand_in_trainer import StandInTrainer, make_rows

from telechat_mindie.training.checkpoints import Checkpoints
from telechat_mindie.training.curve import Curve, read_points
from telechat_mindie.training.loop import Loop, Plan, TrainingError
from telechat_mindie.training.order import Order
from telechat_mindie.training.stop import Listener, Stop

STEPS = 12
SCRIPT = ROOT / "tests" / "helpers" / "stand_in_trainer.py"


def go(folder, trainer=None, *, plan=None, held_out=None, end=None, shuffle=True):
    """A run in this process; its trainer."""
    trainer = trainer or StandInTrainer()
    folder.mkdir(exist_ok=True)
    rows = make_rows(folder / "rows")
    checkpoints = Checkpoints(folder / "checkpoints", 2)
    checkpoints.clean()
    order = Order(len(rows), 0, shuffle, end)
    plan = plan or Plan(STEPS, 4, 2, save_every=2)
    loop = Loop(trainer, rows, held_out, order, plan, checkpoints, {}, curve=Curve(folder, trainer.step))
    trainer.complete = loop.run(Stop(folder))
    return trainer


def started(folder, dp=1, tp=1, *, seconds=0.0, steps=STEPS):
    """The ranks of a run, each in a process of its own, which begin their first step together."""
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    make_rows(folder / "rows")
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "PATH": ""}
    processes = []
    for rank in range(dp * tp):
        command = [sys.executable, SCRIPT, folder / "rows", 5, folder, steps, seconds, rank, dp, tp]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        processes.append(subprocess.Popen(list(map(str, command)), text=True, env=environment, **pipes))
    for process in processes:
        assert process.stdout.readline() == "ready\n", process.stderr.read()
    for process in processes:
        process.stdin.close()
    return processes


def newest_state(folder, step=STEPS):
    checkpoints = Checkpoints(folder / "checkpoints", 2)
    assert checkpoints.steps()[-1] == step
    return dict(checkpoints.load_rank(checkpoints.facts(step), 0))


def test_a_step_takes_its_rows_in_micro_batches(tmp_path):
    trainer = go(tmp_path / "run", plan=Plan(2, 4, 2), shuffle=False)
    assert trainer.seen == [[10, 11], [12, 13], [14, 15], [16, 17]] and trainer.complete


def test_the_last_step_of_an_epoch_goes_on_with_the_next_and_the_last_of_all_is_filled_up(tmp_path):
    trainer = go(tmp_path / "run", plan=Plan(4, 4, 4), shuffle=False, end=13)
    assert trainer.seen[2:] == [[18, 19, 20, 10], [11, 3, 3, 3]]


def test_evaluation_takes_every_held_out_row_once(tmp_path):
    held_out = make_rows(tmp_path / "held-out", count=5, first=100)
    seen = []

    class Evaluated(StandInTrainer):
        def evaluate(self, batch):
            seen.append(batch.input_ids[:, 0].tolist())
            return super().evaluate(batch)

    go(tmp_path / "run", Evaluated(), plan=Plan(5, 4, 2, eval_every=2), held_out=held_out)
    assert seen[:3] == [[100, 101], [102, 103], [104, 3]] and len(seen) == 9
    points = read_points(tmp_path / "run" / "loss.csv")
    assert [point.eval_loss for point in points] == [None, 2.0, None, 2.0, 2.0]


def test_checkpoints_say_where_in_the_data_they_are(tmp_path):
    go(tmp_path / "run", plan=Plan(6, 4, 2, save_every=3))
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", 2)
    assert checkpoints.steps() == [3, 6]
    assert [(facts.epoch, facts.row) for facts in map(checkpoints.facts, (3, 6))] == [(1, 1), (2, 2)]


def test_a_checkpoint_is_written_without_a_second_state_in_memory(tmp_path):
    asked = []

    class Asked(StandInTrainer):
        def state(self, *, copied=True):
            asked.append(copied)
            return super().state()

    go(tmp_path / "run", Asked(), plan=Plan(2, 4, 2, save_every=1))
    assert asked == [False, False]


def test_killed_at_any_moment_and_resumed_it_ends_with_the_same_bits(tmp_path):
    expected = go(tmp_path / "whole").state()
    dice = random.Random(0)
    for _ in range(4):
        (process,) = started(tmp_path / "killed", seconds=0.05)
        time.sleep(dice.uniform(0.0, 0.2))
        process.kill()
        assert process.wait() == -signal.SIGKILL
    (process,) = started(tmp_path / "killed")
    assert process.wait(60) == 0, process.stderr.read()
    found = newest_state(tmp_path / "killed")
    assert expected.keys() == found.keys()
    for name, array in expected.items():
        assert np.array_equal(found[name], array), name
    whole, killed = (read_points(tmp_path / name / "loss.csv") for name in ("whole", "killed"))
    assert [point.loss for point in killed] == [point.loss for point in whole] and len(killed) == STEPS


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_after_the_step_and_saves(tmp_path, number):
    (process,) = started(tmp_path / "run", seconds=0.3, steps=1000)
    time.sleep(0.45)
    process.send_signal(number)
    assert process.wait(30) == 128 + number and "finishing the step and saving" in process.stderr.read()
    (step,) = Checkpoints(tmp_path / "run" / "checkpoints", 2).steps()[-1:]
    assert len(read_points(tmp_path / "run" / "loss.csv")) == step
    trainer = StandInTrainer()
    trainer.load_state(newest_state(tmp_path / "run", step))
    assert trainer.step == step


def test_every_rank_ends_with_the_same_step(tmp_path):
    """The signal comes in the middle of a step; the other ranks may be ahead of the first or behind it."""
    first, other = (Stop(tmp_path, rank, 2) for rank in range(2))
    with Listener(tmp_path) as listener:
        assert not first.after(6) and not other.after(6)
        os.kill(os.getpid(), signal.SIGTERM)
        assert listener.signal == signal.SIGTERM
        assert not other.after(7)  # has finished a step before the first rank has announced one
        assert not first.after(7) and not other.after(7)
        assert other.after(8) and first.after(8)


def test_a_second_signal_ends_at_once(tmp_path):
    with pytest.raises(KeyboardInterrupt), Listener(tmp_path):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_loss_that_is_no_number_ends_it_and_names_the_last_checkpoint(tmp_path):
    with pytest.raises(TrainingError, match=r"step 6: the loss is no number .*Step 4 is saved.*--learning-rate"):
        go(tmp_path / "run", StandInTrainer(nan_at=6))
    with pytest.raises(TrainingError, match=r"step 1: .*No step is saved"):
        go(tmp_path / "other", StandInTrainer(nan_at=1))
    assert Checkpoints(tmp_path / "run" / "checkpoints", 2).steps() == [2, 4]


def test_tensor_parallel_ranks_save_a_file_each_and_copies_of_the_model_none(tmp_path):
    run = tmp_path / "run"
    for process in started(run, dp=2, tp=2):
        assert process.wait(60) == 0, process.stderr.read()
    path = run / "checkpoints" / f"step-{STEPS:08}"
    assert sorted(file.name for file in path.iterdir()) == ["rank_0.safetensors", "rank_1.safetensors", "run.json"]
