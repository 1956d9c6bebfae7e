"""The command: data to a run to a result, what it refuses, and how it goes on. The computed step is a stand-in here."""

from __future__ import annotations

import json
import os
import shlex
import signal
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.checkpoints import make_checkpoint
from helpers.stand_in_trainer import StandInTrainer
from typer.testing import CliRunner

from telechat_mindie.checkpoint.source import open_checkpoint
from telechat_mindie.cli import app
from telechat_mindie.errors import TelechatMindieError
from telechat_mindie.installing import install_extra
from telechat_mindie.training.checkpoints import Checkpoints
from telechat_mindie.training.curve import PICTURE, draw, read_points
from telechat_mindie.training.lora import A, B, initial_factors, trained_modules

RUNNER = CliRunner()
PAIRS = [(f"生抽味道咸吗{number}？", "咸。") for number in range(12)]


class CommandTrainer(StandInTrainer):
    """As the command makes one; `trained` is what it was given."""

    nan_at = stop_at = 0

    def __init__(self, config, weights, optimization, computation, lora, *, rank, device):
        super().__init__(computation, nan_at=self.nan_at)
        self._given, self._config, self._lora = weights, config, lora

    def update(self):
        result = super().update()
        if self.step == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    def trained(self, *, copied=True):
        if self._lora is None:
            return dict(self._given)
        arrays = {}
        for module in trained_modules(self._config, self._lora):
            arrays[module.name + A], arrays[module.name + B] = initial_factors(module, self._lora, 0, 1)
        return arrays


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    monkeypatch.setattr("telechat_mindie.training.trainer.Trainer", CommandTrainer)
    monkeypatch.setattr(
        "telechat_mindie.training.curve.draw", lambda folder, points, title: (folder / PICTURE).touch() or True
    )
    monkeypatch.setenv("TELECHAT_DEVICE", "cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    lines = [json.dumps({"input": question, "output": answer}, ensure_ascii=False) for question, answer in PAIRS]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def run(*arguments, code=0):
    """The command's JSON, its complaint, or where it ended early what it said."""
    result = RUNNER.invoke(app, ["finetune", *map(str, arguments), "--max-length", "223", "--json"])
    if code == 0:
        assert result.exit_code == 0, result.exception
        return json.loads(result.stdout)
    if code == 2:
        assert isinstance(result.exception, TelechatMindieError), result.exception
        return str(result.exception)
    assert result.exit_code == code, result.exception
    return result.stderr


def checkpoint_state(run_folder, step):
    checkpoints = Checkpoints(run_folder / "checkpoints", 2)
    return dict(checkpoints.load_rank(checkpoints.facts(step), 0))


def test_conversations_become_a_model_in_one_step(tmp_path, model, data, monkeypatch):
    monkeypatch.setattr("telechat_mindie.training.curve.draw", draw)
    report = run(model, data, "-o", tmp_path / "run", "--batch-size", 4, "--eval-share", 0.2, "--eval-every", 3)
    assert (report["result"], report["kind"]) == (str(tmp_path / "run" / "model"), "model")
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == ["checkpoints", "finetune.json", "loss.csv", "loss.png", "model"]
    rows = 12 - round(0.2 * 12)
    assert report["steps"] == -(-3 * rows // 4) and report["eval_loss"] == 2.0
    points = read_points(tmp_path / "run" / "loss.csv")
    assert [point.eval_loss is not None for point in points[:4]] == [False, False, True, False]
    assert open_checkpoint(tmp_path / "run" / "model").config == open_checkpoint(model).config


def test_a_lora_run_leaves_an_adapter(tmp_path, model, data):
    report = run(model, data, "-o", tmp_path / "run", "--lora", "4,8,query+dense", "--steps", 2)
    assert report["kind"] == "adapter"
    merged = open_checkpoint(model, adapters=[report["result"]])
    assert [len(adapter.deltas) for adapter in merged.adapters] == [4]
    result = RUNNER.invoke(app, ["finetune", str(model), str(data), "-o", str(tmp_path / "run"), "--resume"])
    assert "--lora" in str(result.exception)  # all weights now: another run


def test_mindrecord_and_held_out_data(tmp_path, model, data):
    made = tmp_path / "made"
    result = RUNNER.invoke(
        app, ["preprocess", str(data), "-o", str(made), "--tokenizer", str(model), "--max-length", "223"]
    )
    assert result.exit_code == 0, result.exception
    from_records = run(model, made, "-o", tmp_path / "one", "--steps", 3, "--eval", data)
    assert from_records["eval_loss"] == 2.0
    run(model, data, "-o", tmp_path / "two", "--steps", 3)
    one, two = (checkpoint_state(tmp_path / name, 3) for name in ("one", "two"))
    assert all(np.array_equal(one[name], two[name]) for name in one)
    complaint = RUNNER.invoke(
        app, ["finetune", str(model), str(made), "-o", str(tmp_path / "x"), "--max-length", "9", "--steps", "1"]
    ).exception
    assert "--max-length: is another length than that of the rows (expected 223, found 9)" in str(complaint)


def test_ended_by_a_signal_it_says_how_to_go_on_and_ends_with_the_same_bits(tmp_path, model, data, monkeypatch):
    arguments = (model, data, "--steps", 6, "--batch-size", 4)
    run(*arguments, "-o", tmp_path / "whole")
    monkeypatch.setattr(CommandTrainer, "stop_at", 4)
    said = run(*arguments, "-o", tmp_path / "run", code=128 + signal.SIGTERM)
    assert "step 4 of 6 is saved; go on with the same command and --resume" in said
    assert not (tmp_path / "run" / "model").exists() and (tmp_path / "run" / "loss.png").exists()
    assert "--resume" in run(*arguments, "-o", tmp_path / "run", code=2)
    monkeypatch.setattr(CommandTrainer, "stop_at", 0)
    assert run(*arguments, "-o", tmp_path / "run", "--resume")["steps"] == 6
    whole, resumed = (checkpoint_state(tmp_path / name, 6) for name in ("whole", "run"))
    assert all(np.array_equal(whole[name], resumed[name]) for name in whole)
    losses = [[point.loss for point in read_points(tmp_path / name / "loss.csv")] for name in ("whole", "run")]
    assert losses[0] == losses[1]
    # Once more: there is nothing left to do, whatever became of the curve.
    (tmp_path / "run" / "loss.csv").unlink()
    monkeypatch.setattr("telechat_mindie.training.run.train_rank", None)
    assert run(*arguments, "-o", tmp_path / "run", "--resume")["steps"] == 6


@pytest.mark.parametrize(
    "changed, named",
    [
        (["--seed", 1], "--seed"),
        (["--learning-rate", 0.5, "--warmup", 1], "--learning-rate, --min-learning-rate, --warmup"),
        (["--batch-size", 2], "--batch-size"),
        (["--no-document-mask"], "--no-document-mask"),
        (["--eval-share", 0.2], "--eval-share"),
    ],
)
def test_a_resume_that_would_be_another_run_is_refused_by_name(tmp_path, model, data, changed, named):
    run(model, data, "-o", tmp_path / "run", "--steps", 1)
    complaint = run(model, data, "-o", tmp_path / "run", "--steps", 1, "--resume", *changed, code=2)
    assert f"step-00000001: was saved with other settings than {named} (expected" in complaint


def test_a_resume_with_other_data_or_another_model_is_refused(tmp_path, model, data):
    run(model, data, "-o", tmp_path / "run", "--steps", 1)
    other = tmp_path / "other.jsonl"
    other.write_text(data.read_text() + '\n{"input": "q", "output": "a"}')
    assert "other settings than DATA" in run(model, other, "-o", tmp_path / "run", "--steps", 1, "--resume", code=2)
    make_checkpoint(tmp_path / "model", ffn_hidden_size=128)
    complaint = run(tmp_path / "model", data, "-o", tmp_path / "run", "--steps", 1, "--resume", code=2)
    assert "other settings than MODEL" in complaint
    # What changes nothing of the result may be another.
    run(model, data, "-o", tmp_path / "run", "--steps", 1, "--resume", "--keep", 5, "--save-every", 1, "--eval", data)


def test_a_loss_that_is_no_number_is_told_with_the_step(tmp_path, model, data, monkeypatch):
    monkeypatch.setattr(CommandTrainer, "nan_at", 3)
    complaint = run(model, data, "-o", tmp_path / "run", "--steps", 4, "--save-every", 2, code=2)
    assert complaint.startswith("step 3: the loss is no number any more") and "Step 2 is saved" in complaint
    assert len(read_points(tmp_path / "run" / "loss.csv")) == 2 and (tmp_path / "run" / "loss.png").exists()


def test_more_memory_than_is_free_is_refused_before_anything_is_loaded(tmp_path, model, data, monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1 << 20))
    arguments = (model, data, "-o", tmp_path / "run", "--steps", 1)
    complaint = run(*arguments, code=2)
    assert "1 rank: needs more memory than is free (expected about " in complaint and "found 1.0 MiB" in complaint
    assert "--recompute" not in complaint  # which takes more on a CPU
    assert run(*arguments, "--resume", "--ignore-memory")["steps"] == 1
    # The run that --force is to replace stays until nothing can be refused any more.
    run(*arguments, "--force", code=2)
    run(model, "absent.jsonl", "-o", tmp_path / "run", "--force", "--ignore-memory", code=2)
    assert checkpoint_state(tmp_path / "run", 1) and (tmp_path / "run" / "model").is_dir()
    assert run(*arguments, "--seed", 1, "--force", "--ignore-memory")["steps"] == 1


def test_what_is_said_at_the_end_can_be_typed(tmp_path, model, data, monkeypatch):
    monkeypatch.setattr("telechat_mindie.training.curve.draw", lambda *_: False)
    output = tmp_path / "my run"
    arguments = [str(model), str(data), "-o", str(output), "--steps", "1", "--max-length", "223", "--lora", "4,8"]
    done = RUNNER.invoke(app, ["finetune", *arguments])
    assert done.exit_code == 0, done.exception
    command = done.stdout.splitlines()[-1]
    expected = ["telechat-mindie", "build", "model_path", "--checkpoint", str(model), "--adapter"]
    assert shlex.split(command) == [*expected, str(output / "adapter")]
    assert f"no loss.png: {install_extra('plot')}\n" in done.stderr and "matplotlib" in install_extra("plot")


def test_dry_run_leaves_nothing(tmp_path, model, data):
    facts = run(model, data, "-o", tmp_path / "run", "--batch-size", 4, "--dry-run")
    memory = facts["memory"]
    assert memory["total"] == sum(memory.values()) - memory["total"] > 0 and memory["moments"] == 2 * memory["masters"]
    assert (facts["rows"], facts["steps"], facts["max_length"]) == (12, 9, 223)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--lora", "8"], "--lora: is not understood"),
        (["--lora", "8,16,query+x"], "x"),
        (["--dtype", "fp16"], "--dtype: is unknown (expected fp32 or bf16, found fp16)"),
        (["--steps", 1, "--epochs", 1], "--steps, --epochs"),
        (["--steps", 0], "--steps: is out of range"),
        (["--batch-size", 3, "--micro-batch", 2], "--batch-size: cannot be divided (expected a multiple of"),
        (["--eval-share", 1], "--eval-share: is out of range"),
        (["--eval-share", 0.1, "--eval", "x"], "--eval, --eval-share"),
        (["--eval", "absent"], "absent: is not there"),
        (["--save-dtype", "int8"], "--save-dtype: unknown dtype"),
        (["--lora", "8,16", "--save-dtype", "float32"], "--lora, --save-dtype"),
        (["--tp", 3], "3"),
        (["--learning-rate", -1], "learning_rate: is out of range"),
        (["--epochs", 0], "--epochs: is out of range"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(tmp_path, model, data, arguments, complaint):
    said = run(model, data, "-o", tmp_path / "run", *arguments, code=2)
    assert complaint in said and "\n" not in said
    assert not (tmp_path / "run" / "checkpoints").exists() or not list((tmp_path / "run" / "checkpoints").iterdir())


def test_data_and_models_that_are_none_are_refused(tmp_path, model, data):
    assert "absent: is not there" in run(model, tmp_path / "absent", "-o", tmp_path / "run", code=2)
    assert "checkpoint is not there" in run(tmp_path / "absent", data, "-o", tmp_path / "two", code=2)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"input": "q"}')
    assert f"{bad}:1" in run(model, bad, "-o", tmp_path / "three", code=2)
