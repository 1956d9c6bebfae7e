"""How fast `build` converts, beside copying the same bytes and beside loading everything.

    python tools/bench/convert.py [--gb 4] [--rounds 5] [--dtype float16] [--work DIR] [--json]

makes a synthetic 7B-shaped checkpoint of the given size (random values: nothing compresses, no file has holes) and
measures in turn, several times: `cp -r` and sync of it; `build` for tensor parallel 1 and 8; and a converter that, like
the published one, loads every shard, copies every tensor and saves the lot, at float16 and at its default float32.
Each runs in a process of its own that writes to a fresh folder, followed by sync. Peak memory is sampled: RssAnon is
what the process really holds, RSS includes pages of mapped files.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from telechat_mindie.checkpoint.formats.containers import SAFETENSORS
from telechat_mindie.checkpoint.mapping import hugging_face_targets
from telechat_mindie.checkpoint.plan import make_plan
from telechat_mindie.config import TelechatConfig
from telechat_mindie.dtypes import DTYPES, WEIGHT_DTYPES
from telechat_mindie.nano import write_checkpoint

SHAPE = {"vocab_size": 32768, "hidden_size": 4096, "n_head": 32, "num_key_value_heads": 8, "ffn_hidden_size": 12288}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=4.0, help="size of the checkpoint")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float16", choices=WEIGHT_DTYPES)
    parser.add_argument("--work", type=Path, default=None, help="folder on the disk to measure")
    parser.add_argument("--skip-load-all", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--load-all", nargs=3, metavar=("CHECKPOINT", "OUTPUT", "DTYPE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load_all:
        load_all(Path(options.load_all[0]), Path(options.load_all[1]), options.load_all[2])
        return
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        result = measure(Path(work), options.gb, options.rounds, options.dtype, not options.skip_load_all)
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        print_table(result)


def make_checkpoint(directory: Path, gigabytes: float, dtype: str) -> int:
    """Write a checkpoint of about that size; gives the bytes of its weights."""
    write_checkpoint(directory)
    (directory / "model.safetensors").unlink()
    one = TelechatConfig.from_dict({"model_type": "telechat", "n_layer": 1, **SHAPE})
    two = TelechatConfig.from_dict({"model_type": "telechat", "n_layer": 2, **SHAPE})
    layer = two.weight_bytes(dtype) - one.weight_bytes(dtype)
    layers = max(1, round((gigabytes * 1e9 - one.weight_bytes(dtype)) / layer) + 1)
    data = {"model_type": "telechat", "n_layer": layers, "torch_dtype": dtype, **SHAPE}
    (directory / "config.json").write_text(json.dumps(data))
    config = TelechatConfig.from_dict(data)
    rng = np.random.default_rng(0)
    plan = make_plan(config, hugging_face_targets(config), dtype, folder="")
    for shard in plan.shards:
        with open(directory / shard.file, "wb") as file:
            file.write(SAFETENSORS.frames([(t.name, dtype, t.shape) for t in shard.targets])[0].prefix)
            for target in shard.targets:
                left = int(np.prod(target.shape))
                while left:
                    count = min(left, 1 << 22)
                    file.write(
                        (rng.standard_normal(count, dtype=np.float32) * 0.02).astype(DTYPES[dtype].numpy).tobytes()
                    )
                    left -= count
    os.sync()
    return config.weight_bytes(dtype)


def measure(work: Path, gigabytes: float, rounds: int, dtype: str, with_load_all: bool) -> dict[str, object]:
    source = work / "checkpoint"
    nbytes = make_checkpoint(source, gigabytes, dtype)
    build = [sys.executable, "-m", "telechat_mindie", "build"]
    runs: dict[str, Callable[[Path], list[str]]] = {
        "cp -r": lambda out: ["cp", "-r", str(source), str(out)],
        "build tp 1": lambda out: [*build, str(out), "--checkpoint", str(source)],
        "build tp 8": lambda out: [*build, str(out), "--checkpoint", str(source), "--tp", "8"],
    }
    if with_load_all:
        for kind in ("float16", "float32"):
            runs[f"load everything, {kind}"] = lambda out, kind=kind: [  # type: ignore[misc]
                sys.executable, __file__, "--load-all", str(source), str(out), kind,
            ]  # fmt: skip
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    for number in range(rounds):
        for name, command in runs.items():
            if "float32" in name and number:
                continue  # slow, and only there to show what the published default costs
            out = work / "out"
            measured[name].append(run(command(out)))
            shutil.rmtree(out, ignore_errors=True)
            os.sync()
            print(f"round {number + 1}: {name}: {measured[name][-1]['seconds']:.1f} s", file=sys.stderr)
    base = statistics.median(sample["seconds"] for sample in measured["cp -r"])
    rows = {}
    for name, samples in measured.items():
        seconds = statistics.median(sample["seconds"] for sample in samples)
        rows[name] = {
            "seconds": seconds,
            "all_seconds": [round(sample["seconds"], 2) for sample in samples],
            "ratio_to_cp": seconds / base,
            "gb_per_second": nbytes / seconds / 1e9,
            "peak_rss_mb": max(sample["rss"] for sample in samples) / 1e6,
            "peak_anonymous_mb": max(sample["anonymous"] for sample in samples) / 1e6,
        }
    return {"checkpoint_bytes": nbytes, "dtype": dtype, "rounds": rounds, "runs": rows}


def run(command: list[str]) -> dict[str, float]:
    """Seconds until the command has ended and the disk is synced, and the process's peak memory in bytes."""
    begin = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak = {"rss": 0.0, "anonymous": 0.0}
    watcher = threading.Thread(target=watch, args=(process, peak))
    watcher.start()
    code = process.wait()
    os.sync()
    seconds = time.monotonic() - begin
    watcher.join()
    if code:
        raise SystemExit(f"{' '.join(command)} exited with {code}")
    return {"seconds": seconds, **peak}


