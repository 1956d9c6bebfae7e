"""Measure the server and its engine: what batching gains, what it costs, and how well it fills the cache.

Throughput goes through HTTP: a server on telechat2-nano is started, and answers the same requests one after the other
and all at once; beside it stands the most that is to be had, the speed of the model's own forward at that batch size
against one sequence at a time. Overhead and cache use are measured with models that compute nothing, in this process.

    python tools/bench/serve.py [--json] [--requests 32] [--only throughput overhead cache]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from telechat_mindie.client.client import MindieClient
from telechat_mindie.client.dialects import Sampling, Tgi
from telechat_mindie.engine.config import EngineConfig
from telechat_mindie.engine.engine import Engine
from telechat_mindie.engine.params import GenerationParams
from telechat_mindie.model_dir.build import build
from telechat_mindie.nano import write_checkpoint

WORDS = ("生抽与老抽的区别？", "你好", "中国电信是做什么的？", "写一首关于春天的诗", "How are you?")
ANSWER_TOKENS = 64
BLOCK = 16
MEDIAN_STEPS = 200
ROUNDS = 5


class EmptyModel:
    """Logits that are always the same and cost nothing; what each forward was asked for is kept.

    Args:
        blocks: of the cache that it has not.
        vocab_size: width of the logits.
        batch: the most sequences of a forward.
    """

    def __init__(self, blocks: int, vocab_size: int, batch: int) -> None:
        self.npu_num_blocks, self.cpu_num_blocks = blocks, 0
        self.model_config = SimpleNamespace(vocab_size=vocab_size, eos_token_id=2, max_position_embedding=1 << 20)
        self._logits = np.random.default_rng(0).standard_normal((batch, vocab_size), np.float32)
        self._logits[:, 2] = -100
        self.seconds = 0.0  # inside of forward
        self.decodes: list[tuple[int, int]] = []  # (tokens, blocks) of each decode batch

    def forward(self, **arguments: Any) -> NDArray[np.float32]:
        begin = time.perf_counter()
        lengths = arguments["valid_length_each_example"]
        if not arguments["prefill"]:
            self.decodes.append((int(lengths.sum()), int((arguments["block_tables"] >= 0).sum())))
        logits = self._logits[: len(lengths)]
        self.seconds += time.perf_counter() - begin
        return logits

    def swap(self, block_tables: NDArray[np.int64], swap_type: bool) -> None:
        raise SystemExit("error: the engine swaps, though there are no host blocks")


class NoText:
    """A tokenizer whose tokens are nothing."""

    def stream_decoder(self, skip_special_tokens: bool = True, keep: Iterable[str] = ()) -> NoText:
        return self

    def put(self, ids: object) -> str:
        return ""

    def flush(self) -> str:
        return ""


def overhead(batch: int, vocab_size: int, sampled: bool) -> dict[str, Any]:
    """Milliseconds of a decode step outside of the model."""
    model = EmptyModel(batch * 40 + 1, vocab_size, batch)
    limit = MEDIAN_STEPS + 50
    config = EngineConfig(
        max_seq_len=600,
        max_input_token_len=64,
        max_iter_times=limit,
        max_batch_size=batch,
        max_prefill_batch_size=batch,
        max_prefill_tokens=batch * 64,
        block_size=BLOCK,
    )
    engine = Engine(model, NoText(), config)
    params = GenerationParams(do_sample=sampled, top_k=20, top_p=0.9, temperature=0.8, seed=1, ignore_eos=True)
    for _ in range(batch):
        engine.add(list(range(3, 35)), params)
    engine.step()  # the prefill
    times = []
    for _ in range(MEDIAN_STEPS):
        before, begin = model.seconds, time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - begin - (model.seconds - before))
    engine.stop(drain=False)
    return {
        "batch": batch,
        "vocabulary": vocab_size,
        "sampling": "top_k 20, top_p 0.9" if sampled else "greedy",
        "median_ms": statistics.median(times) * 1e3,
        "p99_ms": sorted(times)[int(0.99 * len(times))] * 1e3,
    }


def cache_use(requests: int = 400) -> dict[str, Any]:
    """How full the pool is while requests wait for it, and how much of what is held stays unwritten."""
    random = np.random.default_rng(0)
    model = EmptyModel(400 + 1, 1000, 256)
    config = EngineConfig(
        max_seq_len=1024,
        max_input_token_len=512,
        max_iter_times=512,
        max_batch_size=256,
        max_prefill_batch_size=64,
        max_prefill_tokens=4096,
        block_size=BLOCK,
    )
    engine = Engine(model, NoText(), config)
    for _ in range(requests):
        prompt = random.integers(3, 1000, random.integers(20, 300)).tolist()
        engine.add(prompt, GenerationParams(max_new_tokens=int(random.integers(20, 200)), ignore_eos=True))
    used, waste = [], []
    while engine.stats().waiting:  # as long as there is pressure
        seen = len(model.decodes)
        engine.step()
        for tokens, blocks in model.decodes[seen:]:
            used.append(blocks / (model.npu_num_blocks - 1))
            waste.append(1 - tokens / (blocks * BLOCK))
    preemptions = engine.stats().preemptions
    engine.stop(drain=False)
    return {
        "block_size": BLOCK,
        "blocks": model.npu_num_blocks - 1,
        "requests": requests,
        "used_mean": statistics.mean(used),
        "used_p10": sorted(used)[len(used) // 10],
        "waste_mean": statistics.mean(waste),
        "preemptions": preemptions,
    }


def forward_speed(model_path: Path, batch: int) -> float:
    """Tokens a second of the model's decode alone."""
    from telechat_mindie.backend.model_runner import ModelRunner

    runner = ModelRunner(str(model_path), 0, 0, 128, num_blocks=batch * 2 + 1)
    tables = np.arange(batch * 2, dtype=np.int32).reshape(batch, 2)
    times = []
    for place in range(64, 64 + 40):
        arguments: dict[str, Any] = {
            "input_ids": np.full(batch, 5, np.int64),
            "valid_length_each_example": np.full(batch, place + 1, np.int32),
            "block_tables": tables,
            "slot_mapping": (tables[:, 0] * 128 + place).astype(np.int32),
            "position_ids": np.full(batch, place, np.int32),
        }
        begin = time.perf_counter()
        runner.forward(prefill=False, **arguments).asnumpy()
        times.append(time.perf_counter() - begin)
    return batch / statistics.median(times)


