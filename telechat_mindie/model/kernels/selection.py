"""Which kernels a CPU runs the decoder with: the native ones where they can be had, MindSpore's own otherwise."""

from __future__ import annotations

import logging
import os
from functools import lru_cache
from typing import TYPE_CHECKING

from telechat_mindie.errors import InputError
from telechat_mindie.model.kernels.native_build import NativeUnavailable, library, thread_count

if TYPE_CHECKING:
    from telechat_mindie.model.kernels.cpu import CpuKernels
    from telechat_mindie.model.kernels.native import NativeKernels

CHOICES = ("native", "mindspore")

_logger = logging.getLogger(__name__)


def select_cpu_kernels() -> type[NativeKernels] | type[CpuKernels]:
    """The class to construct, as TELECHAT_CPU_KERNELS says; unset, the native one with the other as fallback.

    Raises:
        InputError: TELECHAT_CPU_KERNELS is neither "native" nor "mindspore".
        NativeUnavailable: it is "native", and the native kernels cannot be had.
    """
    if _is_native():
        from telechat_mindie.model.kernels.native import NativeKernels

        return NativeKernels
    from telechat_mindie.model.kernels.cpu import CpuKernels

    return CpuKernels


def describe_cpu_kernels(stored: str, tp: int = 1) -> str:
    """The kernels that a directory with weights of dtype `stored` would run with, in one line for a person.

    It names the instruction set, the dtype that weights are kept in and the threads of each rank, without MindSpore.

    Raises:
        InputError, NativeUnavailable: as `select_cpu_kernels` says.
    """
    if not _is_native():
        return "MindSpore (float32 weights)"
    threads = thread_count(tp)
    name = library().instruction_set.name
    return f"native {name} ({stored} weights), {threads} thread{'s' if threads > 1 else ''}"


def _is_native() -> bool:
    choice = os.environ.get("TELECHAT_CPU_KERNELS")
    if choice is not None and choice not in CHOICES:
        raise InputError("is unknown", where="TELECHAT_CPU_KERNELS", expected=" or ".join(CHOICES), found=repr(choice))
    if choice == "native":
        library()  # raises where it cannot be had
        return True
    return choice is None and _native_available()


@lru_cache(maxsize=1)
def _native_available() -> bool:
    try:
        library()
    except NativeUnavailable as error:
        _logger.warning("the native CPU kernels are unavailable, MindSpore's slower ones are used: %s", error)
        return False
    return True
