"""The environment and context of a process that runs one rank on an NPU: mindformers' own, since MindIE's hook hands
over to this package before mindformers has made any (mindformers r1.6.0 core/context/build_context.py).

Of what mindformers sets two things are left at MindSpore's defaults. max_device_memory and mempool_block_size: the
58 GB of its TeleChat2 yamls would be taken at once, of the memory that MindIE counts with npuMemSize.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import mindspore as ms

from telechat_mindie.backend.ranks import use_device
from telechat_mindie.errors import InputError
from telechat_mindie.model.kernels.ascend_graphs import JIT_CONFIG
from telechat_mindie.soc import ADVICE, CANN_HOME_VARIABLE, SOURCE_CANN, refused_by_mindspore

ENVIRONMENT = {
    "MS_ALLOC_CONF": "enable_vmm:False",  # the device's memory pool without virtual addresses
    "RUN_MODE": "predict",  # read by MindSpore's own Parameter and compiler (mindspore/common/parameter.py)
    "CPU_AFFINITY": "True",  # read by `bind_to_share`
}
"""Variable -> what it is set to where the user has not (build_context.py:333-341)."""

DISABLED_KERNELS_VARIABLE = "MS_INTERNAL_DISABLE_CUSTOM_KERNEL_LIST"
DISABLED_KERNELS = ("PagedAttention",)
"""Custom kernels that the library replaces by its asdops ones, as in mindformers' processes (build_context.py:336-340):
the custom PagedAttention reads a query of two axes in another layout. Calls with a trapezoidal mask stay with it, which
alone knows that. The library reads the variable when it makes its first kernel."""


def rank_environment(present: Mapping[str, str]) -> dict[str, str]:
    """What a rank's environment must have beyond or in place of what is `present`."""
    disabled = [name for name in present.get(DISABLED_KERNELS_VARIABLE, "").split(",") if name]
    disabled += [name for name in DISABLED_KERNELS if name not in disabled]
    defaults = {name: value for name, value in ENVIRONMENT.items() if name not in present}
    return {**defaults, DISABLED_KERNELS_VARIABLE: ",".join(disabled)}


def prepare_process(rank: int, world_size: int, device_id: int) -> None:
    """Everything that must hold before the first graph, allocation or communication group of an NPU's process.

    Raises:
        InputError: CANN's environment is missing, or the chip is one that the operators here are not made for.
    """
    if not os.environ.get(CANN_HOME_VARIABLE):
        raise InputError(
            "is not set, and Ascend's kernel library fails without it",
            where=CANN_HOME_VARIABLE,
            advice=f"Before the service: {SOURCE_CANN}",
        )
    os.environ |= rank_environment(os.environ)
    bind_to_share(rank, world_size)
    ms.set_context(mode=ms.GRAPH_MODE, jit_config=JIT_CONFIG)
    use_device("ascend", device_id)
    check_chip()


def check_chip() -> None:
    """Raises InputError where the device's chip is one that the operators here are not made for."""
    from mindspore._c_expression import MSContext

    version = MSContext.get_instance().get_ascend_soc_version()
    if family := refused_by_mindspore(version):
        raise InputError(f"{family} are not supported", where="NPU", found=version, advice=ADVICE)


def bind_to_share(rank: int, world_size: int) -> None:
    """Keep this process and the threads that it starts on its part of the CPUs, as mindformers does by CPU_AFFINITY.

    Ranks side by side otherwise push each other's launching threads off their cores. Where somebody has bound the
    process already, to a container's CPUs or to those of a NUMA node, it stays there.
    """
    allowed = sorted(os.sched_getaffinity(0))
    share = len(allowed) // world_size
    wanted = os.environ.get("CPU_AFFINITY", "").lower() in ("1", "true")
    if wanted and world_size > 1 and share and len(allowed) == os.cpu_count():
        os.sched_setaffinity(0, allowed[rank * share : (rank + 1) * share])
