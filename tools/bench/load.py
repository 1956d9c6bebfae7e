"""Time from the start of `generate` to its first token, and the memory that it takes, by the size of the weights.

    python tools/bench/load.py [--gb 0.5 5.7] [--rounds 5] [--dtype float16] [--work DIR] [--json]

builds a synthetic 7B-shaped directory of each size and runs `generate --max-new-tokens 1` in turns with `cat` of the
weights: with their pages in the system's cache (warm), and after it was told to drop them (cold). Each runs in a
process of its own; the time is that of the whole process, interpreter and MindSpore's import included, and peak memory
is sampled: RssAnon is what the process really holds, RSS includes pages of mapped files.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from convert import make_checkpoint, run

from telechat_mindie.dtypes import WEIGHT_DTYPES

COLUMNS = ("", "s", "x cat, cold", "peak RSS MB", "peak anonymous MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, nargs="+", default=[0.5, 5.7], help="size of the weights")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float16", choices=WEIGHT_DTYPES)
    parser.add_argument("--work", type=Path, default=None, help="folder on the disk to measure")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    results = []
    for gigabytes in options.gb:
        with tempfile.TemporaryDirectory(dir=options.work) as work:
            results.append(measure(Path(work), gigabytes, options.rounds, options.dtype))
    if options.json:
        print(json.dumps(results, indent=2))
    else:
        for result in results:
            show(result)


def measure(work: Path, gigabytes: float, rounds: int, dtype: str) -> dict[str, Any]:
    nbytes = make_checkpoint(work / "checkpoint", gigabytes, dtype)
    program = [sys.executable, "-m", "telechat_mindie"]
    build = [*program, "-q", "build", str(work / "model"), "--checkpoint", str(work / "checkpoint")]
    subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
    files = sorted((work / "model" / "rank_0").glob("*.safetensors"))
    generate = [*program, "-q", "generate", str(work / "model"), "hello", "--max-new-tokens", "1"]
    runs = {
        "cat, cold": (["cat", *map(str, files)], True),
        "first token, cold": (generate, True),
        "first token, warm": (generate, False),
    }
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    os.sync()
    for number in range(rounds):
        for name, (command, is_cold) in runs.items():
            if is_cold:
                for file in files:
                    drop_pages(file)
            measured[name].append(run(command))
            print(f"round {number + 1}: {name}: {measured[name][-1]['seconds']:.2f} s", file=sys.stderr)
    rows = {}
    for name, samples in measured.items():
        rows[name] = {
            "seconds": statistics.median(sample["seconds"] for sample in samples),
            "peak_rss_mb": max(sample["rss"] for sample in samples) / 1e6,
            "peak_anonymous_mb": max(sample["anonymous"] for sample in samples) / 1e6,
        }
    return {"weight_bytes": nbytes, "dtype": dtype, "rounds": rounds, "runs": rows}


def drop_pages(file: Path) -> None:
    """Have the system forget a file's content, which must be on the disk."""
    with file.open("rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def show(result: dict[str, Any]) -> None:
    from telechat_mindie.commands.output import print_table

    base = result["runs"]["cat, cold"]["seconds"]
    rows = [
        (
            name,
            f"{row['seconds']:.2f}",
            f"{row['seconds'] / base:.2f}",
            f"{row['peak_rss_mb']:.0f}",
            f"{row['peak_anonymous_mb']:.0f}",
        )
        for name, row in result["runs"].items()
    ]
    title = f"{result['weight_bytes'] / 1e9:.2f} GB of {result['dtype']}, medians of {result['rounds']}"
    print_table(title, rows, COLUMNS)


if __name__ == "__main__":
    main()
