"""File formats as a writer sees them: which bytes stand before which stretches of tensor data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from telechat_mindie.checkpoint.formats.mindspore import ckpt_slices, encode_ckpt_entry_prefix
from telechat_mindie.checkpoint.formats.safetensors import encode_safetensors_header
from telechat_mindie.dtypes import DTYPES

Entry = tuple[str, str, tuple[int, ...]]
"""Name, dtype and shape of a tensor."""


@dataclass(frozen=True, slots=True)
class Frame:
    """`prefix`, then `nbytes` bytes of the tensors' data, taken one after the other."""

    prefix: bytes
    nbytes: int


@dataclass(frozen=True, slots=True)
class Container:
    """A file format that can be written front to back."""

    suffix: str
    frames: Callable[[Sequence[Entry]], tuple[Frame, ...]]


def _safetensors_frames(entries: Sequence[Entry], made_for: str) -> tuple[Frame, ...]:
    header = encode_safetensors_header(entries, {"format": made_for})
    return (Frame(header, sum(_nbytes(entry) for entry in entries)),)


def _ckpt_frames(entries: Sequence[Entry]) -> tuple[Frame, ...]:
    return tuple(
        Frame(encode_ckpt_entry_prefix(*entry, piece), piece)
        for entry in entries
        for piece in ckpt_slices(_nbytes(entry))
    )


def _nbytes(entry: Entry) -> int:
    return math.prod(entry[2]) * DTYPES[entry[1]].itemsize


SAFETENSORS = Container(".safetensors", partial(_safetensors_frames, made_for="np"))
TORCH_SAFETENSORS = Container(".safetensors", partial(_safetensors_frames, made_for="pt"))
"""transformers up to 4 opens no other (4.55, modeling_utils.py, load_state_dict)."""

MINDSPORE_CKPT = Container(".ckpt", _ckpt_frames)

CONTAINERS = {"safetensors": SAFETENSORS, "ckpt": MINDSPORE_CKPT}
"""By the names that options have."""
