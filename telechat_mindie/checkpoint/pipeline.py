"""The stages of a conversion side by side: read ahead, check and cast, hash, write."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from telechat_mindie.checkpoint.blocks import BLOCK_BYTES, Block, BlockReader, blocks, view
from telechat_mindie.checkpoint.casting import Findings, cast_into, inspect
from telechat_mindie.checkpoint.plan import Plan, Shard
from telechat_mindie.checkpoint.source import Checkpoint
from telechat_mindie.checkpoint.writer import HashedFile
from telechat_mindie.dtypes import DTYPES

DEPTH = 3
"""Blocks read ahead, and blocks waiting to be hashed and written."""

Progress = Callable[[int], None]


class Pipeline:
    """Streams shards from a checkpoint into files. Memory: 2 * DEPTH + 3 buffers, and a matrix that is transposed.

    One thread reads, one hashes, one writes; each takes its blocks in order, so a file's bytes come in order too.
    """

    def __init__(self, plan: Plan, checkpoint: Checkpoint) -> None:
        self._plan = plan
        self._checkpoint = checkpoint
        self._reader = BlockReader(checkpoint)
        self._read_pool, self._hash_pool, self._write_pool = (
            ThreadPoolExecutor(1, name) for name in ("read", "hash", "write")
        )
        self._free = deque(np.empty(BLOCK_BYTES, np.uint8) for _ in range(2 * DEPTH + 2))
        self._scratch = np.empty(BLOCK_BYTES, np.uint8)
        self._busy: deque[tuple[list[Future[None]], np.ndarray]] = deque()  # being hashed and written

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._reader.close()

    def stop(self) -> None:
        """Wait for what is under way and drop the rest; the files are nobody's then. May be called again."""
        for pool in (self._read_pool, self._hash_pool, self._write_pool):
            pool.shutdown(cancel_futures=True)

    def write(self, shard: Shard, files: Sequence[HashedFile], report: Progress) -> dict[str, Findings]:
        """Fill the ranks' files of one shard; returns the odd numbers by source weight."""
        findings: dict[str, Findings] = {}
        pending: deque[tuple[Block, Future[np.ndarray], np.ndarray]] = deque()
        for target in shard.targets:
            for block in blocks(target, self._plan, self._checkpoint):
                buffer = self._take_buffer()
                pending.append((block, self._read_pool.submit(self._reader.read, block, buffer), buffer))
                if len(pending) > DEPTH:
                    self._deliver(*pending.popleft(), files, findings, report)
        while pending:
            self._deliver(*pending.popleft(), files, findings, report)
        while self._busy:
            self._wait()
        report(len(files) * sum(len(frame.prefix) for frame in shard.frames))
        return findings

    def _deliver(
        self,
        block: Block,
        reading: Future[np.ndarray],
        buffer: np.ndarray,
        files: Sequence[HashedFile],
        findings: dict[str, Findings],
        report: Progress,
    ) -> None:
        array = reading.result()
        found = inspect(array, self._plan.dtype, self._scratch)
        if found:
            findings.setdefault(block.step.source, Findings())
            findings[block.step.source] += found
        dtype = DTYPES[self._plan.dtype].numpy
        parts = list(block.takers(array))
        if array.dtype != dtype or not all(part.flags.c_contiguous for _, part in parts):
            buffer, parts = self._cast(parts, dtype, buffer)
        futures = []
        for rank, part in parts:
            pieces = files[rank].frame(part.reshape(-1).view(np.uint8).data)
            futures.append(self._hash_pool.submit(files[rank].hash, pieces))
            futures.append(self._write_pool.submit(files[rank].write, pieces))
            report(part.nbytes)
        self._busy.append((futures, buffer))

    def _cast(
        self, parts: list[tuple[int, np.ndarray]], dtype: np.dtype, source: np.ndarray
    ) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
        """The parts cast to `dtype`, side by side in another buffer; their source buffer is free then."""
        buffer, used, found = self._take_buffer(), 0, []
        for rank, part in parts:
            out = view(buffer[used:], dtype, part.shape)
            cast_into(part, out)
            used += out.nbytes
            found.append((rank, out))
        self._free.append(source)
        return buffer, found

    def _take_buffer(self) -> np.ndarray:
        if not self._free:
            self._wait()
        return self._free.popleft()

    def _wait(self) -> None:
        futures, buffer = self._busy.popleft()
        for future in futures:
            future.result()
        self._free.append(buffer)
