"""Which kernels a CPU runs the decoder with: the native ones where they can be had, MindSpore's own otherwise."""

from __future__ import annotations

import logging
import os
from functools import lru_cache
from typing import TYPE_CHECKING

from telechat_mindie.errors import InputError
from telechat_mindie.model.kernels.native_build import NativeUnavailable, library

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
    choice = os.environ.get("TELECHAT_CPU_KERNELS")
    if choice is not None and choice not in CHOICES:
        raise InputError("is unknown", where="TELECHAT_CPU_KERNELS", expected=" or ".join(CHOICES), found=repr(choice))
    if choice == "native":
        library()
    if choice == "mindspore" or (choice is None and not _native_available()):
        from telechat_mindie.model.kernels.cpu import CpuKernels

        return CpuKernels
    from telechat_mindie.model.kernels.native import NativeKernels

    return NativeKernels


def describe_cpu_kernels(stored: str, tp: int = 1) -> str:
    """The kernels that a directory with weights of dtype `stored` would run with, in one line for a person.

    Raises:
        InputError, NativeUnavailable: as `select_cpu_kernels` says.
    """
    return select_cpu_kernels().describe(stored, tp)


@lru_cache(maxsize=1)
def _native_available() -> bool:
    try:
        library()
    except NativeUnavailable as error:
        _logger.warning("the native CPU kernels are unavailable, MindSpore's slower ones are used: %s", error)
        return False
    return True
