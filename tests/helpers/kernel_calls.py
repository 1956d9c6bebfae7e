"""Operator calls as MindSpore hands them to its internal Ascend kernels, in the lines that host_kernels.cpp reads.

Which arguments a kernel gets, in which order and with which parameters, follows MindSpore's own glue
(mindspore/ops/kernel/ascend/internal of 2.7 and 2.10; for PagedAttention `CheckMask` of its paged_attention.h).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from helpers.operator_trace import OperatorCall, Trace, Traced

LOOK_AHEAD = 2  # PagedAttentionParam::MaskType: the mask is one of [tokens, context]


def kernel_lines(trace: Trace) -> Iterator[str]:
    """Every call of a trace that an internal kernel may be asked for, once each and in order."""
    lengths = {
        name: trace.named[name].values if name in trace.named else None for name in ("q_seq_lens", "batch_valid_length")
    }
    seen: set[str] = set()
    for call in trace.calls:
        for line in (_line(call, lengths), _fused_norm(call)):
            if line and line not in seen:
                seen.add(line)
                yield line


def _line(call: OperatorCall, lengths: Mapping[str, Any]) -> str | None:
    if call.name not in KERNELS:
        return None
    kernel, inputs, outputs, parameters = KERNELS[call.name]
    taken = [call.inputs[index] if index < len(call.inputs) else None for index in inputs]
    given = [call.outputs[index] for index in outputs] if outputs is not None else call.outputs
    # Where an operand is a constant MindSpore makes a tensor of it, and that is another kernel's matter.
    if call.name in ("Add", "Sub", "Mul", "Less") and not all(isinstance(one, Traced) for one in taken):
        return None
    return _written(kernel, parameters(call, lengths), taken, given)


def _fused_norm(call: OperatorCall) -> str | None:
    """AddRmsNorm, which MindSpore makes of an addition and the norm of its sum (its pass of that name is on)."""
    if call.name != "RmsNorm" or call.inputs[0].source is None or call.inputs[0].source.name != "Add":
        return None
    added = call.inputs[0].source.inputs
    if len({getattr(one, "shape", None) for one in added}) > 1:
        return None
    total = call.inputs[0]
    return _written("AddRmsNorm", _norm(call, {}), [*added, call.inputs[1]], [*call.outputs, total])


def _written(kernel: str, parameters: Mapping[str, object], inputs: Sequence[Any], outputs: Sequence[Traced]) -> str:
    words = [kernel, *(f"{name}={_number(value)}" for name, value in parameters.items())]
    return " ".join([*words, "<", *map(_argument, inputs), ">", *map(_argument, outputs)])


def _argument(value: Traced | None) -> str:
    return "none" if value is None else f"{value.kind}[{','.join(map(str, value.shape))}]"


def _number(value: Any) -> str:
    if isinstance(value, bool):
        return str(int(value))
    return ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def _paged_attention(call: OperatorCall, lengths: Mapping[str, Any]) -> dict[str, object]:
    queries, contexts = lengths["q_seq_lens"], lengths["batch_valid_length"]
    several = queries is not None and (queries > 1).any()
    return {
        "head_num": call.attributes["head_num"],
        "kv_head_num": call.attributes["kv_head_num"],
        "tor": call.attributes["scale_value"],
        "mask_mode": call.attributes["mask_mode"],
        "mask_type": LOOK_AHEAD if several and call.inputs[7] is not None else 0,
        "q_seq_len": queries.tolist() if several else [],
        "kv_seq_len": contexts.tolist(),
        "has_q_seq_lens": queries is not None,
    }


def _flash_attention(call: OperatorCall, lengths: Mapping[str, Any]) -> dict[str, object]:
    names = ("head_num", "pre_tokens", "next_tokens", "inner_precise", "input_layout", "sparse_mode")
    return {
        **{name: call.attributes[name] for name in names},
        "tor": call.attributes["scale_value"],
        "q_seq_len": lengths["q_seq_lens"].tolist(),
        "kv_seq_len": lengths["batch_valid_length"].tolist(),
    }


def _norm(call: OperatorCall, lengths: Mapping[str, Any]) -> dict[str, object]:
    return {"eps": call.attributes["epsilon"]}


def _split(call: OperatorCall, lengths: Mapping[str, Any]) -> dict[str, object]:
    return {"split_dim": call.inputs[2] % call.inputs[0].ndim, "split_sizes": call.inputs[1]}


def _none(call: OperatorCall, lengths: Mapping[str, Any]) -> dict[str, object]:
    return {}


def _attributes(*names: str) -> Callable[[OperatorCall, Mapping[str, Any]], dict[str, object]]:
    return lambda call, lengths: {name: call.attributes[name] for name in names}


Parameters = Callable[[OperatorCall, Mapping[str, Any]], dict[str, object]]
KERNELS: dict[str, tuple[str, tuple[int, ...], tuple[int, ...] | None, Parameters]] = {
    # 9 inputs: of the operator's, q_seq_lens is left out (8) and alibi_mask (9) stands last.
    "PagedAttention": ("PagedAttention", (0, 1, 2, 3, 4, 5, 6, 7, 9), None, _paged_attention),
    "FlashAttentionScore": ("FlashAttentionScore", (0, 1, 2, 3, 6), (3,), _flash_attention),
    "ReshapeAndCache": ("ReshapeAndCache", (0, 1, 2, 3, 4), (), _none),
    "ApplyRotaryPosEmb": ("ApplyRotaryPosEmb", (0, 1, 2, 3, 4), None, _attributes("cos_format")),
    "MatMul": ("MatMul", (0, 1), None, _attributes("transpose_a", "transpose_b")),
    "RmsNorm": ("RmsNorm", (0, 1), None, _norm),
    "SplitWithSize": ("Split", (0,), None, _split),
    "Swiglu": ("SwiGLU", (0,), None, lambda call, lengths: {"axis": call.inputs[1]}),
    "SiLU": ("Swish", (0,), None, _none),
    "Cast": ("Cast", (0,), None, _none),
    "Add": ("Add", (0, 1), None, _none),
    "Sub": ("Sub", (0, 1), None, _none),
    "Mul": ("Mul", (0, 1), None, _none),
    "Less": ("Less", (0, 1), None, _none),
    "ReduceSum": ("ReduceSum", (0,), None, lambda call, lengths: {"axes": call.inputs[1]}),
    "Transpose": ("Transpose", (0,), None, lambda call, lengths: {"axes": call.inputs[1]}),
    "Gather": ("Gather", (0, 1), None, lambda call, lengths: {"axes": call.inputs[2], "batch_dims": 0}),
}
"""Operator -> its internal kernel, the operator's inputs and outputs that it gets (None: all), and its parameters.

Those of a mixture of experts (MoeGatingTopKSoftmax and so on), collectives, reshapes, divisions and the like have no
internal kernel that MindSpore would choose: they are CANN's."""
