"""The processes of a run: how they are started and ended, and whom each talks to."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
from collections.abc import Callable
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from telechat_mindie import errors
from telechat_mindie.backend.multi_rank import RankError, free_port
from telechat_mindie.backend.ranks import die_with_parent, join_ranks, use_device
from telechat_mindie.errors import TelechatMindieError
from telechat_mindie.mindie import SCHEDULER_HOST
from telechat_mindie.training.settings import Computation, Place

Result = TypeVar("Result")


def run_ranks(job: Callable[[int], Result], ranks: int, device: str = "cpu") -> list[Result]:
    """Call `job(rank)` in a process for each rank, joined to one group; one rank runs in this process.

    All stay until each has its result. When a rank fails or dies the others are ended, and all are when this process
    ends, however it does. Ctrl-C is for this process alone.

    Args:
        job: to be pickled, and its result too.

    Returns:
        Each rank's result.

    Raises:
        TelechatMindieError: what the first rank that failed raised, where it was one of them.
        RankError: a rank died, or raised something else.
    """
    if ranks == 1:
        return [job(0)]
    context = multiprocessing.get_context("spawn")
    port = free_port()
    resource_tracker.ensure_running()  # its start unblocks what is blocked below
    processes: list[Any] = []
    connections: list[Any] = []
    try:
        for rank in range(ranks):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(job, rank, ranks, device, port, theirs), name=f"rank {rank}")
            processes.append(process)
            connections.append(ours)
            # Inherited: from its first moment, before it can say so itself, Ctrl-C is not for it.
            blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                process.start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            theirs.close()  # so that the end of the process is the end of what comes from it
        return _results(connections, processes)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
        for process in processes:
            if process.pid is not None:
                process.join()
        for connection in connections:
            connection.close()


def _results(connections: list[Any], processes: list[Any]) -> list[Any]:
    found: dict[int, Any] = {}
    waiting = {connection: rank for rank, connection in enumerate(connections)}
    while waiting:
        connection: Any
        for connection in wait(list(waiting)):
            rank = waiting.pop(connection)
            try:
                kind, content = connection.recv()
            except EOFError:
                processes[rank].join()
                raise RankError(
                    f"ended unexpectedly with code {processes[rank].exitcode}",
                    where=f"rank {rank} of {len(processes)}",
                    advice="Its last words are above; was there memory enough?",
                ) from None
            if kind is not None:
                raise getattr(errors, kind, RankError)(content)
            found[rank] = pickle.loads(content)
    return [found[rank] for rank in range(len(found))]


def _work(job: Callable[[int], Any], rank: int, ranks: int, device: str, port: int, connection: Connection) -> None:
    """What a rank's process does."""
    die_with_parent()
    for name in ("MS_WORKER_NUM", "MS_NODE_ID"):
        os.environ.pop(name, None)
    os.environ |= {"MS_SCHED_HOST": SCHEDULER_HOST, "MS_SCHED_PORT": str(port)}
    os.environ.setdefault("GLOG_v", "3")  # MindSpore's cluster warns on every retry
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    answer: tuple[str | None, Any]
    try:
        use_device(device, rank)
        join_ranks(rank, ranks, device)
        answer = None, pickle.dumps(job(rank))
    except TelechatMindieError as error:
        answer = type(error).__name__, str(error)
    except Exception as error:
        said = " ".join(str(error).split())
        answer = RankError.__name__, f"rank {rank} of {ranks}: {type(error).__name__}: {said[:400]}"
    connection.send(answer)
    connection.close()
    sys.stdout.flush()
    sys.stderr.flush()
    # It stays until it is killed: its peers may be at work, and one that is just joining ends when another is gone.
    while True:
        signal.pause()


def groups(computation: Computation, place: Place) -> tuple[Any, Any, Any]:
    """Tensor parallel group, data parallel group, and all ranks, each as this process is in it."""
    from mindspore import communication

    from telechat_mindie.model.parallel import TensorParallel

    dp, tp = computation.dp, computation.tp
    if dp == 1 or tp == 1:
        tensor, data = TensorParallel(place.tp_rank, tp), TensorParallel(place.dp_rank, dp)
        return tensor, data, tensor if dp == 1 else data
    of_tensor, of_data = f"tensor-{place.dp_rank}", f"data-{place.tp_rank}"
    communication.create_group(of_tensor, [place.dp_rank * tp + rank for rank in range(tp)])
    communication.create_group(of_data, [rank * tp + place.tp_rank for rank in range(dp)])
    return (
        TensorParallel(place.tp_rank, tp, of_tensor),
        TensorParallel(place.dp_rank, dp, of_data),
        TensorParallel(place.dp_rank * tp + place.tp_rank, dp * tp),
    )
