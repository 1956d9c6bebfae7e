"""MindSpore's parallel strategy files: how a run's ranks divide each parameter. Protobuf or .json, without MindSpore.

The layout (mindspore/train/node_strategy.proto and ccsrc/frontend/parallel/strategy_checkpoint):

    ParallelStrategyMap { uint32 current_stage = 1; repeated StrategyItem = 2; repeated LayoutItem = 3 }
    StrategyItem { string node_name = 1; Strategys { uint32 stage = 1; ... } = 2 }
    LayoutItem { string param_name = 1; Layouts = 2 }
    Layouts { repeated DevMatrix { repeated uint32 dim = 1 } = 1; repeated TensorMap { repeated int32 dim = 1 } = 2;
              ParamSplitShape = 3; IndicesOffset = 4; int32 field = 5; opt_weight_shard_step = 6; ..._size = 7 }

Several TensorMaps, of which empty ones do not count, give one axis each, as a layout with an axis over several device
axes has them. The JSON form has the same keys, with objects by name in the place of items. A file is of the pipeline
stage that its first StrategyItem names; in a merged file each name begins with its stage, as `1-model.norm_out.weight`.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from telechat_mindie.checkpoint.formats.bounds import (
    MAX_RANK,
    MAX_TENSORS,
    BoundedFile,
    checked_name,
    open_bounded,
    quoted,
)
from telechat_mindie.checkpoint.formats.wire import LENGTH_DELIMITED, VARINT, Message
from telechat_mindie.errors import CheckpointError, name_some
from telechat_mindie.reading import parse_json

MAX_RUN_RANKS = 65_536
"""Ranks of one training run; TeleChat2-115B's published yaml is for 4,096."""

MAX_FILE_BYTES = 64 << 20
"""Of a strategy file. One of the 115B has about 300 KB."""

_KIND = "strategy file"
_MERGED_NAME = re.compile(r"(\d{1,5})-(.+)")
_SPLIT_SHAPE, _FIELD = 3, 5


@dataclass(frozen=True, slots=True)
class Layout:
    """How the ranks of a stage divide one parameter.

    Attributes:
        devices: the stage's ranks as an array of this shape, in rank order.
        axes: of each axis of the parameter, the axes of `devices` that divide it, outermost first.
        shards: into how many parts axis 0 is cut once more, inside the cut of `axes`, over ranks that would else hold
            copies (optimizer parallelism); 1 where they do hold copies.
    """

    devices: tuple[int, ...]
    axes: tuple[tuple[int, ...], ...]
    shards: int = 1

    @property
    def ranks(self) -> int:
        return math.prod(self.devices)

    @property
    def cuts(self) -> tuple[int, ...]:
        """Parts that each axis is cut into, without `shards`."""
        return tuple(math.prod(self.devices[device] for device in axis) for axis in self.axes)

    def place(self, rank: int) -> tuple[int, ...]:
        """Which part of each axis a rank of the stage, counted from 0, holds or has a share of."""
        at = []
        for size in reversed(self.devices):
            rank, index = divmod(rank, size)
            at.append(index)
        at.reverse()
        place = []
        for axis in self.axes:
            part = 0
            for device in axis:
                part = part * self.devices[device] + at[device]
            place.append(part)
        return tuple(place)

    def groups(self) -> dict[tuple[int, ...], list[int]]:
        """The stage's ranks by place, in rank order: those of a group hold copies, or one shard after the other."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.ranks):
            groups.setdefault(self.place(rank), []).append(rank)
        return groups


Stage = Mapping[str, Layout]
"""The layouts of a pipeline stage by parameter."""


@dataclass(frozen=True)
class Strategy:
    """How a whole run divides its parameters: `stages[s]` are the layouts of ranks s * n .. s * n + n - 1."""

    stages: tuple[Stage, ...]

    @property
    def stage_ranks(self) -> int:
        """Ranks of each stage."""
        return next(iter(self.stages[0].values())).ranks

    @property
    def ranks(self) -> int:
        return len(self.stages) * self.stage_ranks

    @property
    def most_cuts(self) -> int:
        """The most parts that any parameter is cut into by tensor or expert parallelism."""
        return max(math.prod(layout.cuts) for stage in self.stages for layout in stage.values())

    @property
    def most_shards(self) -> int:
        """The most parts that optimizer parallelism cuts any parameter into."""
        return max(layout.shards for stage in self.stages for layout in stage.values())


def read_strategy(paths: Sequence[Path]) -> Strategy:
    """The strategy that files of one run make up together: a merged one, or those of its ranks, which repeat.

    Args:
        paths: files, and folders of files.

    Raises:
        CheckpointError: there are none, one is damaged, a stage is missing, or they are of different runs.
        ConfigError: a .json file is none.
    """
    stages: dict[int, tuple[Stage, Path]] = {}
    seen: set[bytes] = set()
    for file in (file for path in paths for file in strategy_files(path)):
        with open_bounded(file) as opened:
            if opened.size > MAX_FILE_BYTES:
                raise CheckpointError(f"is no {_KIND}: it is too large", where=file, found=f"{opened.size} bytes")
            content = opened.read(0, opened.size)
            digest = hashlib.sha256(content).digest()
            if digest in seen:  # every rank of a stage writes the same
                continue
            seen.add(digest)
            found = _parse_json(content, file) if file.suffix == ".json" else _parse_protobuf(opened)
        for number, layouts in found.items():
            known, first = stages.setdefault(number, (layouts, file))
            if known != layouts:
                raise CheckpointError(
                    f"differs from the strategy of the same stage in {first}",
                    where=file,
                    advice="They are of different runs; leave the files of one in the folder.",
                )
    return _whole({number: stage for number, (stage, _) in stages.items()}, paths)


def strategy_files(path: Path) -> list[Path]:
    """`path` itself, or a folder's files: .ckpt, or else .json. Raises CheckpointError where there are none."""
    if not path.is_dir():
        return [path]
    files = sorted(path.glob("*.ckpt")) or sorted(path.glob("*.json"))
    if not files:
        raise CheckpointError(f"holds no {_KIND}", where=path, expected="ckpt_strategy_rank_N.ckpt or .json")
    return files