def watch(process: subprocess.Popen[bytes], peak: dict[str, float]) -> None:
    names = {"VmRSS:": "rss", "RssAnon:": "anonymous"}
    while process.poll() is None:
        try:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        except OSError:
            return
        for line in lines:
            key, _, value = line.partition("\t")
            if key in names:
                peak[names[key]] = max(peak[names[key]], int(value.split()[0]) * 1024.0)
        time.sleep(0.02)


def load_all(checkpoint: Path, output: Path, dtype: str) -> None:
    """What the published convert_weight.py does, in numpy: all shards, a second list of all tensors, one file."""
    import ml_dtypes  # noqa: F401 - makes numpy know bfloat16
    from safetensors.numpy import load_file, save_file

    shards = [load_file(file) for file in sorted(checkpoint.glob("*.safetensors"))]
    tensors = {}
    for shard in shards:
        for name, value in shard.items():
            tensors[name] = value.astype(DTYPES[dtype].numpy)
    output.mkdir()
    save_file(tensors, output / "model.safetensors")


def print_table(result: dict[str, object]) -> None:
    from telechat_mindie.commands.output import print_table as table

    rows = [
        (
            name,
            f"{row['seconds']:.1f}",
            f"{row['ratio_to_cp']:.2f}",
            f"{row['gb_per_second']:.2f}",
            f"{row['peak_rss_mb']:.0f}",
            f"{row['peak_anonymous_mb']:.0f}",
        )
        for name, row in result["runs"].items()  # type: ignore[attr-defined]
    ]
    title = f"{result['checkpoint_bytes'] / 1e9:.2f} GB of {result['dtype']}, medians of {result['rounds']}"  # type: ignore[operator]
    table(title, rows, ("", "s", "x cp", "GB/s", "peak RSS MB", "peak anonymous MB"))


if __name__ == "__main__":
    main()
