"""How the processes of a tensor parallel group find each other.

MindSpore's dynamic cluster takes a scheduler process and environment variables (MS_WORKER_NUM, MS_ROLE, MS_NODE_ID,
MS_SCHED_HOST, MS_SCHED_PORT). mindformers forks its scheduler from rank 0 and leaves it behind when rank 0 crashes;
here it is a process of its own that the kernel ends together with rank 0.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys

from telechat_mindie.errors import InputError
from telechat_mindie.mindie import RANK_PORTS, SCHEDULER_HOST

CPU_NODE_TIMEOUT = "10"
"""Seconds until a silent peer counts as dead; MindSpore's default is 30."""

_PR_SET_PDEATHSIG = 1
_scheduler: subprocess.Popen[bytes] | None = None


def join_ranks(rank: int, world_size: int, device: str) -> None:
    """Join the group as `rank`; returns once all ranks are there. Rank 0 starts the scheduler. One rank: nothing.

    Raises:
        InputError: the environment says something else than the arguments.
        RuntimeError: MindSpore could not form the group in its time.
    """
    global _scheduler
    if world_size == 1:
        return
    _check_environment(rank, world_size)
    os.environ.setdefault("MS_SCHED_HOST", SCHEDULER_HOST)
    os.environ.setdefault("MS_SCHED_PORT", str(RANK_PORTS["MS_SCHED_PORT"]))
    os.environ |= {"MS_WORKER_NUM": str(world_size), "MS_NODE_ID": str(rank)}
    if device == "cpu":
        os.environ.setdefault("MS_NODE_TIMEOUT", CPU_NODE_TIMEOUT)
    if rank == 0 and _scheduler is None:
        _scheduler = subprocess.Popen(
            [sys.executable, "-m", "telechat_mindie.backend.ranks"],
            env=os.environ | {"MS_ROLE": "MS_SCHED"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            preexec_fn=die_with_parent,
        )
    os.environ["MS_ROLE"] = "MS_WORKER"
    _init(device)


def _check_environment(rank: int, world_size: int) -> None:
    for name, value in (("MS_WORKER_NUM", world_size), ("MS_NODE_ID", rank)):
        found = os.environ.get(name)
        if found is not None and found != str(value):
            raise InputError("contradicts the arguments", where=name, expected=value, found=found)


def use_device(device: str, device_id: int = 0) -> None:
    """Choose the device of this process: "ascend" with its number, or "cpu"."""
    import mindspore as ms

    if device == "ascend":
        ms.set_device("Ascend", device_id)
    elif ms.get_context("device_target") != "CPU":  # MindSpore refuses the call once anything has been computed
        ms.set_device("CPU")


def _init(device: str) -> None:
    from mindspore import communication

    communication.init("hccl" if device == "ascend" else "mccl")


def die_with_parent() -> None:
    """In a child before exec: be killed when the parent ends, however it ends (Linux prctl)."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    use_device("cpu")  # a scheduler computes nothing
    _init("cpu")
