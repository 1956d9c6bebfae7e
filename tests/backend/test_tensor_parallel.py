"""Several ranks, a process each, over MindSpore's CPU collectives: the same logits as one, and a clean end."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from helpers.checkpoints import CONFIG, MOE, make_checkpoint
from helpers.driver import Driver

from telechat_mindie.backend.multi_rank import MultiRankRunner, RankError, open_runner
from telechat_mindie.backend.ranks import join_ranks
from telechat_mindie.backend.wire import receive, send
from telechat_mindie.errors import InputError
from telechat_mindie.model_dir.build import BuildOptions, build

NUM_BLOCKS = 32
BLOCK = 16


def processes_of(path):
    """Command lines that name `path`, with their pids."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            line = (entry / "cmdline").read_bytes()
            if str(path).encode() in line and int(entry.name) != os.getpid():
                found[int(entry.name)] = line
    return found


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """tp -> directory of the same weights, dense GQA and MoE."""
    found = {}
    for kind, changes in (("gqa", {}), ("moe", MOE)):
        root = tmp_path_factory.mktemp(kind)
        make_checkpoint(root / "ckpt", "float32", **changes)
        for tp in (1, 2, 4):
            found[kind, tp] = root / f"tp{tp}"
            build(root / f"tp{tp}", root / "ckpt", BuildOptions(dtype="float32", tp=tp))
    return found


def conversation(runner):
    """Logits of a prefill of three prompts and of four decode steps."""
    rng = np.random.default_rng(5)
    driver = Driver(runner, BLOCK, NUM_BLOCKS)
    prompts = [rng.integers(0, CONFIG["vocab_size"], length) for length in (3, 17, 40)]
    tables = [driver.table(len(prompt) + 4) for prompt in prompts]
    found = [driver.prefill(prompts, tables)]
    for step in range(4):
        tokens = rng.integers(0, CONFIG["vocab_size"], 3)
        found.append(driver.decode(tokens, [len(prompt) + step for prompt in prompts], tables))
    return np.stack(found)


@pytest.fixture(scope="module")
def two_ranks(directories):
    runner = MultiRankRunner(directories["gqa", 2], NUM_BLOCKS, BLOCK, cpu_mem_size=1)
    yield runner
    runner.close()


def test_two_ranks_equal_one(directories, two_ranks):
    alone = conversation(open_runner(directories["gqa", 1], NUM_BLOCKS, BLOCK))
    np.testing.assert_allclose(conversation(two_ranks), alone, atol=1e-4)


def test_what_is_refused_leaves_the_ranks_in_step(two_ranks):
    driver = Driver(two_ranks, BLOCK, NUM_BLOCKS)
    table = driver.table(16)
    before = driver.prefill([np.arange(4, 12)], [table])
    with pytest.raises(InputError, match="slot_mapping"):
        driver.prefill([np.array([9])], [table], slot_mapping=np.array([NUM_BLOCKS * BLOCK]))
    np.testing.assert_array_equal(driver.prefill([np.arange(4, 12)], [table]), before)
    assert two_ranks.npu_num_blocks == NUM_BLOCKS


def test_a_prefills_mask_does_not_travel(two_ranks):
    """A prefix hit as MindIE makes it; its mask says no more than causality, in terabytes here."""
    driver = Driver(two_ranks, BLOCK, NUM_BLOCKS)
    table = driver.table(24)
    ids = np.arange(4, 28)
    plain = driver.prefill([ids], [table])
    hit = {
        "input_ids": ids[16:],
        "valid_length_each_example": np.int32([24]),
        "slot_mapping": driver.slots(table, np.arange(16, 24)),
        "position_ids": np.arange(16, 24),
        "prefill_head_indices": np.array([7]),
        "q_seq_lens": [8],
        "spec_mask": np.broadcast_to(0.0, (8, 1 << 38)),
    }
    np.testing.assert_allclose(driver.prefill([ids], [table], **hit), plain, atol=1e-4)


def test_what_is_too_large_for_the_ranks_is_refused_before_it_is_sent(two_ranks):
    driver = Driver(two_ranks, BLOCK, NUM_BLOCKS)
    table = driver.table(16)
    before = driver.prefill([np.arange(4, 12)], [table])
    with pytest.raises(InputError, match=r"spec_mask: is too large .* found 16.0 GiB, float64"):
        driver.decode([5], [8], [table], spec_mask=np.broadcast_to(0.0, (1, 1 << 31)), q_seq_lens=[1])
    with pytest.raises(InputError, match="spec_mask: cannot go to the ranks"):
        driver.decode([5], [8], [table], spec_mask=np.zeros((1, 16), complex), q_seq_lens=[1])
    with pytest.raises(InputError, match=r"no arrays: are too large .*expected at most 1.0 MiB, found 1.1 MiB"):
        driver.decode([5], [8], [table], adapter_ids=[None] * 200_000)
    np.testing.assert_array_equal(driver.prefill([np.arange(4, 12)], [table]), before)


