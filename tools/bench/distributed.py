"""How fast a training run's ranks are merged, beside mindspore.transform_checkpoints.

    python tools/bench/distributed.py [--gb 1.9] [--rounds 3] [--work DIR] [--json]

makes a synthetic run of 4 ranks (tensor parallel 2, data parallel 2, optimizer parallel; random values, float32, with
the optimizer's state) and its strategy files, and measures in turn: MindSpore's own merge, and `transform_ckpt.py` of
this package. Each runs in a process of its own that writes to a fresh folder, followed by sync. What they write is
compared tensor by tensor. Peak memory is sampled: RssAnon is what the process really holds.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
from convert import run

from telechat_mindie.checkpoint.formats.containers import MINDSPORE_CKPT
from telechat_mindie.checkpoint.formats.mindspore import read_mindspore_ckpt
from telechat_mindie.checkpoint.formats.tensors import TensorReader

HIDDEN, FFN, VOCABULARY, TP, DP = 2048, 6144, 8192, 2, 2
LAYER = {
    "attention.wq.weight": ((HIDDEN, HIDDEN), 0),
    "attention.wk_v.weight": ((2 * HIDDEN, HIDDEN), 0),
    "attention.wo.weight": ((HIDDEN, HIDDEN), 1),
    "attention.wo.bias": ((HIDDEN,), None),
    "attention_norm.weight": ((HIDDEN,), None),
    "feed_forward.w1.weight": ((FFN, HIDDEN), 0),
    "feed_forward.w2.weight": ((HIDDEN, FFN), 1),
    "feed_forward.w3.weight": ((FFN, HIDDEN), 0),
}
"""Shape, and the axis that tensor parallelism cuts."""

PUBLISHED = """
import sys, mindspore
source, strategy, output, merged = sys.argv[1:]
mindspore.merge_pipeline_strategys(strategy, merged)
mindspore.transform_checkpoints(source, output, "checkpoint_", merged, None)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=1.9, help="size of the merged checkpoint")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=None, help="folder on the disk to measure")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--skip-published", action="store_true", help="measure this package alone")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        result = measure(Path(work), options.gb, options.rounds, not options.skip_published)
    print(json.dumps(result, indent=2) if options.json else "\n".join(f"{k}: {v}" for k, v in result.items()))


def parameters(gigabytes: float) -> dict[str, tuple[tuple[int, ...], int | None]]:
    """The model's parameters for a merged checkpoint of about that size, which holds each three times in float32."""
    ends: dict[str, tuple[tuple[int, ...], int | None]] = {
        "model.tok_embeddings.embedding_weight": ((VOCABULARY, HIDDEN), 0),
        "model.norm_out.weight": ((HIDDEN,), None),
        "lm_head.weight": ((VOCABULARY, HIDDEN), 0),
    }
    count = sum(int(np.prod(shape)) for shape, _ in LAYER.values())
    layers = max(1, round((gigabytes * 1e9 / 12 - sum(int(np.prod(shape)) for shape, _ in ends.values())) / count))
    for layer in range(layers):
        ends |= {f"model.layers.{layer}.{name}": entry for name, entry in LAYER.items()}
    return {prefix + name: entry for prefix in ("", "adam_m.", "adam_v.") for name, entry in ends.items()}


def make_run(folder: Path, gigabytes: float) -> int:
    """Write checkpoint/rank_N and strategy/; gives the bytes of the merged checkpoint."""
    from mindspore.train.node_strategy_pb2 import ParallelStrategyMap

    wanted = parameters(gigabytes)
    strategy = ParallelStrategyMap(current_stage=1)
    node = strategy.parallel_strategy_item.add(node_name="MatMul")
    node.parallel_strategys.stage = 0
    for name, (shape, axis) in wanted.items():
        layouts = strategy.parallel_layout_item.add(param_name=name).parallel_layouts
        layouts.dev_matrix.add(dim=[DP, TP])
        layouts.tensor_map.add(dim=[0 if number == axis else -1 for number in range(len(shape))])
        layouts.param_split_shape.add()
        layouts.indices_offset.add()
        layouts.field, layouts.opt_weight_shard_step = 0, TP if axis is not None else 0
        layouts.opt_weight_shard_size = -1 if axis is not None else 0
    (folder / "strategy").mkdir(parents=True)
    for rank in range(DP * TP):
        (folder / "strategy" / f"ckpt_strategy_rank_{rank}.ckpt").write_bytes(strategy.SerializeToString())
        rng, common = np.random.default_rng(rank), np.random.default_rng(99)
        path = folder / "checkpoint" / f"rank_{rank}" / f"telechat_rank_{rank}-1_9.ckpt"
        path.parent.mkdir(parents=True)
        with open(path, "wb") as file:
            for name, (shape, axis) in wanted.items():
                piece = list(shape)
                if axis is not None:
                    piece[axis] //= TP
                    piece[0] //= DP
                frames = MINDSPORE_CKPT.frames([(name, "float32", tuple(piece))])
                file.write(frames[0].prefix)
                source = common if axis is None else rng  # what is not cut is the same in all ranks
                file.write(source.standard_normal(piece, dtype=np.float32).tobytes())
    return sum(4 * int(np.prod(shape)) for shape, _ in wanted.values())


def measure(work: Path, gigabytes: float, rounds: int, with_published: bool) -> dict[str, object]:
    nbytes = make_run(work / "output", gigabytes)
    checkpoint, strategy = work / "output" / "checkpoint", work / "output" / "strategy"
    script = Path(__file__).parents[1] / "transform_ckpt.py"
    commands = {
        "transform_ckpt.py": [
            sys.executable, str(script), "--src_ckpt_dir", str(checkpoint), "--src_ckpt_strategy", str(strategy),
            "--dst_ckpt_dir", str(work / "transform_ckpt.py"),
        ],
        "mindspore.transform_checkpoints": [
            sys.executable, "-c", PUBLISHED, str(checkpoint), str(strategy),
            str(work / "mindspore.transform_checkpoints"), str(work / "merged.ckpt"),
        ],
    }  # fmt: skip
    if not with_published:
        del commands["mindspore.transform_checkpoints"]
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for number in range(rounds):
        for name, command in commands.items():
            shutil.rmtree(work / name, ignore_errors=True)
            samples[name].append(run(command))
            print(f"round {number + 1}: {name}: {samples[name][-1]['seconds']:.1f} s", file=sys.stderr)
    if with_published:
        compare(*(work / name / "rank_0" / "checkpoint_0.ckpt" for name in commands))
    result: dict[str, object] = {"bytes": nbytes}
    for name, measured in samples.items():
        result[f"{name}, seconds"] = [round(sample["seconds"], 2) for sample in measured]
        result[f"{name}, peak anonymous MB"] = round(max(sample["anonymous"] for sample in measured) / 1e6)
    if with_published:
        ours, theirs = (statistics.median(sample["seconds"] for sample in samples[name]) for name in commands)
        result["times as fast"] = round(theirs / ours, 2)
    return result


def compare(ours: Path, theirs: Path) -> None:
    """Raises SystemExit where the two files do not hold the same."""
    found, expected = read_mindspore_ckpt(ours), read_mindspore_ckpt(theirs)
    with TensorReader() as reader:
        for name, tensor in expected.items():
            if name not in found or reader.load(found[name]).tobytes() != reader.load(tensor).tobytes():
                raise SystemExit(f"{name} is not the same")
    if found.keys() != expected.keys():
        raise SystemExit("the files hold different tensors")


if __name__ == "__main__":
    main()
