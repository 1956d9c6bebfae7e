"""Every operator call of a decoder over the Ascend kernels, recorded by running its own Python on shapes alone.

MindSpore compiles a graph of concrete shapes in a second; this runs the same `construct` in milliseconds, so that every
size, rank count, dtype and kind of batch can be had. Tensors are `Traced`, Cells call their `construct`, and each
operator records its arguments and gives tensors of the shapes that RULES says. That the record is what MindSpore's
compiler makes of the same Python is a test (tests/ascend_host/test_operator_trace.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any
from unittest import mock

import mindspore as ms
import numpy as np
from mindspore import mint, nn, ops

Shape = tuple[int, ...]


@dataclass(frozen=True)
class OperatorCall:
    """One call: `inputs` are tensors, constants or None in the order of the operator's own arguments."""

    name: str
    inputs: tuple[Any, ...]
    attributes: Mapping[str, Any]
    outputs: tuple[Traced, ...]


@dataclass(frozen=True, eq=False)
class Traced:
    """A tensor without data."""

    shape: Shape
    kind: str  # of its elements
    trace: Trace
    source: OperatorCall | None = None  # what gave it; None: a weight, or an input of the graph
    values: np.ndarray | None = None  # of a one-dimensional input

    @property
    def dtype(self) -> Any:
        return getattr(ms, self.kind)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def _record(self, name: str, *inputs: Any) -> Traced:
        return self.trace.call(name, (self, *inputs), {})[0]

    def __add__(self, other: Any) -> Traced:
        return self._record("Add", other)

    def __sub__(self, other: Any) -> Traced:
        return self._record("Sub", other)

    def __mul__(self, other: Any) -> Traced:
        return self._record("Mul", other)

    __radd__, __rmul__ = __add__, __mul__

    def __truediv__(self, other: Any) -> Traced:
        return self._record("Div", other)

    def __ge__(self, other: Any) -> Traced:
        return self._record("GreaterEqual", other)

    def __lt__(self, other: Any) -> Traced:
        return self._record("Less", other)

    def reshape(self, *shape: Any) -> Traced:
        return self._record("Reshape", tuple(shape[0]) if isinstance(shape[0], (tuple, list)) else shape)

    def expand_dims(self, axis: int) -> Traced:
        return self._record("ExpandDims", axis)

    def transpose(self, *axes: int) -> Traced:
        return self._record("Transpose", axes)


TENSOR_METHODS = [
    name
    for name, value in vars(Traced).items()
    if inspect.isfunction(value) and value.__annotations__.get("return") == "Traced" and hasattr(ms.Tensor, name)
]


@dataclass
class Trace:
    """What one call of a decoder did. `named` are the graph's own inputs, by the names that MindSpore knows them by."""

    calls: list[OperatorCall] = field(default_factory=list)
    named: dict[str, Traced] = field(default_factory=dict)

    def call(self, name: str, inputs: Sequence[Any], attributes: Mapping[str, Any]) -> list[Traced]:
        """Record a call and give its outputs."""
        if name not in RULES:
            raise NotImplementedError(f"no rule says what {name} gives: add it to {__name__}.RULES")
        inputs = self.tensors(inputs)
        made = OperatorCall(
            name, inputs, attributes, tuple(Traced(*output, self) for output in RULES[name](attributes, *inputs))
        )
        self.calls.append(made)
        return [dataclasses.replace(output, source=made) for output in made.outputs]

    def tensors(self, value: Any) -> Any:
        """`value` with every MindSpore tensor in it as a Traced."""
        if isinstance(value, (tuple, list)):
            return tuple(self.tensors(part) for part in value)
        if dataclasses.is_dataclass(value) and not isinstance(value, Traced):
            parts = {one.name: self.tensors(getattr(value, one.name)) for one in dataclasses.fields(value)}
            return dataclasses.replace(value, **parts)
        if not isinstance(value, ms.Tensor):
            return value
        # Sequences' lengths: kernels read the graph's inputs of that name on the host.
        lengths = value.ndim == 1 and value.dtype in (ms.int32, ms.int64) and not isinstance(value, ms.Parameter)
        return Traced(tuple(value.shape), _kind(value.dtype), self, values=value.asnumpy() if lengths else None)


