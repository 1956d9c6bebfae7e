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

    def value(name: str, tensor: Any) -> Value:
        found = _value(name, tensor)
        if found.dtype not in DTYPES:
            raise InputError("has an unexpected dtype", where=f"{where}: {name}", found=found.dtype)
        return found

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


@dataclass(frozen=True)
class OperatorNode:
    """A call of an operator in a graph. Arguments and result are Values, tuples of them, or constants."""

    operator: str
    arguments: tuple[Any, ...]
    result: Any


def operator_nodes(data: bytes) -> list[OperatorNode]:
    """The nodes of a MINDIR graph that a kernel runs for, in the order of the graph."""
    from mindspore.train import mind_ir_pb2

    model = mind_ir_pb2.ModelProto()
    model.ParseFromString(data)
    nodes = []
    for graph in (model.graph, *model.functions):
        known: dict[str, Any] = {value.name: _value("parameter", value) for value in graph.parameter}
        for one in graph.input:
            name = one.name.rpartition(":")[2]
            known[one.name] = _value(name, one.tensor[0]) if one.tensor else name
        for node in graph.node:
            operator = _operator(node)
            attributes = {attribute.name: _attribute(attribute) for attribute in node.attribute}
            arguments = tuple(known.get(name, name) for name in node.input)
            if operator == "TupleGetItem":
                result = arguments[0][arguments[1]]
            elif operator in ("Depend", "Load"):  # the first argument itself
                result = arguments[0]
            else:
                result = attributes.get("value" if operator == "Constant" else "shape")
            known[node.output[0]] = result
            if operator not in NO_WORK:
                nodes.append(OperatorNode(operator, arguments, result))
    return nodes


def _value(name: str, tensor: Any) -> Value:
    from mindspore.train import mind_ir_pb2

    kind = mind_ir_pb2.TensorProto.DataType.Name(tensor.data_type)
    dtype = "float32" if kind == "FLOAT" else kind.lower()  # the others are called as here
    return Value(name, dtype, tuple(None if size < 0 else size for size in tensor.dims))


def _attribute(attribute: Any) -> Any:
    """What a node's attribute holds: a number, a string, None, a Value, or a tuple of these."""
    from mindspore.train import mind_ir_pb2

    kind = mind_ir_pb2.AttributeProto.AttributeType.Name(attribute.type)
    if kind in ("TUPLE", "LIST"):
        return tuple(_attribute(one) for one in attribute.values)
    if kind == "TENSORS":
        values = tuple(_value("", one) for one in attribute.tensors)
        return values[0] if len(values) == 1 else values
    if kind == "STRING":
        return attribute.s.decode(errors="replace")
    # Alone a number stands in a field of its own, in a tuple in a list of one.
    if kind in ("FLOAT", "DOUBLE"):
        singles, plural = {"FLOAT": attribute.f, "DOUBLE": attribute.d}, [*attribute.floats, *attribute.doubles]
        return plural[0] if plural else singles[kind]
    if kind == "BOOL" or kind.startswith(("INT", "UINT")):
        number = attribute.ints[0] if attribute.ints else attribute.i
        return bool(number) if kind == "BOOL" else number
    return None


def _count(nodes: Iterable[Any]) -> Counter[str]:
    return Counter(kind for kind in map(_operator, nodes) if kind not in NO_WORK)


def _operator(node: Any) -> str:
    # A node names its operator as `REF::MatMul:12`, the number being the primitive's in the file.
    return re.sub(r"^REF::(\w+):\d+$", r"\1", node.op_type)
