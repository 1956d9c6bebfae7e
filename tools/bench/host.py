"""Host time of a call on an NPU: what Python does before and after the graph, with the graph replaced by nothing.

    python tools/bench/host.py [--beside CHECKOUT ...] [--rounds 5] [--json]

For each case, in milliseconds: `calls`, AscendKernels.calls on a checked batch, and `forward`, all of
ModelRunner.forward on MindIE's arguments. Sizes are TeleChat2-7B's, without weights; bytes are those of the tensors
that a call brings to the device. --beside measures other checkouts of this package as well, in turns, each in a process
of its own: a worktree of an older commit is the way to see what a change did. Reported are medians over rounds of the
median call. It needs no NPU, and an idle machine.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
BLOCK_SIZE, MAX_SEQ_LEN, NUM_BLOCKS = 128, 8192, 16384
VOCABULARY = 131072

CASES = {
    "decode, 1": ([1], [4096]),
    "decode, 32": ([1] * 32, [4096] * 32),
    "decode, 200": ([1] * 200, [4096] * 200),
    "prefill, 8192": ([8192], [8192]),
    "prefix hit, 2048 of 8192": ([2048], [8192]),
    "100 decodes and a chunk of 512": ([1] * 100 + [512], [4096] * 101),
}
"""Name -> new tokens and context of each sequence."""


def arguments(query_lens: list[int], context_lens: list[int]) -> dict[str, Any]:
    """What MindIE passes to forward."""
    queries, contexts = np.array(query_lens), np.array(context_lens, np.int32)
    starts = np.cumsum(queries) - queries
    positions = np.arange(queries.sum()) - np.repeat(starts - (contexts - queries), queries)
    prefill = bool((queries > 1).any())
    width = -(-int(contexts.max()) // BLOCK_SIZE)
    tables = (np.arange(len(queries) * width, dtype=np.int32) % NUM_BLOCKS).reshape(-1, width)
    row = np.repeat(np.arange(len(queries)), queries)
    return {
        "input_ids": np.ones(queries.sum(), np.int64),
        "valid_length_each_example": contexts,
        "block_tables": tables,
        "slot_mapping": (tables[row, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE).astype(np.int32),
        "prefill": prefill,
        "position_ids": positions.astype(np.int32),
        "prefill_head_indices": starts + queries - 1 if prefill else None,
        "q_seq_lens": query_lens if prefill and (contexts > queries).any() else None,
    }


def measure(calls: int) -> dict[str, dict[str, float]]:
    """Medians of `calls` calls in seconds, and bytes, of each case, with the package that Python finds."""
    import mindspore as ms

    from telechat_mindie.backend.device import AscendModel
    from telechat_mindie.backend.inputs import BatchLimits, ragged_batch
    from telechat_mindie.backend.model_runner import ModelRunner
    from telechat_mindie.config import TelechatConfig
    from telechat_mindie.model.kernels.ascend import AscendKernels
    from telechat_mindie.model.kernels.ascend_graphs import AscendCache
    from telechat_mindie.model.rope import RotaryTable

    config = TelechatConfig(VOCABULARY, 4096, 1, 32, 12288)
    cache = AscendCache(1, 1, BLOCK_SIZE, config.num_kv_heads, config.head_dim, "float16", on_device=False)
    known = inspect.signature(AscendKernels.__init__).parameters
    named = {"max_seq_len": MAX_SEQ_LEN, "rotary_dtype": "float32"}  # of which earlier commits know one or the other
    options: dict[str, Any] = {name: value for name, value in named.items() if name in known}
    kernels = AscendKernels(config, 1, cache, RotaryTable(config.head_dim), **options)
    limits = BatchLimits(VOCABULARY, NUM_BLOCKS, BLOCK_SIZE, MAX_SEQ_LEN)
    device = AscendModel.__new__(AscendModel)
    rank: Any = SimpleNamespace(directory=SimpleNamespace(config=config))
    device.rank = rank
    device.kernels, device._to_compile = kernels, set()
    runner = ModelRunner.__new__(ModelRunner)
    runner.npu_num_blocks, runner._limits, runner._device = NUM_BLOCKS, limits, device
    found = {}
    for name, lens in CASES.items():
        given = arguments(*lens)
        batch = ragged_batch(limits, **given)
        logits = ms.Tensor(np.zeros((len(batch.logits_rows), VOCABULARY), np.float16))
        nothing: Any = partial(_give, logits)
        device.network = nothing
        call = kernels.calls(batch)[0]
        tensors = [call.token_ids, call.logits_rows, *(tensor for tensor in call.inputs if tensor is not None)]
        found[name] = {
            "calls": _median(partial(kernels.calls, batch), calls),
            "forward": _median(partial(runner.forward, **given), calls),
            "bytes": float(sum(tensor.nbytes for tensor in tensors)),
        }
    return found


def _give(logits: Any, *_: Any) -> Any:
    return logits


def _median(run: Callable[[], object], calls: int) -> float:
    run()
    times = []
    for _ in range(calls):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beside", nargs="*", type=Path, default=[], help="other checkouts of this package")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=21, help="of each case in a round")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(measure(options.calls)))
        return
    packages = [ROOT, *(path.resolve() for path in options.beside)]
    rounds: dict[Path, list[dict[str, dict[str, float]]]] = {package: [] for package in packages}
    for turn in range(options.rounds):
        for package in packages if turn % 2 else reversed(packages):
            command = [sys.executable, str(Path(__file__).resolve()), "--worker", "--calls", str(options.calls)]
            environment = os.environ | {"PYTHONPATH": str(package), "GLOG_v": "3"}
            run = subprocess.run(command, env=environment, cwd=package, stdout=subprocess.PIPE, text=True, check=True)
            rounds[package].append(json.loads(run.stdout.splitlines()[-1]))
    found = {
        str(package): {
            name: {key: statistics.median(one[name][key] for one in made) for key in ("calls", "forward", "bytes")}
            for name in CASES
        }
        for package, made in rounds.items()
    }
    if options.json:
        print(json.dumps(found))
        return
    for package, cases in found.items():
        print(f"{package}\n{'':32}{'calls ms':>10}{'forward ms':>12}{'bytes':>14}")
        for name, case in cases.items():
            print(f"{name:32}{case['calls'] * 1e3:10.3f}{case['forward'] * 1e3:12.3f}{case['bytes']:14,.0f}")


if __name__ == "__main__":
    main()