def throughput(model_path: Path, requests: int) -> dict[str, Any]:
    """Tokens a second of the same requests one after the other and all at once, over HTTP."""
    command = [sys.executable, "-m", "telechat_mindie", "serve", str(model_path), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            line = next((line for line in server.stdout or () if "Daemon start success!" in line), "")
            if not line:
                raise SystemExit(f"error: the server ended with exit code {server.wait()}")
            url = line.partition(" at ")[2].split(",")[0].strip()
            asyncio.run(_ask(url, requests, together=True))  # compiles a graph for each size of batch
            runs = [[asyncio.run(_ask(url, requests, together)) for together in (False, True)] for _ in range(ROUNDS)]
        finally:
            server.terminate()
    one, many = forward_speed(model_path, 1), forward_speed(model_path, requests)
    alone, together = (
        statistics.median(tokens / seconds for tokens, seconds in way) for way in zip(*runs, strict=True)
    )
    return {
        "requests": requests,
        "answer_tokens": runs[0][0][0],
        "alone_tokens_s": alone,
        "together_tokens_s": together,
        "gain": together / alone,
        "forward_one_tokens_s": one,
        "forward_batch_tokens_s": many,
        "gain_of_forward": many / one,
    }


async def _ask(url: str, requests: int, together: bool) -> tuple[int, float]:
    """(tokens, seconds)"""

    async def one(number: int) -> int:
        tokens = 0
        sampling = Sampling(max_tokens=ANSWER_TOKENS)
        async for delta in client.stream(Tgi(), WORDS[number % len(WORDS)] * (1 + number % 3), sampling):
            tokens = delta.generated_tokens or tokens
        return tokens

    async with MindieClient(url) as client:
        begin = time.perf_counter()
        if together:
            counts = await asyncio.gather(*map(one, range(requests)))
        else:
            counts = [await one(number) for number in range(requests)]
        return sum(counts), time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--only", nargs="+", choices=("throughput", "overhead", "cache"))
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    sections = arguments.only or ["throughput", "overhead", "cache"]
    figures: dict[str, Any] = {}
    if "overhead" in sections:
        figures["overhead"] = [
            overhead(batch, vocab_size, sampled)
            for vocab_size in (4096, 131072)
            for sampled in (False, True)
            for batch in (1, 32, 256)
        ]
    if "cache" in sections:
        figures["cache"] = cache_use()
    if "throughput" in sections:
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(Path(folder, "checkpoint"))
            build(Path(folder, "nano"), Path(folder, "checkpoint"))
            figures["throughput"] = throughput(Path(folder, "nano"), arguments.requests)
    if arguments.json:
        print(json.dumps(figures, indent=2, ensure_ascii=False))
        return
    for title, rows in figures.items():
        print(f"\n{title}\n")
        rows = rows if isinstance(rows, list) else [rows]
        print("| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
        for row in rows:
            print(
                "| "
                + " | ".join(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row.values())
                + " |"
            )


if __name__ == "__main__":
    main()