class Recorder:
    """Runs decoders on shapes while it is open, and nothing else of MindSpore's."""

    def __init__(self) -> None:
        self._trace = Trace()
        self._patches = contextlib.ExitStack()

    def trace(self, graphs: Callable[..., Any], *arguments: Any) -> Trace:
        """What `graphs` (an AscendGraphs, say) does with `arguments`, which hold tensors of real sizes."""
        self._trace = Trace()
        graphs(*self._trace.tensors(arguments))
        return self._trace

    def __enter__(self) -> Recorder:
        def patch(owner: Any, name: str, value: Any) -> None:
            self._patches.enter_context(mock.patch.object(owner, name, value))

        def run_cell(cell: nn.Cell, *arguments: Any, **keywords: Any) -> Any:
            if not self._trace.named:  # the outermost
                bound = inspect.signature(cell.construct).bind(*arguments, **keywords).arguments
                self._trace.named = {name: value for name, value in bound.items() if isinstance(value, Traced)}
            return cell.construct(*arguments, **keywords)

        def run_operator(operator: Any, *arguments: Any, **keywords: Any) -> Any:
            attributes = {name: getattr(operator, name) for name in getattr(operator, "init_attrs", {})}
            outputs = self._trace.call(operator.name, arguments, {**operator.attrs, **attributes, **keywords})
            return outputs[0] if len(outputs) == 1 and operator.name not in GIVE_TUPLES else tuple(outputs)

        patch(nn.Cell, "__call__", run_cell)
        for operator in _with_own_call(ops.Primitive):
            patch(operator, "__call__", run_operator)
        for name in TENSOR_METHODS:  # of weights, which are MindSpore's own
            run = getattr(Traced, name)
            patch(ms.Tensor, name, lambda own, *given, run=run: run(self._trace.tensors(own), *given))
        for own in [module for name, module in sys.modules.items() if name.startswith("telechat_mindie.model.")]:
            for name in [name for name, value in vars(own).items() if value is ops or value is mint]:
                patch(own, name, _Functions(getattr(own, name), self))
        return self

    def __exit__(self, *_: object) -> None:
        self._patches.close()

    def function(self, name: str, *inputs: Any, **keywords: Any) -> Any:
        """Record a call of one of FUNCTIONS."""
        if name not in FUNCTIONS:
            raise NotImplementedError(f"no rule says which operator {name} is: add it to {__name__}.FUNCTIONS")
        operator, arguments = FUNCTIONS[name](*inputs, **keywords)
        outputs = self._trace.call(operator, arguments, {})
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


def _with_own_call(cls: type) -> Iterator[type]:
    # `ops.constexpr` makes a class in a function: Python that runs while a graph is compiled, and here.
    if "__call__" in vars(cls) and "<locals>" not in cls.__qualname__:
        yield cls
    for child in cls.__subclasses__():
        yield from _with_own_call(child)


class _Functions:
    """`mindspore.ops` or `mindspore.mint` with their functions recorded; classes are the real ones."""

    def __init__(self, real: ModuleType, recorder: Recorder) -> None:
        self._real = real
        self._recorder = recorder

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._real, name)
        if name == "depend":
            return lambda value, _: value
        return real if isinstance(real, (type, ModuleType)) else functools.partial(self._recorder.function, name)


FUNCTIONS: dict[str, Callable[..., tuple[str, tuple[Any, ...]]]] = {
    "cast": lambda x, dtype: ("Cast", (x, dtype)),
    "select": lambda condition, x, y: ("Select", (condition, x, y)),
    "logical_and": lambda x, y: ("LogicalAnd", (x, y)),
    "zeros_like": lambda x: ("ZerosLike", (x,)),
    "zeros": lambda shape, dtype: ("Zeros", (shape, dtype)),
}
"""Function -> the operator that it is, with its arguments."""


def _elementwise(attributes: Mapping[str, Any], x: Traced, y: Any) -> list[tuple[Shape, str]]:
    if not isinstance(y, Traced):
        return [(x.shape, x.kind)]
    kind = x.kind if x.kind == y.kind else str(np.result_type(*(np.dtype(one.kind) for one in (x, y))))
    return [(tuple(np.broadcast_shapes(x.shape, y.shape)), kind)]


def _comparison(attributes: Mapping[str, Any], x: Traced, y: Any) -> list[tuple[Shape, str]]:
    return [(_elementwise(attributes, x, y)[0][0], "bool")]


def _same(attributes: Mapping[str, Any], x: Traced, *rest: Any) -> list[tuple[Shape, str]]:
    return [(x.shape, x.kind)]


def _kind(dtype: Any) -> str:
    return str(dtype).lower()


def _matmul(attributes: Mapping[str, Any], x: Traced, y: Traced) -> list[tuple[Shape, str]]:
    rows = x.shape[1] if attributes["transpose_a"] else x.shape[0]
    columns = y.shape[0] if attributes["transpose_b"] else y.shape[1]
    return [((rows, columns), x.kind)]


