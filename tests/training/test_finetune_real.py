"""The command with its real steps: killed and resumed to the same bits, and an adapter that is what was trained."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers.checkpoints import make_checkpoint

from telechat_mindie.training.arrays import StoredArrays
from telechat_mindie.training.curve import read_points

pytestmark = pytest.mark.slow

STEPS = 6
LORA = ("--lora", "4,8", "--learning-rate", "0.02", "--steps", STEPS, "--save-every", 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    make_checkpoint(path / "base")
    lines = [json.dumps({"input": f"生抽{number}", "output": "咸。"}, ensure_ascii=False) for number in range(12)]
    (path / "data.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return path


def started(folder, model, output, *options):
    common = ["data.jsonl", "-o", output, "--max-length", "223", "--batch-size", "4", "--micro-batch", "2", "--json"]
    command = [sys.executable, "-m", "telechat_mindie", "finetune", model, *common, *map(str, options)]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process):
    output, said = process.communicate(timeout=500)
    assert process.returncode == 0, said
    return json.loads(output)


def wait_for_a_checkpoint(process, run):
    while not list(run.glob("checkpoints/step-*")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)


@pytest.fixture(scope="module")
def whole(folder):
    return finished(started(folder, "base", "whole", *LORA, "--eval", "data.jsonl"))


def test_killed_and_resumed_it_ends_with_the_same_bits(folder, whole):
    process = started(folder, "base", "killed", *LORA)
    wait_for_a_checkpoint(process, folder / "killed")
    time.sleep(random.Random(1).uniform(0, 0.1))
    process.kill()
    process.communicate()
    assert not (folder / "killed" / "adapter").exists()
    finished(started(folder, "base", "killed", *LORA, "--resume"))
    for name in (f"checkpoints/step-{STEPS:08}/rank_0.safetensors", "adapter/adapter_model.safetensors"):
        assert (folder / "killed" / name).read_bytes() == (folder / "whole" / name).read_bytes(), name


def test_two_ranks_end_with_one_step_and_go_on_to_what_one_process_trains(folder, whole):
    arguments = (folder, "base", "ranks", *LORA, "--dp", 2)
    process = started(*arguments)
    wait_for_a_checkpoint(process, folder / "ranks")
    process.terminate()
    _, said = process.communicate(timeout=500)
    assert process.returncode == 128 + signal.SIGTERM and f"of {STEPS} is saved; go on with" in said
    finished(started(*arguments, "--resume"))
    file = f"checkpoints/step-{STEPS:08}/rank_0.safetensors"
    one, two = (StoredArrays(folder / run / file) for run in ("whole", "ranks"))
    assert one.keys() == two.keys()
    for name, array in one.items():
        np.testing.assert_allclose(two[name], array, rtol=0, atol=1e-4, err_msg=name)


def test_the_merged_adapter_is_the_model_that_was_trained(folder, whole):
    command = ["convert", "base", "merged", "--to", "hf", "--adapter", "whole/adapter"]
    subprocess.run([sys.executable, "-m", "telechat_mindie", *command], cwd=folder, check=True, capture_output=True)
    # The first step of a warm-up has the learning rate 0, so that what is evaluated is the checkpoint itself.
    merged = finished(started(folder, "merged", "again", "--eval", "data.jsonl", "--steps", 1, "--warmup", 1))
    assert merged["eval_loss"] == pytest.approx(whole["eval_loss"], abs=1e-4)
    assert read_points(folder / "whole" / "loss.csv")[0].loss > whole["eval_loss"] + 0.5
