"""`verify`: a model directory against its manifest, and against the checkpoint that it was built from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import numpy as np

from telechat_mindie.checkpoint.blocks import BLOCK_BYTES, BlockReader, blocks
from telechat_mindie.checkpoint.casting import cast_into
from telechat_mindie.checkpoint.formats.tensors import open_regular
from telechat_mindie.checkpoint.mapping import Target, mindformers_targets
from telechat_mindie.checkpoint.pipeline import Progress
from telechat_mindie.checkpoint.plan import Plan, Shard, make_plan
from telechat_mindie.checkpoint.source import Checkpoint, open_checkpoint
from telechat_mindie.dtypes import DTYPES
from telechat_mindie.errors import CheckpointError, ModelDirError, TelechatMindieError
from telechat_mindie.model_dir.layout import MANIFEST, ModelDir


def check_files(directory: ModelDir, progress: Progress | None = None) -> list[str]:
    """What is wrong with the directory's files: missing, unknown, of another size or content than the manifest says."""
    listed = directory.manifest["files"]
    present = {str(path.relative_to(directory.path)) for path in directory.path.rglob("*") if not path.is_dir()}
    problems = [f"{name}: is missing" for name in sorted(listed.keys() - present)]
    problems += [f"{name}: is not in the manifest" for name in sorted(present - listed.keys() - {MANIFEST})]
    buffer = np.empty(BLOCK_BYTES, np.uint8).data
    for name in sorted(listed.keys() & present):
        try:
            with open(open_regular(directory.path / name, directory.path), "rb", buffering=0) as file:
                digest, nbytes = hashlib.sha256(), 0
                while count := file.readinto(buffer):
                    digest.update(buffer[:count])
                    nbytes += count
                    if progress:
                        progress(count)
        except TelechatMindieError as error:
            problems.append(str(error))
            continue
        if nbytes != listed[name]["nbytes"]:
            problems.append(f"{name}: has {nbytes} bytes instead of {listed[name]['nbytes']}")
        elif digest.hexdigest() != listed[name]["sha256"]:
            problems.append(f"{name}: has another sha256 than when it was built")
    return problems


def check_against(
    directory: ModelDir, checkpoint: Path, on_start: Callable[[int], Progress] | None = None
) -> list[str]:
    """The weights that differ from what the checkpoint gives, every element derived again; memory stays constant.

    Raises:
        ModelDirError: the directory was built from a model of another shape.
        ConfigError, CheckpointError: the checkpoint is refused.
    """
    source = open_checkpoint(checkpoint)
    if source.config != directory.config:
        raise ModelDirError("was built from a model of another shape", where=directory.path, expected=source.config)
    manifest = directory.manifest
    targets = mindformers_targets(
        source.config, qkv_concat=manifest["qkv_concat"], transposed_experts=source.config.is_moe
    )
    plan = make_plan(source.config, targets, manifest["dtype"], directory.tp)
    progress = on_start(plan.output_bytes) if on_start else (lambda _: None)
    comparison = _Comparison(directory.path, plan, source, progress)
    try:
        return [problem for shard in plan.shards for problem in comparison.shard(shard)]
    finally:
        comparison.reader.close()


class _Comparison:
    """Every rank's files read along with the blocks of the plan that makes them."""

    def __init__(self, path: Path, plan: Plan, source: Checkpoint, progress: Progress) -> None:
        self._path = path
        self._plan = plan
        self._source = source
        self._progress = progress
        self._buffer = np.empty(BLOCK_BYTES, np.uint8)
        self.reader = BlockReader(source)

    def shard(self, shard: Shard) -> list[str]:
        names = [self._plan.path(rank, shard) for rank in range(self._plan.tp)]
        with ExitStack() as stack:
            files = []
            for name in names:
                try:
                    descriptor = open_regular(self._path / name, self._path)
                except CheckpointError as error:
                    return [str(error)]
                files.append(stack.enter_context(open(descriptor, "rb")))
                prefix = shard.frames[0].prefix
                if files[-1].read(len(prefix)) != prefix:
                    return [f"{name}: has another header than the checkpoint gives"]
                self._progress(len(prefix))
            return [
                f"{names[rank]}: {target.name} differs from the checkpoint"
                for target in shard.targets
                for rank in self._ranks_that_differ(target, files)
            ]

    def _ranks_that_differ(self, target: Target, files: Sequence[BinaryIO]) -> list[int]:
        differing = set()
        for block in blocks(target, self._plan, self._source):
            array = self.reader.read(block, self._buffer)
            for rank, part in block.takers(array):
                wanted = np.empty(part.shape, DTYPES[self._plan.dtype].numpy)
                cast_into(part, wanted)
                found = np.frombuffer(files[rank].read(wanted.nbytes), np.uint8)
                if not np.array_equal(found, wanted.reshape(-1).view(np.uint8)):
                    differing.add(rank)
                self._progress(wanted.nbytes)
        return sorted(differing)