def _whole(stages: Mapping[int, Stage], paths: Sequence[Path]) -> Strategy:
    where = " and ".join(str(path) for path in paths[:2])
    if missing := set(range(max(stages) + 1)) - stages.keys():
        ranks = next(iter(stages[max(stages)].values())).ranks
        raise CheckpointError(
            f"the strategy of pipeline stages is missing: {name_some(missing)}",
            where=where,
            advice=f"Add the file of any rank of it, such as ckpt_strategy_rank_{min(missing) * ranks}.ckpt.",
        )
    strategy = Strategy(tuple(stages[number] for number in sorted(stages)))
    for number, stage in enumerate(strategy.stages):
        for name, layout in stage.items():
            if layout.ranks != strategy.stage_ranks:
                raise CheckpointError(
                    "is not divided over the ranks that other parameters are divided over",
                    where=f"{where}: {name} of stage {number}",
                    expected=strategy.stage_ranks,
                    found=layout.ranks,
                )
    if strategy.ranks > MAX_RUN_RANKS:
        raise CheckpointError("is for too many ranks", where=where, expected=f"at most {MAX_RUN_RANKS}")
    return strategy


def _parse_protobuf(file: BoundedFile) -> Mapping[int, Stage]:
    message, file_stage = Message(file, 0, file.size, _KIND), 0
    nodes: list[Message] = []  # the first node alone is looked into
    items: list[Message] = []
    while not message.is_read():
        match message.field():
            case (2, 2):
                node = message.submessage()
                nodes = nodes or [node]
            case (3, 2) if len(items) < MAX_TENSORS:
                items.append(message.submessage())
            case (3, 2):
                raise message.broken(f"more than {MAX_TENSORS} parameters")
            case (_, wire):
                message.skip_field(wire)
    for node in nodes:
        file_stage = _node_stage(node)
    return _by_stage([_read_item(item) for item in items], file_stage, file.path)


def _node_stage(node: Message) -> int:
    while not node.is_read():
        match node.field():
            case (2, 2):
                strategies = node.submessage()
                while not strategies.is_read():
                    match strategies.field():
                        case (1, 0):
                            return strategies.varint()
                        case (_, wire):
                            strategies.skip_field(wire)
            case (_, wire):
                node.skip_field(wire)
    raise node.broken("a node without a pipeline stage")


def _read_item(item: Message) -> tuple[str, Layout]:
    name: str | None = None
    layout: Layout | None = None
    while not item.is_read():
        match item.field():
            case (1, 2) if name is None:
                name = checked_name(item.text(), item.file.path)
            case (2, 2) if layout is None and name is not None:
                layout = _read_layout(name, item.submessage())
            case _:
                raise item.broken("an unknown or repeated field of a parameter")
    if name is None or layout is None:
        raise item.broken("a parameter without a name or a layout")
    return name, layout


def _read_layout(name: str, message: Message) -> Layout:
    lists: dict[int, list[list[int]]] = {1: [], 2: [], _SPLIT_SHAPE: [], 4: []}
    numbers: dict[int, int] = {}
    while not message.is_read():
        match message.field():
            case (number, 2) if number in lists and len(lists[number]) <= MAX_RANK:
                lists[number].append(_read_dims(message.submessage()))
            case (5 | 6 | 7 as number, 0) if number not in numbers:
                numbers[number] = message.signed()
            case (_, wire):
                message.skip_field(wire)
    where = f"{message.file.path}, parameter {name}"
    if len(lists[1]) != 1 or not lists[2]:
        raise CheckpointError("has no layout", where=where, expected="one device matrix and a tensor map")
    axes = [dims for dims in lists[2] if dims] if len(lists[2]) > 1 else [[dim] for dim in lists[2][0]]
    fields = bool(numbers.get(_FIELD) or any(lists[_SPLIT_SHAPE]))
    return _layout(lists[1][0], axes, numbers.get(6, 0), numbers.get(7, 0), fields, where)


