"""Every rank of a directory on this machine, behind what the engine uses of one ModelRunner."""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from telechat_mindie import errors
from telechat_mindie.backend.model_config import ModelConfig
from telechat_mindie.backend.ranks import die_with_parent
from telechat_mindie.backend.wire import receive, send
from telechat_mindie.errors import TelechatMindieError
from telechat_mindie.mindie import SCHEDULER_HOST
from telechat_mindie.model_dir.layout import ModelDir
from telechat_mindie.text.tokenizer import TelechatTokenizer

START_TIMEOUT = 300.0
"""Seconds for all ranks to load and find each other."""

READ_AHEAD_BYTES = 32 << 20
"""Asked of the system at a time."""

_log = logging.getLogger(__name__)

_WORKER = (sys.executable, "-m", "telechat_mindie.backend.worker")


class RankError(TelechatMindieError):
    """A rank's process ended or failed; the others were ended with it."""


class MultiRankRunner:
    """Starts one worker a rank and calls them all with the same arguments, as MindIE's connector does.

    Args:
        model_path: directory that `telechat-mindie build` made, for any tensor parallel size.
        num_blocks: blocks of each rank's cache.
        block_size: tokens of a block.
        cpu_mem_size: GB of host memory a rank for swapped-out blocks.

    Raises:
        TelechatMindieError: what a rank's ModelRunner raises.
        RankError: a rank ended before it was ready.
    """

    def __init__(self, model_path: Path, num_blocks: int, block_size: int, cpu_mem_size: int = 0) -> None:
        directory = ModelDir.open(model_path)
        self.model_config = ModelConfig(directory)
        self.tokenizer = TelechatTokenizer.from_pretrained(model_path)
        self._workers: list[subprocess.Popen[bytes]] = []
        self._connections: list[socket.socket] = []
        atexit.register(self.close)
        port = free_port()
        try:
            for rank in range(directory.tp):
                arguments = {
                    "model_path": str(Path(model_path).resolve()),
                    "npu_mem_size": 0,
                    "cpu_mem_size": cpu_mem_size,
                    "block_size": block_size,
                    "rank_id": rank,
                    "world_size": directory.tp,
                    "npu_device_ids": [rank],
                    "num_blocks": num_blocks,
                }
                self._start(arguments, port)
            ready = self._answers(START_TIMEOUT)
        except BaseException:
            self.close()
            raise
        self.npu_num_blocks = min(answer["npu_num_blocks"] for answer in ready)
        self.cpu_num_blocks = min(answer["cpu_num_blocks"] for answer in ready)

    def forward(self, **arguments: Any) -> np.ndarray:
        """`ModelRunner.forward` on every rank; rank 0's logits, float32 [rows, vocabulary].

        A prefill's mask stays here: it says what causality says, `ragged_batch` leaves it unread, and its floats,
        new tokens x context, can be gigabytes. This package's engine makes none, and MindIE a process and a ModelRunner
        a rank; it comes from callers that repeat MindIE's calls as they are.
        """
        if arguments.get("prefill", True):
            arguments["spec_mask"] = None
        logits: np.ndarray = self._call({"method": "forward", **arguments})[0]["logits"]
        return logits

    def swap(self, block_tables: np.ndarray, swap_type: bool) -> None:
        """`ModelRunner.swap` on every rank."""
        self._call({"method": "swap", "block_tables": np.asarray(block_tables), "swap_type": bool(swap_type)})

    def close(self) -> None:
        """End every rank; nothing is left running. May be called again."""
        atexit.unregister(self.close)
        for worker in self._workers:
            worker.kill()
        for worker in self._workers:
            worker.wait()
        for connection in self._connections:
            connection.close()
        self._workers, self._connections = [], []

    def _start(self, arguments: dict[str, Any], port: int) -> None:
        ours, theirs = socket.socketpair()
        environment = {key: value for key, value in os.environ.items() if key not in ("MS_WORKER_NUM", "MS_NODE_ID")}
        with theirs:
            self._workers.append(
                subprocess.Popen(
                    [*_WORKER, str(theirs.fileno()), json.dumps(arguments), str(_log.getEffectiveLevel())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    env=environment | {"MS_SCHED_HOST": SCHEDULER_HOST, "MS_SCHED_PORT": str(port)},
                    preexec_fn=die_with_parent,
                    start_new_session=True,  # Ctrl-C is for the program, which ends its ranks itself
                )
            )
        self._connections.append(ours)

    def _call(self, message: dict[str, Any]) -> list[dict[str, Any]]:
        if not self._workers:
            raise RankError("the ranks have ended", advice="Start the program again.")
        for connection in self._connections:
            try:
                send(connection, message)
            except OSError:
                self._report_death()
        return self._answers(None)

    def _answers(self, timeout: float | None) -> list[dict[str, Any]]:
        """One message of each rank. A rank that dies ends all; a rank that refuses leaves the others waiting for none.

        Raises:
            RankError: a rank died, or was not ready in time.
            TelechatMindieError: what the ranks refused with.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        answers: dict[int, dict[str, Any]] = {}
        failed: list[dict[str, Any]] = []
        while len(answers) < len(self._connections):
            waiting = {other: rank for rank, other in enumerate(self._connections) if rank not in answers}
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            readable, _, _ = select.select(list(waiting), [], [], left)
            if not readable:
                self.close()
                raise RankError("the ranks were not ready in time", expected=f"{timeout:.0f} s")
            for connection in readable:
                try:
                    answers[waiting[connection]] = receive(connection)
                except (EOFError, OSError, ValueError):
                    self._report_death()
            failed = [answer for answer in answers.values() if "error" in answer]
            # A refused input is refused by every rank alike; anything else leaves the ranks out of step.
            if failed and (not failed[0]["kind"] or timeout is not None):
                self.close()
                raise _as_error(failed[0])
        if failed:
            raise _as_error(failed[0])
        return [answers[rank] for rank in range(len(answers))]

    def _report_death(self) -> None:
        deadline = time.monotonic() + 1.0  # the socket closes a moment before the process is gone
        dead: list[int] = []
        while not dead and time.monotonic() < deadline:
            dead = [rank for rank, worker in enumerate(self._workers) if worker.poll() is not None]
            time.sleep(0.01)
        codes = ", ".join(f"rank {rank} with code {self._workers[rank].returncode}" for rank in dead) or "a rank"
        self.close()
        raise RankError(f"ended unexpectedly: {codes}", where="tensor parallel", advice="Its last words are above.")


def open_runner(model_path: Path, num_blocks: int, block_size: int, cpu_mem_size: int = 0) -> Any:
    """A ModelRunner in this process for a directory of one rank, else a MultiRankRunner: the same to its caller."""
    _log.info("loading weights: %s", model_path)
    begin = time.monotonic()
    read_ahead(sorted(model_path.glob("rank_*/*.safetensors")))
    if ModelDir.open(model_path).tp > 1:
        runner: Any = MultiRankRunner(model_path, num_blocks, block_size, cpu_mem_size)
    else:
        from telechat_mindie.backend.model_runner import ModelRunner

        runner = ModelRunner(str(model_path), 0, cpu_mem_size, block_size, num_blocks=num_blocks)
    _log.debug("loaded in %.1f s, with a cache of %d blocks", time.monotonic() - begin, num_blocks)
    return runner


def read_ahead(files: Sequence[Path]) -> None:
    """Have the system read files into its page cache in the background.

    Weights are mapped, and before they are used comes MindSpore's import, which takes seconds.
    """

    def read() -> None:
        for file in files:
            with contextlib.suppress(OSError), file.open("rb") as opened:  # whoever needs it will say what is wrong
                for begin in range(0, file.stat().st_size, READ_AHEAD_BYTES):
                    os.posix_fadvise(opened.fileno(), begin, READ_AHEAD_BYTES, os.POSIX_FADV_WILLNEED)

    threading.Thread(target=read, name="read ahead", daemon=True).start()


def _as_error(answer: dict[str, Any]) -> TelechatMindieError:
    kind = getattr(errors, answer["kind"] or "", RankError)
    return kind(answer["error"])  # type: ignore[no-any-return]


def free_port() -> int:
    """A port of the scheduler's address that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((SCHEDULER_HOST, 0))
        port: int = probe.getsockname()[1]
        return port
