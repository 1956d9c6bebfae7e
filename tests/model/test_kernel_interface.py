"""Each set of kernels has what its protocol says; mypy takes a Cell for anything."""

from __future__ import annotations

import inspect

import pytest

from telechat_mindie.model.kernels.ascend import AscendKernels
from telechat_mindie.model.kernels.cpu import CpuKernels
from telechat_mindie.model.kernels.interface import AscendKernelSet, CpuKernelSet, Kernels
from telechat_mindie.model.kernels.native import NativeKernels


def methods(protocol: type) -> set[str]:
    return {name for name, member in vars(protocol).items() if inspect.isroutine(member) and name[0] != "_"}


def arguments(kind: type, name: str) -> list[str]:
    return [argument for argument in inspect.signature(getattr(kind, name)).parameters if argument != "self"]


@pytest.mark.parametrize(
    ("kernels", "protocol", "other"),
    [
        (NativeKernels, CpuKernelSet, AscendKernelSet),
        (CpuKernels, CpuKernelSet, AscendKernelSet),
        (AscendKernels, AscendKernelSet, CpuKernelSet),
    ],
)
def test_a_set_of_kernels_is_its_protocol(kernels: type, protocol: type, other: type) -> None:
    wanted = methods(Kernels) | methods(protocol)
    assert {"embed", "attention", "calls", "weight_dtype"} < wanted
    for name in sorted(wanted):
        assert callable(getattr(kernels, name, None)), name
        assert arguments(kernels, name) == arguments(protocol, name), name
    assert not [name for name in methods(other) - wanted if hasattr(kernels, name)]
    routes = "routed_experts" in wanted
    assert kernels.routes_experts is routes and ("experts" in wanted) is not routes  # type: ignore[attr-defined]
