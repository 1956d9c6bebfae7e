"""Ten thousand steps with requests that come and go: nothing grows and no block is lost."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from helpers.checkpoints import make_checkpoint

from telechat_mindie.engine.config import EngineConfig
from telechat_mindie.engine.engine import Engine
from telechat_mindie.engine.params import GenerationParams
from telechat_mindie.model_dir.build import BuildOptions, build

STEPS, BLOCKS = 10_000, 64


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def prompt(rng):
    """Half of the prompts begin alike, so that blocks are shared."""
    ids = rng.integers(9, 480, rng.integers(1, 60))
    if rng.integers(2):
        ids[:40] = np.arange(100, 100 + len(ids[:40]))
    return ids.tolist()


@pytest.mark.slow
def test_ten_thousand_steps(tmp_path):
    from telechat_mindie import ModelRunner

    make_checkpoint(tmp_path / "ckpt", "float32", n_layer=1)
    build(tmp_path / "model", tmp_path / "ckpt", BuildOptions(dtype="float32"))
    runner = ModelRunner(str(tmp_path / "model"), 1, 0, 16, num_blocks=BLOCKS)
    config = EngineConfig(
        max_seq_len=128,
        max_input_token_len=64,
        max_batch_size=8,
        max_prefill_batch_size=4,
        max_prefill_tokens=128,
        block_size=16,
        prefix_cache=True,
    )
    engine = Engine(runner, runner.tokenizer, config)
    rng = np.random.default_rng(0)
    memory, durations, streams = {}, [], []
    for step in range(STEPS):
        while len(streams) < 6 + 2 * rng.integers(3):
            params = GenerationParams(max_new_tokens=int(rng.integers(1, 60)), ignore_eos=True)
            streams.append(engine.add(prompt(rng), params))
        if rng.random() < 0.02:
            engine.cancel(streams.pop(rng.integers(len(streams))).request_id)
        begin = time.perf_counter()
        outputs = engine.step()
        durations.append(time.perf_counter() - begin)
        ended = {output.request_id for output in outputs if output.finish_reason is not None}
        assert all(output.error is None for output in outputs)
        streams = [stream for stream in streams if stream.request_id not in ended]
        if step % 1000 == 999:
            memory[step] = resident_bytes()
    for stream in streams:
        engine.cancel(stream.request_id)
    engine.step()
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.swapped) == (0, 0, 0)
    assert stats.blocks_used == 0 < stats.cached_tokens
    assert stats.generated_tokens > 3 * STEPS
    # Buckets compile and allocators settle in the first steps; after that memory is flat.
    assert memory[STEPS - 1] - memory[2999] < 16 << 20, memory
    halves = np.median(durations[2000:6000]), np.median(durations[6000:])
    print(f"median step {halves[0] * 1e3:.2f} ms in the first half, {halves[1] * 1e3:.2f} ms in the second")
