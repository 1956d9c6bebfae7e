"""A MINDIR graph read back: what goes in and out, which parameters and how many of each operator."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from telechat_mindie.dtypes import DTYPES
from telechat_mindie.errors import InputError

NO_WORK = frozenset({"Constant", "Load", "UpdateState", "Depend", "MakeTuple", "TupleGetItem", "Shape"})
"""Nodes that order and name values; no kernel runs for them."""


@dataclass(frozen=True)
class Value:
    """An input, output or parameter of a graph; an axis of None has another size in every call."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} [{', '.join('*' if size is None else str(size) for size in self.shape)}]"


@dataclass(frozen=True)
class GraphFile:
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    parameters: tuple[Value, ...]
    operators: Counter[str]


def parse_mindir(data: bytes, where: object) -> GraphFile:
    """The graph in the bytes of a MINDIR file; `where` names them in errors.

    Raises:
        InputError: not a MINDIR model, or one that holds a dtype that no decoder has.
    """
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from mindspore.train import mind_ir_pb2

    model = mind_ir_pb2.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError:
        raise InputError("is not a MINDIR file", where=where) from None
    if not model.graph.node:
        raise InputError("holds no graph", where=where)
    names = mind_ir_pb2.TensorProto.DataType.Name

    def value(name: str, tensor: Any) -> Value:
        kind = names(tensor.data_type)
        dtype = "float32" if kind == "FLOAT" else kind.lower()  # the others are called as here
        if dtype not in DTYPES:
            raise InputError("has an unexpected dtype", where=f"{where}: {name}", found=kind)
        return Value(name, dtype, tuple(None if size < 0 else size for size in tensor.dims))

    def values(infos: Iterable[Any]) -> Iterator[Value]:
        for info in infos:
            # MindSpore prefixes a name with the graph's own: `42_1_module_Class_construct_7:token_ids`.
            name = info.name.rpartition(":")[2]
            yield from (value(name, tensor) for tensor in info.tensor)
            # A tuple of tensors: name.0, name.1 and so on.
            for index, element in enumerate(info.attr_info.values):
                yield from (value(f"{name}.{index}", tensor) for tensor in element.tensors)

    return GraphFile(
        inputs=tuple(values(model.graph.input)),
        outputs=tuple(values(model.graph.output)),
        parameters=tuple(value(parameter.ref_key, parameter) for parameter in model.graph.parameter),
        operators=_count(node for graph in (model.graph, *model.functions) for node in graph.node),
    )


def _count(nodes: Iterable[Any]) -> Counter[str]:
    # A node names its operator as `REF::MatMul:12`, the number being the primitive's in the file.
    kinds = (re.sub(r"^REF::(\w+):\d+$", r"\1", node.op_type) for node in nodes)
    return Counter(kind for kind in kinds if kind not in NO_WORK)
