"""The one table of dtypes: the names used throughout the package, and what each file format calls them.

Importing it costs nothing: numpy and ml_dtypes, which gives numpy a bfloat16, are imported on first use of
`Dtype.numpy`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True)
class Dtype:
    """One dtype.

    Attributes:
        name: as config.json, numpy and MindSpore spell it.
        itemsize: bytes of an element.
        safetensors: in a safetensors header.
        mindspore: `tensor_type` in a MindSpore .ckpt.
        torch: the storage class in a torch pickle.
    """

    name: str
    itemsize: int
    safetensors: str
    mindspore: str
    torch: str

    @property
    def numpy(self) -> np.dtype:
        return _numpy_dtype(self.name)


DTYPES = {
    name: Dtype(name, *row)
    for name, row in {
        "float32": (4, "F32", "Float32", "FloatStorage"),
        "float16": (2, "F16", "Float16", "HalfStorage"),
        "bfloat16": (2, "BF16", "BFloat16", "BFloat16Storage"),
        "float64": (8, "F64", "Float64", "DoubleStorage"),
        "int64": (8, "I64", "Int64", "LongStorage"),
        "int32": (4, "I32", "Int32", "IntStorage"),
        "int8": (1, "I8", "Int8", "CharStorage"),
        "uint8": (1, "U8", "UInt8", "ByteStorage"),
        "bool": (1, "BOOL", "Bool", "BoolStorage"),
    }.items()
}
"""Every dtype that a checkpoint may hold, by name."""

WEIGHT_DTYPES = ("float32", "float16", "bfloat16")
"""Names of the dtypes that a weight may have."""

SHORT_NAMES = {"fp32": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16"}
"""What people write for them, too."""

HALF_DTYPES = ("float16", "bfloat16")
"""Names of the dtypes that an NPU computes in."""


@cache
def _numpy_dtype(name: str) -> np.dtype:
    import ml_dtypes
    import numpy as np

    # MindSpore registers a bfloat16 of its own with numpy, so the name alone may give another type.
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