def _read_dims(message: Message) -> list[int]:
    dims: list[int] = []
    while not message.is_read():
        number, wire = message.field()
        if number != 1 or wire not in (VARINT, LENGTH_DELIMITED):
            message.skip_field(wire)
            continue
        for dim in message.integers(wire):
            if len(dims) == MAX_RANK:
                raise message.broken(f"more than {MAX_RANK} dimensions")
            dims.append(dim)
    return dims


def _parse_json(content: bytes, path: Path) -> Mapping[int, Stage]:
    try:
        text = content.decode()
    except UnicodeDecodeError:
        raise CheckpointError(f"is no {_KIND}: it is not UTF-8", where=path) from None
    data = parse_json(text, path)
    items = data.get("parallel_layout_item")
    if not isinstance(items, dict) or len(items) > MAX_TENSORS:
        raise CheckpointError("has no layouts", where=path, expected="an object parallel_layout_item")
    nodes = data.get("parallel_strategy_item")
    first = next(iter(nodes.values()), None) if isinstance(nodes, dict) else None
    stage = first.get("stage", 0) if isinstance(first, dict) else 0
    if type(stage) is not int:
        raise CheckpointError("names no pipeline stage", where=path, found=quoted(stage))
    layouts = [(checked_name(name, path), _json_layout(name, item, path)) for name, item in items.items()]
    return _by_stage(layouts, stage, path)


def _json_layout(name: str, item: Any, path: Path) -> Layout:
    where = f"{path}, parameter {quoted(name)}"
    if not isinstance(item, dict):
        raise CheckpointError("has no layout", where=where, expected="an object", found=quoted(item))
    tensor_map = item.get("tensor_map")
    axes = [axis if isinstance(axis, list) else [axis] for axis in tensor_map] if isinstance(tensor_map, list) else None
    devices = item.get("dev_matrix")
    step, size = item.get("opt_weight_shard_step", 0), item.get("opt_weight_shard_size", 0)
    numbers = [step, size, *(devices if isinstance(devices, list) else [None])]
    numbers += [device for axis in axes or [] for device in axis]
    if axes is None or not isinstance(devices, list) or not all(type(number) is int for number in numbers):
        raise CheckpointError("has no layout", where=where, expected="dev_matrix and tensor_map, lists of integers")
    fields = bool(item.get("field") or item.get("param_split_shape"))
    return _layout(devices, axes, step, size, fields, where)


def _layout(
    devices: Sequence[int], axes: Sequence[Sequence[int]], step: int, size: int, fields: bool, where: str
) -> Layout:
    """A layout from MindSpore's numbers, in which axis k of the devices is counted from the right and -1 is none."""
    if fields:
        raise CheckpointError("is split by fields, as only a recommender's embedding is", where=where)
    ranks = 1
    for device in devices:
        ranks *= device if 0 < device <= MAX_RUN_RANKS else MAX_RUN_RANKS + 1
    if not devices or len(devices) > MAX_RANK or ranks > MAX_RUN_RANKS or len(axes) > MAX_RANK:
        raise CheckpointError("has an impossible device matrix", where=where, found=quoted(list(devices)))
    named = [[len(devices) - 1 - device for device in axis if device != -1] for axis in axes]
    flat = [device for axis in named for device in axis]
    if not all(0 <= device < len(devices) for device in flat) or len(set(flat)) != len(flat):
        raise CheckpointError("has a tensor map that does not fit its devices", where=where, found=quoted(list(axes)))
    layout = Layout(tuple(devices), tuple(map(tuple, named)))
    copies = layout.ranks // math.prod(layout.cuts)
    shards = 1 if not step or not size else copies if size == -1 else size
    if shards < 1 or copies % shards or (shards > 1 and not axes):
        raise CheckpointError(
            "has an impossible opt_weight_shard_size",
            where=where,
            expected=f"-1, 0 or a divisor of {copies}",
            found=size,
        )
    return Layout(layout.devices, layout.axes, shards)


def _by_stage(items: Sequence[tuple[str, Layout]], stage: int, path: Path) -> Mapping[int, Stage]:
    stages: dict[int, dict[str, Layout]] = {}
    shared: dict[Layout, Layout] = {}  # one object for the many parameters that are divided alike
    for name, layout in items:
        merged = _MERGED_NAME.fullmatch(name)
        number, name = (int(merged[1]), merged[2]) if merged else (stage, name)
        if not 0 <= number < MAX_RUN_RANKS:
            raise CheckpointError("is of an impossible pipeline stage", where=path, found=number)
        layouts = stages.setdefault(number, {})
        if name in layouts:
            raise CheckpointError("names a parameter twice", where=path, found=name)
        layouts[name] = shared.setdefault(layout, layout)
    if not stages:
        raise CheckpointError(
            "holds no layouts of parameters",
            where=path,
            advice="It is no strategy file, or it was truncated; copy output/strategy again.",
        )
    return stages
