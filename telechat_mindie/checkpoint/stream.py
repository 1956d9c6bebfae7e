"""Runs a plan: every shard of every rank, journalled, in buffers of constant size."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import telechat_mindie
from telechat_mindie.checkpoint.casting import OddValues
from telechat_mindie.checkpoint.pipeline import Pipeline, Progress
from telechat_mindie.checkpoint.plan import ConversionPlan
from telechat_mindie.checkpoint.source import Checkpoint
from telechat_mindie.checkpoint.writer import FileRecord, HashedFile, Journal
from telechat_mindie.config import TelechatConfig
from telechat_mindie.dtypes import SHORT_NAMES, WEIGHT_DTYPES
from telechat_mindie.errors import CheckpointError, InputError, OutputError, name_some
from telechat_mindie.staging import StagedDirectory


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """What a person may choose of any conversion."""

    resume: bool = False
    allow_nonfinite: bool = False
    allow_overflow: bool = False
    overflow_advice: str = "Choose --dtype bfloat16, or accept infinities with --allow-overflow."


@dataclass(frozen=True)
class Written:
    """What a conversion wrote, and the odd values of the source by weight."""

    records: list[FileRecord]
    odd_values: dict[str, dict[str, int]]


def choose_dtype(wanted: str, stored: str, config: TelechatConfig) -> str:
    """The dtype to serve in. `auto`: a 16-bit checkpoint keeps its own; float32 becomes float16, bfloat16 for a MoE.

    The latter is what the published mindformers yamls serve; the published 115B checkpoint is float32.

    Raises:
        InputError: `wanted` is unknown.
    """
    if wanted != "auto":
        return known_dtype(wanted)
    if stored != "float32":
        return stored
    return "bfloat16" if config.is_moe else "float16"


def known_dtype(wanted: str) -> str:
    """The name of the dtype that somebody wants, which may be a short one. Raises InputError where no weight has it."""
    name = SHORT_NAMES.get(wanted.lower(), wanted)
    if name not in WEIGHT_DTYPES:
        expected = " or ".join(("auto", *WEIGHT_DTYPES))
        is_quantised = re.match(r"(u?int|fp|float|nf|q|w)[48]", wanted.lower())
        advice = "Nothing is quantised here; MindIE's own tools do that." if is_quantised else None
        raise InputError("unknown dtype", where="--dtype", expected=expected, found=wanted, advice=advice)
    return name


def convert_staged(
    plan: ConversionPlan,
    source: Checkpoint,
    staged: StagedDirectory,
    options: ConvertOptions,
    progress: Progress | None = None,
    *choices: object,
) -> Written:
    """Run the plan into a staged directory, with a journal that a killed run leaves behind for `resume`.

    An error, unlike a kill or an interrupt, removes what was written, unless it was a resumed run.

    Args:
        progress: called with the number of output bytes just written (or found finished).
        choices: whatever else decides the output; another value makes an old journal invalid.

    Raises:
        CheckpointError: the source is damaged, or holds NaN, infinity or values beyond float16 that are not allowed.
        OutputError: not enough space, or a file cannot be written.
    """
    journal = Journal(staged.path, _fingerprint(plan, source, *choices), resume=options.resume)
    try:
        staged.resumable = bool(journal.records)
        journal.remove_strays()
        _write(plan, source, staged.path, journal, options, progress or (lambda _: None))
    finally:
        staged.resumable = bool(journal.records)
        journal.close()
    records = [journal.records[plan.path(rank, shard)] for rank in range(plan.tp) for shard in plan.shards]
    return Written(records, journal.odd_values)


def _fingerprint(plan: ConversionPlan, source: Checkpoint, *choices: object) -> str:
    """A hash of everything that decides the bytes of a conversion: plan, options, version, source.

    The model's files go in by size and time, for they are too large to be read twice, and by what of them each stored
    tensor is put together from, for a training run can be read in several ways; adapters go in by their sha256.
    """
    stored = {id(tile.stored): tile.stored for weight in source.weights.values() for tile in weight.tiles}
    paths = {extent.file for tensor in stored.values() for extent in tensor.extents}
    pieces = hashlib.sha256()
    for tensor in stored.values():
        pieces.update(repr(tensor).encode())
    files = [(str(path), status.st_size, status.st_mtime_ns) for path in paths for status in (path.stat(),)]
    shards = [
        [shard.file, shard.nbytes, hashlib.sha256(b"".join(frame.prefix for frame in shard.frames)).hexdigest()]
        for shard in plan.shards
    ]
    adapters = [repr(adapter) for adapter in source.adapters]
    read = [sorted(files), pieces.hexdigest(), repr(source.config), *adapters]
    decisive = [telechat_mindie.__version__, plan.dtype, plan.tp, choices, shards, *read]
    return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()


def _write(
    plan: ConversionPlan, source: Checkpoint, root: Path, journal: Journal, options: ConvertOptions, report: Progress
) -> None:
    """Write every shard of every rank below `root`, skipping those that the journal has."""
    pending = [
        shard for shard in plan.shards if any(plan.path(rank, shard) not in journal.records for rank in range(plan.tp))
    ]
    nbytes = plan.tp * sum(shard.nbytes for shard in pending)
    report(plan.output_bytes - nbytes)
    check_space(root, nbytes)
    syncing: Future[None] | None = None
    with Pipeline(plan, source) as pipeline, ThreadPoolExecutor(1, "sync") as sync_pool:
        for shard in pending:
            files = [HashedFile(root, plan.path(rank, shard), shard.frames) for rank in range(plan.tp)]
            try:
                odd = pipeline.write(shard, files, report)
                _judge(odd, options)
            except BaseException:
                pipeline.stop()
                for file in files:
                    file.close()
                raise
            if syncing is not None:
                syncing.result()
            syncing = sync_pool.submit(_finish, files, odd, journal)  # while the next shard is written
        if syncing is not None:
            syncing.result()


def _finish(files: list[HashedFile], odd: dict[str, OddValues], journal: Journal) -> None:
    """Sync a shard's files, then remember them."""
    journal.add([file.finish() for file in files], {name: asdict(counts) for name, counts in odd.items()})


def _judge(odd: dict[str, OddValues], options: ConvertOptions) -> None:
    nonfinite = {name: counts.nan + counts.infinite for name, counts in odd.items() if counts.nan or counts.infinite}
    if nonfinite and not options.allow_nonfinite:
        raise CheckpointError(
            f"{sum(nonfinite.values())} NaN or infinite values in {name_some(nonfinite)}",
            advice="The checkpoint is damaged; convert it all the same with --allow-nonfinite.",
        )
    overflow = {name: counts.overflow for name, counts in odd.items() if counts.overflow}
    if overflow and not options.allow_overflow:
        raise CheckpointError(
            f"{sum(overflow.values())} values do not fit float16 in {name_some(overflow)}",
            advice=options.overflow_advice,
        )


def check_space(root: Path, needed: int) -> None:
    """Raises OutputError where `needed` bytes do not fit into the file system of `root`."""
    free = shutil.disk_usage(root).free
    if needed > free:
        raise OutputError(
            "not enough free space",
            where=root,
            expected=f"{needed} bytes",
            found=f"{free} bytes",
            advice="Free some space or choose another disk.",
        )
