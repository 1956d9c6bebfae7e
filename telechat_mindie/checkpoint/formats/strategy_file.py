"""The content of one parallel strategy file of MindSpore, protobuf or .json.

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

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from telechat_mindie.checkpoint.formats.bounds import (
    MAX_RANK,
    MAX_TENSORS,
    BoundedFile,
    checked_name,
    quoted,
)
from telechat_mindie.checkpoint.formats.strategy_layout import MAX_RUN_RANKS, Layout, Stage
from telechat_mindie.checkpoint.formats.wire import LENGTH_DELIMITED, VARINT, Message
from telechat_mindie.errors import CheckpointError
from telechat_mindie.reading import parse_json

KIND = "strategy file"

_MERGED_NAME = re.compile(r"(\d{1,5})-(.+)")
_SPLIT_SHAPE, _FIELD = 3, 5


def parse_protobuf(file: BoundedFile) -> Mapping[int, Stage]:
    """The layouts of each pipeline stage in a protobuf file. Raises CheckpointError for a damaged one."""
    message, file_stage = Message(file, 0, file.size, KIND), 0
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


def parse_json_form(content: bytes, path: Path) -> Mapping[int, Stage]:
    """The same from a .json file. Raises CheckpointError, or ConfigError where it is no JSON."""
    try:
        text = content.decode()
    except UnicodeDecodeError:
        raise CheckpointError(f"is no {KIND}: it is not UTF-8", where=path) from None
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
