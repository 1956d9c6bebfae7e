"""`verify`: a model directory against its manifest, and against the checkpoint that it was built from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import numpy as np

from telechat_mindie.checkpoint.casting import cast_into
from telechat_mindie.checkpoint.formats.bounds import quoted
from telechat_mindie.checkpoint.formats.tensors import open_regular
from telechat_mindie.checkpoint.mapping import Target, mindformers_targets
from telechat_mindie.checkpoint.msmodelslim import Quantised, read_quantised
from telechat_mindie.checkpoint.pipeline import Progress
from telechat_mindie.checkpoint.plan import ConversionPlan, Shard, make_plan
from telechat_mindie.checkpoint.reader import BLOCK_BYTES, BlockReader
from telechat_mindie.checkpoint.source import Checkpoint, open_checkpoint
from telechat_mindie.checkpoint.training_run import RunChoice
from telechat_mindie.config import TelechatConfig
from telechat_mindie.dtypes import DTYPES
from telechat_mindie.errors import CheckpointError, InputError, ModelDirError, name_some
from telechat_mindie.model_dir.atb.layout import AtbDir
from telechat_mindie.model_dir.atb.plan import atb_conversion, refuse_float_options
from telechat_mindie.model_dir.files import changes, differences
from telechat_mindie.model_dir.layout import ModelDir
from telechat_mindie.model_dir.manifest import Entry, section


def check_files(directory: ModelDir | AtbDir, progress: Progress | None = None) -> list[str]:
    """What is wrong with the directory's files: missing, unknown, of another size or content than the manifest says."""
    missing, extra = differences(directory.path, directory.files)
    problems = [f"{name}: is missing" for name in missing]
    problems += [f"{name}: is not in the manifest" for name in extra]
    return problems + [f"{name}: {fault}" for name, fault in changes(directory.path, directory.files, progress)]


def check_against(
    directory: ModelDir | AtbDir,
    checkpoint: Path,
    on_start: Callable[[int], Progress] | None = None,
    adapters: Sequence[str | Path] = (),
    config_dir: Path | None = None,
    choice: RunChoice | None = None,
    on_note: Callable[[str], object] = lambda _: None,
) -> list[str]:
    """The weights that differ from what the checkpoint gives, every element derived again; memory stays constant.

    Args:
        on_note: called with what a person should know of how the checkpoint was read.

    Raises:
        InputError: the manifest names more adapters, or fewer; an option is for another form of checkpoint.
        ModelDirError: the directory was built from a model of another shape.
        ConfigError, CheckpointError: the checkpoint is refused.
    """
    merged = section(directory.manifest, "source").get("adapters")
    names = [quoted(section(entry).get("name")) for entry in merged] if isinstance(merged, list) else []
    if len(names) != len(adapters):
        raise InputError(
            "does not name the adapters that were merged when the directory was built",
            where="--adapter",
            expected=name_some(names) if names else "none",
            found=name_some(adapters) if adapters else "none",
        )
    if isinstance(directory, AtbDir) and directory.quantised is not None:
        refuse_float_options(config_dir, choice)
        return _copies_that_differ(directory, read_quantised(checkpoint), on_start)
    source = open_checkpoint(checkpoint, config_dir, adapters, choice)
    if source.note:
        on_note(source.note)
    if source.config != directory.config:
        raise ModelDirError("was built from a model of another shape", where=directory.path, expected=source.config)
    plan = atb_conversion(source.config) if isinstance(directory, AtbDir) else _ms_plan(directory, source.config)
    progress = on_start(plan.output_bytes) if on_start else (lambda _: None)
    comparison = _Comparison(directory.path, plan, source, progress)
    try:
        return [problem for shard in plan.shards for problem in comparison.problems(shard)]
    finally:
        comparison.reader.close()


def _ms_plan(directory: ModelDir, config: TelechatConfig) -> ConversionPlan:
    packed = directory.manifest["qkv_concat"]
    targets = mindformers_targets(config, qkv_concat=packed, transposed_experts=config.is_moe)
    return make_plan(config, targets, directory.manifest["dtype"], directory.tp)


def _copies_that_differ(directory: AtbDir, source: Quantised, on_start: Callable[[int], Progress] | None) -> list[str]:
    """The files of a quantised model that have other bytes than those they were copied from."""
    sizes = {name: (source.path / name).stat().st_size for name in source.files}
    progress = on_start(sum(sizes.values())) if on_start else None
    listed = {name: directory.files.get(name, Entry(-1, "")) for name in source.files}
    return [f"{name}: differs from the checkpoint" for name, _ in changes(source.path, listed, progress)]


class _Comparison:
    """Every rank's files read along with the blocks of the plan that makes them."""

    def __init__(self, path: Path, plan: ConversionPlan, source: Checkpoint, progress: Progress) -> None:
        self._path = path
        self._plan = plan
        self._source = source
        self._progress = progress
        self._buffer = np.empty(BLOCK_BYTES, np.uint8)
        self.reader = BlockReader(source.weights)

    def problems(self, shard: Shard) -> Iterator[str]:
        names = [self._plan.path(rank, shard) for rank in range(self._plan.tp)]
        prefix = shard.frames[0].prefix
        with ExitStack() as stack:
            files = []
            for name in names:
                try:
                    descriptor = open_regular(self._path / name, self._path)
                except CheckpointError as error:
                    yield str(error)
                    return
                files.append(stack.enter_context(open(descriptor, "rb")))
                if files[-1].read(len(prefix)) != prefix:
                    yield f"{name}: has another header than the checkpoint gives"
                    return
                self._progress(len(prefix))
            for target in shard.targets:
                for rank in self._ranks_that_differ(target, files):
                    yield f"{names[rank]}: {target.name} differs from the checkpoint"

    def _ranks_that_differ(self, target: Target, files: Sequence[BinaryIO]) -> list[int]:
        differing = set()
        for block in self.reader.blocks(target, self._plan):
            array = self.reader.read(block, self._buffer)
            for rank, part in block.split(array):
                wanted = np.empty(part.shape, DTYPES[self._plan.dtype].numpy)
                cast_into(part, wanted)
                found = np.frombuffer(files[rank].read(wanted.nbytes), np.uint8)
                if not np.array_equal(found, wanted.reshape(-1).view(np.uint8)):
                    differing.add(rank)
                self._progress(wanted.nbytes)
        return sorted(differing)