def test_swap_on_every_rank(two_ranks):
    driver = Driver(two_ranks, BLOCK, NUM_BLOCKS)
    table = driver.table(16)
    driver.prefill([np.arange(4, 14)], [table])
    before = driver.decode([5], [10], [table])
    other = driver.table(16)
    two_ranks.swap(np.array([[table[0], 3]]), True)
    two_ranks.swap(np.array([[3, other[0]]]), False)
    np.testing.assert_array_equal(driver.decode([5], [10], [other]), before)


def test_a_rank_that_dies_ends_the_run(directories, tmp_path):
    """In the middle of a call, and with nothing left running."""
    path = Path(shutil.copytree(directories["gqa", 2], tmp_path / "model"))
    runner = MultiRankRunner(path, NUM_BLOCKS, BLOCK)
    driver = Driver(runner, BLOCK, NUM_BLOCKS)
    table = driver.table(400)
    driver.prefill([np.arange(4, 14)], [table])
    victim = next(pid for pid, line in processes_of(path).items() if b'"rank_id": 1' in line)
    threading.Timer(0.2, os.kill, (victim, signal.SIGKILL)).start()
    begin = time.monotonic()
    with pytest.raises(RankError, match="ended unexpectedly: rank 1 with code -9"):
        while time.monotonic() - begin < 20:
            driver.prefill([np.arange(4, 14)], [table])
    assert time.monotonic() - begin < 15
    with pytest.raises(RankError, match="ranks have ended"):
        driver.prefill([np.arange(4, 14)], [table])
    time.sleep(0.5)
    assert processes_of(path) == {}


def test_a_rank_that_cannot_start_ends_the_run(directories, tmp_path):
    path = Path(shutil.copytree(directories["gqa", 2], tmp_path / "model"))
    shutil.rmtree(path / "rank_1")
    with pytest.raises(Exception, match="rank_1: weights of this rank are missing"):
        MultiRankRunner(path, NUM_BLOCKS, BLOCK)
    time.sleep(0.5)
    assert processes_of(path) == {}


def test_generate_uses_every_rank(tmp_path):
    from telechat_mindie.nano import write_checkpoint

    write_checkpoint(tmp_path / "nano")
    build(tmp_path / "model", tmp_path / "nano", BuildOptions(tp=2))
    command = [sys.executable, "-m", "telechat_mindie", "generate", str(tmp_path / "model"), "生抽与老抽的区别？"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout.startswith("生抽和老抽都是酱油"), done.stderr
    time.sleep(0.5)
    assert processes_of(tmp_path / "model") == {}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "tp"), [("moe", 2), ("moe", 4), ("gqa", 4)])
def test_more_ranks_and_experts(directories, kind, tp):
    alone = conversation(open_runner(directories[kind, 1], NUM_BLOCKS, BLOCK))
    runner = MultiRankRunner(directories[kind, tp], NUM_BLOCKS, BLOCK)
    try:
        np.testing.assert_allclose(conversation(runner), alone, atol=1e-4)
    finally:
        runner.close()


def test_an_environment_of_another_group_is_refused(monkeypatch):
    monkeypatch.setenv("MS_WORKER_NUM", "8")
    with pytest.raises(InputError, match="MS_WORKER_NUM"):
        join_ranks(0, 2, "cpu")
    join_ranks(0, 1, "cpu")  # one rank needs no group


def test_messages():
    ours, theirs = socket.socketpair()
    message = {"method": "forward", "flag": True, "none": None, "list": [1, 2]}
    arrays = {
        "a": np.arange(6, dtype=np.int64).reshape(2, 3),
        "b": np.zeros((0, 3), np.float32),
        "c": np.float32([1.5]),
    }
    send(ours, message | arrays)
    found = receive(theirs)
    for key, value in message.items():
        assert found[key] == value
    for key, value in arrays.items():
        assert found[key].dtype == value.dtype
        np.testing.assert_array_equal(found[key], value)
    ours.sendall((2**31).to_bytes(4, "little"))
    with pytest.raises(ValueError, match="head"):
        receive(theirs)
    head = json.dumps({"values": {}, "arrays": [["x", "object", [1]]]}).encode()
    ours.sendall(len(head).to_bytes(4, "little") + head)
    with pytest.raises(ValueError, match="array x"):
        receive(theirs)
    ours.close()
    with pytest.raises(EOFError):
        receive(theirs)
