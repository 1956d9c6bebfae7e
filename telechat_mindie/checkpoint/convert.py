"""Runs a plan: reads ahead, checks and casts, writes behind, in buffers of constant size."""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from telechat_mindie.checkpoint.casting import Findings, cast_into, inspect
from telechat_mindie.checkpoint.mapping import Target
from telechat_mindie.checkpoint.plan import Plan, Shard, Step, steps
from telechat_mindie.checkpoint.source import Checkpoint
from telechat_mindie.checkpoint.tensors import DTYPES, TensorReader
from telechat_mindie.checkpoint.views import read_block
from telechat_mindie.checkpoint.writer import FileRecord, HashedFile, Journal
from telechat_mindie.errors import CheckpointError, OutputError, name_some

BLOCK_BYTES = 8 << 20
DEPTH = 3  # blocks read ahead, and blocks waiting to be written

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Block:
    """Part of a step that fits a buffer: `take` gives, for a rank, the slice of the block that is appended to its file.

    `rows` and `columns` are of the source weight. With `transposed` the block's array is [columns, rows].
    """

    step: Step
    dtype: str
    rows: tuple[int, int]
    columns: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.rows[1] - self.rows[0], self.columns[1] - self.columns[0]
        return (columns, rows) if self.step.transposed else (rows, columns)

    def takers(self, array: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        for rank, (begin, end) in self.step.takers:
            left, right = max(begin, self.columns[0]) - self.columns[0], min(end, self.columns[1]) - self.columns[0]
            if left < right:
                yield rank, array[left:right] if self.step.transposed else array[:, left:right]


def blocks(target: Target, plan: Plan, checkpoint: Checkpoint) -> Iterator[Block]:
    """A target's bytes in the order of its file: whole source rows at a time, or source columns where transposed."""
    for step in steps(target, plan.config, plan.tp):
        dtype = checkpoint.weights[step.source].dtype
        item = max(DTYPES[dtype].itemsize, DTYPES[plan.dtype].itemsize)
        rows, columns = step.rows, (0, step.columns)
        cut = columns if step.transposed else rows
        across = rows[1] - rows[0] if step.transposed else step.columns
        stride = max(1, BLOCK_BYTES // (across * item))
        for begin in range(*cut, stride):
            piece = (begin, min(begin + stride, cut[1]))
            yield Block(step, dtype, rows, piece) if step.transposed else Block(step, dtype, piece, columns)


def convert(
    plan: Plan,
    checkpoint: Checkpoint,
    root: Path,
    journal: Journal,
    *,
    folder: str = "rank_{rank}",
    allow_nonfinite: bool = False,
    allow_overflow: bool = False,
    progress: Progress | None = None,
) -> list[FileRecord]:
    """Write every shard of every rank below `root`, skipping those that the journal has.

    Args:
        folder: each rank's folder below root.
        progress: called with the number of output bytes just written (or found finished).

    Returns:
        A record of every file, in rank and shard order.

    Raises:
        CheckpointError: the source is damaged, or holds NaN, infinity or values beyond float16 that are not allowed.
        OutputError: not enough space, or a file cannot be written.
    """
    report = progress or (lambda _: None)
    done = [all(_path(folder, rank, shard) in journal.records for rank in range(plan.tp)) for shard in plan.shards]
    _check_space(
        root, sum(shard.nbytes * plan.tp for shard, finished in zip(plan.shards, done, strict=True) if not finished)
    )
    with _Engine(plan, checkpoint) as engine:
        for shard, finished in zip(plan.shards, done, strict=True):
            if finished:
                report(shard.nbytes * plan.tp)
                continue
            files = [HashedFile(root, _path(folder, rank, shard), shard.nbytes) for rank in range(plan.tp)]
            try:
                findings = engine.write(shard, files, report)
                _judge(findings, allow_nonfinite, allow_overflow)
                records = [file.finish() for file in files]
            finally:
                for file in files:
                    file.close()
            journal.add(records, {name: asdict(found) for name, found in findings.items()})
    return [journal.records[_path(folder, rank, shard)] for rank in range(plan.tp) for shard in plan.shards]


def _path(folder: str, rank: int, shard: Shard) -> str:
    return str(Path(folder.format(rank=rank), shard.file))


class _Engine:
    """One thread reads ahead and one writes behind; checking and casting go on in between."""

    def __init__(self, plan: Plan, checkpoint: Checkpoint) -> None:
        self._plan = plan
        self._checkpoint = checkpoint
        self._reader = TensorReader()
        self._read_pool = ThreadPoolExecutor(1, "read")
        self._write_pool = ThreadPoolExecutor(1, "write")
        self._read_buffers = [np.empty(BLOCK_BYTES, np.uint8) for _ in range(DEPTH + 1)]
        self._write_buffers = deque(np.empty(BLOCK_BYTES, np.uint8) for _ in range(DEPTH))
        self._writes: deque[tuple[Future[None], np.ndarray]] = deque()

    def __enter__(self) -> _Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self._read_pool.shutdown(cancel_futures=True)
        self._write_pool.shutdown(cancel_futures=True)
        self._reader.__exit__()

    def write(self, shard: Shard, files: list[HashedFile], report: Progress) -> dict[str, Findings]:
        """Fill the ranks' files of one shard; returns the odd numbers by source weight."""
        findings: dict[str, Findings] = {}
        for file in files:
            file.append(memoryview(shard.header))
        report(len(shard.header) * len(files))
        pending: deque[tuple[Block, Future[np.ndarray]]] = deque()
        work = (block for target in shard.targets for block in blocks(target, self._plan, self._checkpoint))
        for number, block in enumerate(work):
            buffer = self._read_buffers[number % len(self._read_buffers)]
            pending.append((block, self._read_pool.submit(self._read, block, buffer)))
            if len(pending) > DEPTH:
                self._deliver(*pending.popleft(), files, findings, report)
        while pending:
            self._deliver(*pending.popleft(), files, findings, report)
        while self._writes:
            self._wait_for_write()
        return findings

    def _read(self, block: Block, buffer: np.ndarray) -> np.ndarray:
        weight = self._checkpoint.weights[block.step.source]
        dtype = DTYPES[block.dtype]
        rows, columns = block.rows[1] - block.rows[0], block.columns[1] - block.columns[0]
        if block.step.transposed:
            array = np.empty((rows, columns), dtype)
            read_block(self._reader, weight, block.rows, block.columns, array)
            turned = _view(buffer, dtype, (columns, rows))
            turned[:] = array.T
            return turned
        array = _view(buffer, dtype, (rows, columns))
        read_block(self._reader, weight, block.rows, block.columns, array)
        return array

    def _deliver(
        self,
        block: Block,
        reading: Future[np.ndarray],
        files: list[HashedFile],
        findings: dict[str, Findings],
        report: Progress,
    ) -> None:
        array = reading.result()
        found = inspect(array, self._plan.dtype)
        if found:
            findings.setdefault(block.step.source, Findings())
            findings[block.step.source] += found
        dtype = DTYPES[self._plan.dtype]
        for rank, part in block.takers(array):
            buffer = self._free_buffer()
            out = _view(buffer, dtype, part.shape)
            cast_into(part, out)
            data = out.reshape(-1).view(np.uint8).data
            self._writes.append((self._write_pool.submit(files[rank].append, data), buffer))
            report(len(data))

    def _free_buffer(self) -> np.ndarray:
        if not self._write_buffers:
            self._wait_for_write()
        return self._write_buffers.popleft()

    def _wait_for_write(self) -> None:
        writing, buffer = self._writes.popleft()
        writing.result()
        self._write_buffers.append(buffer)


def _view(buffer: np.ndarray, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """The front of a byte buffer as an array; a single row wider than the buffer gets memory of its own."""
    nbytes = int(np.prod(shape)) * dtype.itemsize
    if nbytes > buffer.nbytes:
        return np.empty(shape, dtype)
    return buffer[:nbytes].view(dtype).reshape(shape)


def _judge(findings: dict[str, Findings], allow_nonfinite: bool, allow_overflow: bool) -> None:
    odd = [name for name, found in findings.items() if found.nan or found.infinite]
    if odd and not allow_nonfinite:
        total = sum(findings[name].nan + findings[name].infinite for name in odd)
        raise CheckpointError(
            f"{total} NaN or infinite values in {name_some(odd)}",
            advice="The checkpoint is damaged; convert it all the same with --allow-nonfinite.",
        )
    wide = [name for name, found in findings.items() if found.overflow]
    if wide and not allow_overflow:
        total = sum(findings[name].overflow for name in wide)
        raise CheckpointError(
            f"{total} values do not fit float16 in {name_some(wide)}",
            advice="Choose --dtype bfloat16, or accept infinities with --allow-overflow.",
        )


def _check_space(root: Path, needed: int) -> None:
    free = shutil.disk_usage(root).free
    if needed > free:
        raise OutputError(
            "not enough free space",
            where=root,
            expected=f"{needed} bytes",
            found=f"{free} bytes",
            advice="Free some space or choose another disk.",
        )
