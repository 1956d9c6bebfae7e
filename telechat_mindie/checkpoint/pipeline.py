"""The stages of a conversion side by side: read ahead, check and cast, hash, write."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from telechat_mindie.checkpoint.blocks import Block
from telechat_mindie.checkpoint.casting import OddValues, cast_into, count_odd_values
from telechat_mindie.checkpoint.plan import ConversionPlan, Shard
from telechat_mindie.checkpoint.reader import BLOCK_BYTES, BlockReader, view
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

    def __init__(self, plan: ConversionPlan, checkpoint: Checkpoint) -> None:
        self._plan = plan
        self._reader = BlockReader(checkpoint.weights)
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

    def write(self, shard: Shard, files: Sequence[HashedFile], report: Progress) -> dict[str, OddValues]:
        """Fill the ranks' files of one shard; returns the odd values by source weight."""
        odd: dict[str, OddValues] = {}
        ahead: deque[tuple[Block, str, Future[np.ndarray], np.ndarray]] = deque()

        def deliver() -> None:
            block, dtype, reading, buffer = ahead.popleft()
            counts = self._deliver(block, dtype, reading.result(), buffer, files, report)
            if counts:
                total = odd.setdefault(block.source, OddValues())
                total += counts

        for target in shard.targets:
            for block in self._reader.blocks(target, self._plan):
                buffer = self._take_buffer()
                reading = self._read_pool.submit(self._reader.read, block, buffer)
                ahead.append((block, target.dtype or self._plan.dtype, reading, buffer))
                if len(ahead) > DEPTH:
                    deliver()
        while ahead:
            deliver()
        while self._busy:
            self._wait()
        report(len(files) * sum(len(frame.prefix) for frame in shard.frames))
        return odd

    def _deliver(
        self,
        block: Block,
        dtype: str,
        array: np.ndarray,
        buffer: np.ndarray,
        files: Sequence[HashedFile],
        report: Progress,
    ) -> OddValues:
        """Check and cast a block that was read into `buffer`, and hand its parts to the ranks' files."""
        counts = count_odd_values(array, dtype, self._scratch)
        parts = list(block.split(array))
        if array.dtype.name != dtype or not all(part.flags.c_contiguous for _, part in parts):
            parts, buffer = self._cast(parts, DTYPES[dtype].numpy, buffer)
        futures = []
        for rank, part in parts:
            pieces = files[rank].frame(part.reshape(-1).view(np.uint8).data)
            futures.append(self._hash_pool.submit(files[rank].hash, pieces))
            futures.append(self._write_pool.submit(files[rank].write, pieces))
            report(part.nbytes)
        self._busy.append((futures, buffer))
        return counts

    def _cast(
        self, parts: Sequence[tuple[int, np.ndarray]], dtype: np.dtype, source: np.ndarray
    ) -> tuple[list[tuple[int, np.ndarray]], np.ndarray]:
        """The parts cast to `dtype`, side by side in another buffer; their source buffer is free then."""
        buffer, used, cast = self._take_buffer(), 0, []
        for rank, part in parts:
            out = view(buffer[used:], dtype, part.shape)
            cast_into(part, out)
            used += out.nbytes
            cast.append((rank, out))
        self._free.append(source)
        return cast, buffer

    def _take_buffer(self) -> np.ndarray:
        if not self._free:
            self._wait()
        return self._free.popleft()

    def _wait(self) -> None:
        futures, buffer = self._busy.popleft()
        for future in futures:
            future.result()
        self._free.append(buffer)
