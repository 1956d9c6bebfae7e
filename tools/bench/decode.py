"""Time per decode step and per prefill of this package's CPU kernels, beside whatever peers are installed.

    python tools/bench/decode.py [--sizes 30M 105M 400M] [--batches 1 8] [--peer-python PYTHON] [--json]

Random TeleChat2-shaped models; the same tokens and weights for everyone, each engine in a process of its own that
sleeps while another is measured, in turns that change direction every round. Peers are Hugging Face transformers on
torch (needs torch, transformers, safetensors, ml_dtypes) and llama.cpp (needs llama-cpp-python, gguf, safetensors,
ml_dtypes), sought in --peer-python. Reported are medians over rounds of the median step, and the weight bytes that a
step reads over its time, beside what numpy reads of a large array with as many threads.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from telechat_mindie.checkpoint.mapping import weights
from telechat_mindie.config import TelechatConfig
from telechat_mindie.dtypes import DTYPES, WEIGHT_DTYPES

SIZES = {
    "30M": {"hidden_size": 512, "n_layer": 8, "n_head": 4, "ffn_hidden_size": 1280, "vocab_size": 8192},
    "105M": {"hidden_size": 768, "n_layer": 12, "n_head": 6, "ffn_hidden_size": 2304, "vocab_size": 8192},
    "400M": {"hidden_size": 1280, "n_layer": 18, "n_head": 10, "ffn_hidden_size": 3584, "vocab_size": 16384},
}
"""Heads of 128, as every TeleChat2 has."""

PEERS = {"transformers": ("torch", "transformers"), "llama.cpp": ("llama_cpp", "gguf")}
NEEDED_BY_PEERS = ("safetensors", "ml_dtypes")


class Worker:
    """An engine in its own process."""

    def __init__(self, name: str, python: str, folder: Path, threads: int) -> None:
        script = Path(__file__).with_name("contenders.py")
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TELECHAT_CPU_THREADS": str(threads)}
        self.name = name
        self._process = subprocess.Popen(
            [python, str(script), name, str(folder), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._answer()

    def measure(self, batch: int, prompt: int, steps: int) -> dict[str, list[float]]:
        assert self._process.stdin is not None  # it was asked for
        print(json.dumps({"batch": batch, "prompt": prompt, "steps": steps}), file=self._process.stdin, flush=True)
        return self._answer()

    def stop(self) -> None:
        self._process.communicate("")

    def _answer(self) -> dict[str, list[float]]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("RESULT "):
                answer: dict[str, list[float]] = json.loads(line.removeprefix("RESULT "))
                return answer
        raise SystemExit(f"error: {self.name} ended with exit code {self._process.wait()}")


def write_model(folder: Path, size: str, dtype: str) -> TelechatConfig:
    """Random weights and the config.json that names their shape."""
    shape = SIZES[size]
    data = shape | {
        "model_type": "telechat",
        "num_key_value_heads": shape["n_head"],
        "layer_norm_epsilon": 1e-5,
        "training_seqlen": 8192,
        "base_seqlen": 8192,
        "seq_length": 8192,
        "torch_dtype": dtype,
    }
    config = TelechatConfig.from_dict(data)
    random = np.random.default_rng(0)
    arrays = {}
    for weight in weights(config).values():
        values = random.standard_normal(weight.shape, np.float32) * 0.03
        arrays[weight.name] = (values + (len(weight.shape) == 1 and "norm" in weight.name)).astype(DTYPES[dtype].numpy)
    save_file(arrays, folder / "weights.safetensors")
    (folder / "config.json").write_text(json.dumps(data))
    return config


def read_bandwidth(threads: int) -> float:
    """Bytes a second that numpy reads of arrays larger than any cache, the best of five."""
    arrays = [np.ones(256 << 20, np.uint8) for _ in range(threads)]
    best = 0.0
    for _ in range(5):
        readers = [threading.Thread(target=array.max) for array in arrays]
        begin = time.perf_counter()
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        best = max(best, sum(array.nbytes for array in arrays) / (time.perf_counter() - begin))
    return best


def installed_peers(python: str) -> list[str]:
    """Peers whose packages `python` can import."""
    probe = "import importlib.util, sys; print([n for n in sys.argv[1:] if importlib.util.find_spec(n)])"
    modules = sorted({module for needed in PEERS.values() for module in needed} | set(NEEDED_BY_PEERS))
    found = subprocess.run([python, "-c", probe, *modules], capture_output=True, text=True, check=True).stdout
    return [peer for peer, needed in PEERS.items() if all(repr(m) in found for m in (*needed, *NEEDED_BY_PEERS))]


def bench(size: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each engine and batch size."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = write_model(folder, size, arguments.dtype)
        ours = [(engine, sys.executable) for engine in ("native", "mindspore")]
        peers = [(engine, arguments.peer_python) for engine in installed_peers(arguments.peer_python)]
        chosen = [(engine, python) for engine, python in ours + peers if engine in arguments.engines]
        workers = [Worker(engine, python, folder, arguments.threads) for engine, python in chosen]
        try:
            runs: dict[tuple[str, int], list[dict[str, list[float]]]] = {}
            for batch in arguments.batches:
                for number in range(arguments.rounds + 1):
                    for worker in workers[:: 1 if number % 2 else -1]:
                        run = worker.measure(batch, arguments.prompt, arguments.steps)
                        if number:  # the first compiles graphs and warms caches
                            runs.setdefault((worker.name, batch), []).append(run)
        finally:
            for worker in workers:
                worker.stop()
    reference = {batch: found[0]["logits"] for (engine, batch), found in runs.items() if engine == workers[0].name}
    read = (config.parameter_count - config.vocab_size * config.hidden_size) * DTYPES[arguments.dtype].itemsize
    rows = []
    for (engine, batch), found in runs.items():
        steps = [statistics.median(run["decode"]) for run in found]
        # MindSpore's kernels hold their weights in float32.
        seen = read * 4 // DTYPES[arguments.dtype].itemsize if engine == "mindspore" else read
        difference = np.abs(np.subtract(found[0]["logits"], reference[batch])).max()
        rows.append(
            {
                "size": size,
                "dtype": arguments.dtype,
                "engine": engine,
                "batch": batch,
                "prefill_ms": statistics.median(run["prefill"][0] for run in found) * 1e3,
                "step_ms": statistics.median(steps) * 1e3,
                "best_step_ms": min(steps) * 1e3,
                "weights_gb_s": seen / statistics.median(steps) / 1e9,
                "logits_differ": float(difference),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--batches", nargs="+", type=int, choices=range(1, 9), default=[1, 8])
    parser.add_argument("--dtype", choices=WEIGHT_DTYPES, default="bfloat16")
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--steps", type=int, default=64, help="tokens of each sequence")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--engines", nargs="+", default=["native", "mindspore", *PEERS])
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has the peers' packages")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    bandwidth = read_bandwidth(arguments.threads)
    rows = [row for size in arguments.sizes for row in bench(size, arguments)]
    if arguments.json:
        print(json.dumps({"threads": arguments.threads, "read_gb_s": bandwidth / 1e9, "rows": rows}, indent=2))
        return
    print(f"{arguments.threads} threads, numpy reads {bandwidth / 1e9:.1f} GB/s; prompt {arguments.prompt}")
    print(
        "| size | engine | batch | prefill ms | step ms | best ms | weights GB/s | logits differ |\n" + "|---" * 8 + "|"
    )
    for row in rows:
        numbers = [f"{row[key]:.2f}" for key in ("prefill_ms", "step_ms", "best_step_ms", "weights_gb_s")]
        print(
            f"| {row['size']} {row['dtype']} | {row['engine']} | {row['batch']} | {' | '.join(numbers)} | "
            f"{row['logits_differ']:.1e} |"
        )


if __name__ == "__main__":
    main()
