"""Time of a finetuning step of this package, beside torch's where that is installed.

    python tools/bench/finetune.py [--sizes nano 105M] [--tokens 1024] [--rounds 5] [--peer-python PYTHON] [--json]

A step is the loss of rows of 256 random tokens, every one a label, its gradients, clipping and AdamW, in float32. The
peer is transformers' Llama of the same shape with torch.optim.AdamW (needs torch and transformers, sought in
--peer-python): a dense TeleChat2 is one, but for the biases of two of its projections. Engines are processes of their
own that take steps in turn, in an order that changes every round, so that a busy machine is busy for both. Reported are
medians of the steps' wall times and of the processor time that they took. The default is nano alone: 25 seconds of
a processor, nearly all of them to compile.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

LENGTH = 256
SIZES = {
    "nano": {"hidden": 192, "layers": 4, "heads": 6, "kv_heads": 2, "ffn": 512, "vocab": 2400},
    "30M": {"hidden": 512, "layers": 8, "heads": 4, "kv_heads": 4, "ffn": 1280, "vocab": 8192},
    "105M": {"hidden": 768, "layers": 12, "heads": 6, "kv_heads": 6, "ffn": 2304, "vocab": 8192},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["nano"])
    parser.add_argument("--tokens", type=int, default=1024, help=f"of a step, a multiple of {LENGTH}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", nargs=4, metavar=("ENGINE", "SIZE", "TOKENS", "THREADS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        engine, size, tokens, threads = arguments.worker
        serve(ENGINES[engine](SIZES[size], int(tokens), int(threads)))
        return
    rows = []
    for size in arguments.sizes:
        print(f"{size}: compiling, then {arguments.rounds} rounds ...", file=sys.stderr, flush=True)
        for row in bench(size, arguments):
            rows.append(row)
            if not arguments.json:
                line = "{size:6} {engine:6} {wall_ms:8.0f} ms a step, {cpu_ms:8.0f} ms of processors"
                print(line.format(**row), flush=True)
    if arguments.json:
        print(json.dumps(rows, indent=2))


def bench(size: str, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each engine."""
    pythons = {"ours": sys.executable}
    probe = "import torch, transformers"
    if subprocess.run([arguments.peer_python, "-c", probe], stderr=subprocess.DEVNULL, check=False).returncode == 0:
        pythons["torch"] = arguments.peer_python
    workers = {
        engine: subprocess.Popen(
            [python, __file__, "--worker", engine, size, str(arguments.tokens), str(arguments.threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(arguments.threads)},
        )
        for engine, python in pythons.items()
    }
    times: dict[str, list[tuple[float, float]]] = {engine: [] for engine in workers}
    try:
        for number in range(arguments.rounds + 1):
            for engine in list(workers)[:: 1 if number % 2 else -1]:
                measured = step(workers[engine], engine)
                if number:  # the first compiles graphs and touches memory
                    times[engine].append(measured)
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()
    for engine, steps in times.items():
        wall, cpu = (1e3 * statistics.median(side) for side in zip(*steps, strict=True))
        yield {"size": size, "tokens": arguments.tokens, "engine": engine, "wall_ms": wall, "cpu_ms": cpu}


def step(worker: subprocess.Popen[str], engine: str) -> tuple[float, float]:
    assert worker.stdin and worker.stdout
    print("step", file=worker.stdin, flush=True)
    for line in worker.stdout:
        if line.startswith("RESULT "):
            wall, cpu = json.loads(line.removeprefix("RESULT "))
            return wall, cpu
    raise SystemExit(f"error: {engine} ended with exit code {worker.wait()}")


def serve(take_step: Callable[[], object]) -> None:
    """Take a step for each line of input, and say the seconds that it took, of the clock and of processors."""
    for _ in sys.stdin:
        begin, used = time.perf_counter(), _processor_seconds()
        take_step()
        result = time.perf_counter() - begin, _processor_seconds() - used
        print("RESULT", json.dumps(result), flush=True)


def _processor_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def ours(shape: dict[str, int], tokens: int, threads: int) -> Callable[[], object]:
    import numpy as np

    from telechat_mindie.checkpoint.mapping import weights
    from telechat_mindie.config import TelechatConfig
    from telechat_mindie.training.rows import Batch
    from telechat_mindie.training.settings import Optimization
    from telechat_mindie.training.trainer import Trainer
    from telechat_mindie.training.weights import array_weights, decoder_targets

    config = TelechatConfig(
        vocab_size=shape["vocab"],
        hidden_size=shape["hidden"],
        num_layers=shape["layers"],
        num_heads=shape["heads"],
        num_kv_heads=shape["kv_heads"],
        ffn_size=shape["ffn"],
    )
    random = np.random.default_rng(0)
    arrays = {}
    for weight in weights(config).values():
        values = random.standard_normal(weight.shape, np.float32) * 0.02
        arrays[weight.name] = values + float(len(weight.shape) == 1 and "norm" in weight.name)
    trainer = Trainer(config, array_weights(arrays, decoder_targets(config)), Optimization(1e-4, 1000))
    ids = random.integers(7, shape["vocab"], (tokens // LENGTH, LENGTH + 1)).astype(np.int32)
    batch = Batch(ids, ids)

    def take_step() -> object:
        trainer.accumulate(batch)
        return trainer.update()

    return take_step


def torch(shape: dict[str, int], tokens: int, threads: int) -> Callable[[], object]:
    import torch  # type: ignore[import-not-found]
    from transformers import LlamaConfig, LlamaForCausalLM  # type: ignore[import-not-found]

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape["vocab"],
        hidden_size=shape["hidden"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        intermediate_size=shape["ffn"],
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)
    ids = torch.randint(7, shape["vocab"], (tokens // LENGTH, LENGTH + 1))

    def take_step() -> object:
        logits = model(ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return take_step


ENGINES = {"ours": ours, "torch": torch}

if __name__ == "__main__":
    main()