def _reshape(attributes: Mapping[str, Any], x: Traced, shape: Shape) -> list[tuple[Shape, str]]:
    known = math.prod(size for size in shape if size != -1)
    filled = tuple(math.prod(x.shape) // known if size == -1 else size for size in shape)
    assert math.prod(filled) == math.prod(x.shape), (x.shape, shape)
    return [(filled, x.kind)]


def _split(attributes: Mapping[str, Any], x: Traced, sizes: Shape, axis: int) -> list[tuple[Shape, str]]:
    axis %= x.ndim
    assert sum(sizes) == x.shape[axis]
    return [((*x.shape[:axis], size, *x.shape[axis + 1 :]), x.kind) for size in sizes]


def _reduce(attributes: Mapping[str, Any], x: Traced, axis: int) -> list[tuple[Shape, str]]:
    axis %= x.ndim
    return [((*x.shape[:axis], *([1] if attributes["keep_dims"] else []), *x.shape[axis + 1 :]), x.kind)]


def _expand(attributes: Mapping[str, Any], x: Traced, axis: int) -> list[tuple[Shape, str]]:
    axis %= x.ndim + 1
    return [((*x.shape[:axis], 1, *x.shape[axis:]), x.kind)]


def _flash_attention(attributes: Mapping[str, Any], query: Traced, *rest: Any) -> list[tuple[Shape, str]]:
    softmax = [((1,), "float32")] * 2
    return [*softmax, ((1,), query.kind), (query.shape, query.kind)]


def _grouped_matmul(
    attributes: Mapping[str, Any], x: Sequence[Traced], weight: Sequence[Traced], *rest: Any
) -> list[tuple[Shape, str]]:
    return [((x[0].shape[0], weight[0].shape[2]), x[0].kind)]


def _expert_rows(
    attributes: Mapping[str, Any], x: Traced, rows: Traced, experts: Traced, active: int
) -> list[tuple[Shape, str]]:
    copies = math.prod(experts.shape)
    return [((copies, x.shape[1]), x.kind), ((copies,), "int32"), ((copies,), "int32")]


Rule = Callable[..., list[tuple[Shape, str]]]
RULES: dict[str, Rule] = {
    "Add": _elementwise,
    "Sub": _elementwise,
    "Mul": _elementwise,
    "Div": _elementwise,
    "GreaterEqual": _comparison,
    "Less": _comparison,
    "LogicalAnd": _comparison,
    "Select": lambda a, condition, x, y: [(x.shape, x.kind)],
    "ZerosLike": _same,
    "Zeros": lambda a, shape, dtype: [(tuple(shape), _kind(dtype))],
    "Cast": lambda a, x, dtype: [(x.shape, _kind(dtype))],
    "Reshape": _reshape,
    "ExpandDims": _expand,
    "Transpose": lambda a, x, axes: [(tuple(x.shape[axis] for axis in axes), x.kind)],
    "ReduceSum": _reduce,
    "Gather": lambda a, table, indices, axis: [(indices.shape + table.shape[1:], table.kind)],
    "MatMul": _matmul,
    "RmsNorm": lambda a, x, weight: [(x.shape, x.kind), ((*x.shape[:-1], 1), "float32")],
    "SplitWithSize": _split,
    "Swiglu": lambda a, x, axis: [((*x.shape[:-1], x.shape[-1] // 2), x.kind)],
    "SiLU": _same,
    "ApplyRotaryPosEmb": lambda a, query, key, *rest: [(query.shape, query.kind), (key.shape, key.kind)],
    "ReshapeAndCache": _same,
    "FlashAttentionScore": _flash_attention,
    "PagedAttention": _same,
    "MoeGatingTopKSoftmax": lambda a, x, finished, k: [
        ((x.shape[0], k), x.kind),
        *[((x.shape[0], k), "int32")] * 2,
    ],
    "MoeInitRouting": _expert_rows,
    "MoeComputeExpertTokens": lambda a, experts, count: [((count,), "int32")],
    "GroupedMatmulV4": _grouped_matmul,
    "MoeFinalizeRouting": lambda a, outputs, start, *rest: [(start.shape, start.kind)],
    "AllReduce": _same,
    "AllGather": lambda a, x: [((a["rank_size"] * x.shape[0], *x.shape[1:]), x.kind)],
}
"""Operator -> shape and dtype of each output, from its attributes and arguments."""

GIVE_TUPLES = frozenset({"GroupedMatmulV4"})
"""Operators that give a tuple where it has one tensor, too."""
