"""Strategy files and the ranks' checkpoints that belong to them, made without the code that reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from telechat_mindie.checkpoint.formats.mindspore import encode_ckpt_entry_prefix

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Cut:
    """A layout in MindSpore's numbers; `tensor_map` may hold lists."""

    dev_matrix: tuple[int, ...]
    tensor_map: tuple[Any, ...]
    size: int = 0

    @property
    def step(self) -> int:
        return 1 if self.size else 0

    @property
    def ranks(self) -> int:
        return int(np.prod(self.dev_matrix))

    def devices(self) -> list[list[int]]:
        axes = [axis if isinstance(axis, list) else [axis] for axis in self.tensor_map]
        return [[len(self.dev_matrix) - 1 - device for device in axis if device >= 0] for axis in axes]

    def place(self, rank: int) -> tuple[int, ...]:
        """By numpy's own numbering of an array's elements."""
        at = np.unravel_index(rank, self.dev_matrix)
        return tuple(
            int(np.ravel_multi_index([at[d] for d in axis], [self.dev_matrix[d] for d in axis])) if axis else 0
            for axis in self.devices()
        )

    def piece(self, array: np.ndarray, rank: int) -> np.ndarray:
        """What a rank of the stage holds of a whole array."""
        place = self.place(rank)
        group = [other for other in range(self.ranks) if self.place(other) == place]
        for axis, devices in enumerate(self.devices()):
            parts = int(np.prod([self.dev_matrix[d] for d in devices], dtype=int))
            array = np.split(array, parts, axis)[place[axis]]
        size = len(group) if self.size == -1 else self.size or 1
        return np.split(array, size, 0)[group.index(rank) % size] if size > 1 else array


Stage = Mapping[str, Cut]


def varint(value: int) -> bytes:
    value &= 2**64 - 1
    out = b""
    while value > 127:
        out += bytes([value % 128 + 128])
        value //= 128
    return out + bytes([value])


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def nested(field: int, content: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(content)) + content


def protobuf(layouts: Stage, stage: int = 0, *, merged: bool = False, packed: bool = False) -> bytes:
    """A ParallelStrategyMap as MindSpore's compiler writes it; `packed` repeats numbers in the newer way."""

    def dims(field: int, values: Sequence[int]) -> bytes:
        if packed:
            return nested(field, nested(1, b"".join(map(varint, values))))
        return nested(field, b"".join(number(1, value) for value in values))

    node = nested(2, nested(1, b"MatMul_x") + nested(2, number(1, stage) + nested(2, number(1, 1) + number(1, 2))))
    items = []
    for name, cut in layouts.items():
        body = dims(1, cut.dev_matrix)
        if any(isinstance(axis, list) for axis in cut.tensor_map):
            body += b"".join(dims(2, axis if isinstance(axis, list) else [axis]) for axis in cut.tensor_map)
            body += nested(2, b"") if len(cut.tensor_map) == 1 else b""
        else:
            body += dims(2, cut.tensor_map)
        body += nested(3, b"") + nested(4, b"") + number(5, 0) + number(6, cut.step) + number(7, cut.size)
        spelled = f"{stage}-{name}" if merged else name
        items.append(nested(3, nested(1, spelled.encode()) + nested(2, body)))
    return number(1, 1) + node + b"".join(items)


def as_json(layouts: Stage, stage: int = 0) -> bytes:
    items = {
        name: {
            "dev_matrix": list(cut.dev_matrix),
            "tensor_map": list(cut.tensor_map),
            "tensor_shape": [],
            "field": 0,
            "opt_weight_shard_step": cut.step,
            "opt_weight_shard_size": cut.size,
        }
        for name, cut in layouts.items()
    }
    node = {"MatMul_x": {"stage": stage, "parallel_strategy": [[1, 2]]}}
    data = {"current_stage": 1, "parallel_strategy_item": node, "parallel_layout_item": items}
    return json.dumps(data).encode()


def write_strategy(folder: Path, stages: Sequence[Stage], form: str = "ckpt") -> None:
    """The files that every rank saves."""
    folder.mkdir(parents=True, exist_ok=True)
    rank = 0
    for number_, layouts in enumerate(stages):
        content = as_json(layouts, number_) if form == "json" else protobuf(layouts, number_)
        for _ in range(next(iter(layouts.values())).ranks):
            file = folder / f"ckpt_strategy_rank_{rank}.{form}"
            file.write_bytes(content)
            file.chmod(0o400)
            rank += 1


def write_ckpt(path: Path, arrays: Arrays) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        for name, array in arrays.items():
            file.write(encode_ckpt_entry_prefix(name, array.dtype.name, array.shape, array.nbytes))
            file.write(np.ascontiguousarray(array).tobytes())
    path.chmod(0o400)


def counters(step: int = 18) -> Arrays:
    return {
        "scale_sense": np.ones(1, np.float32),
        "global_step": np.full(1, step, np.int32),
        "epoch_num": np.array(2, np.int32),
        "step_num": np.array(step, np.int32),
        "loss_scale": np.array(1, np.float32),
        "beta1_power": np.array(0.9**step, np.float32),
        "global_batch_size": np.array(4, np.int32),
    }


def with_optimizer(arrays: Arrays) -> Arrays:
    rng = np.random.default_rng(1)
    state = {
        f"{kind}.{name}": rng.standard_normal(array.shape, dtype=np.float32)
        for kind in ("adam_m", "adam_v")
        for name, array in arrays.items()
    }
    return arrays | state


def rank_arrays(arrays: Arrays, stages: Sequence[Stage], *, redundant: bool = True) -> list[Arrays]:
    """What each rank holds of whole arrays; without `redundant` one of those that hold copies has it."""
    ranks = []
    for layouts in stages:
        seen: set[tuple[str, bytes]] = set()
        for rank in range(next(iter(layouts.values())).ranks):
            held = {}
            for name, cut in layouts.items():
                if name not in arrays:
                    continue
                piece = cut.piece(arrays[name], rank)
                key = (name, piece.tobytes())
                if redundant or key not in seen:
                    held[name] = piece
                seen.add(key)
            ranks.append(held)
    return ranks


def write_run(
    output: Path, arrays: Arrays, stages: Sequence[Stage], *, step: str = "2_9", redundant: bool = True
) -> None:
    """output/checkpoint and output/strategy, as CheckpointMonitor leaves them."""
    write_strategy(output / "strategy", stages)
    for rank, held in enumerate(rank_arrays(arrays, stages, redundant=redundant)):
        folder = output / "checkpoint" / f"rank_{rank}"
        write_ckpt(folder / f"telechat_rank_{rank}-{step}.ckpt", held | counters())
        (folder / "meta.json").write_text("{}")
