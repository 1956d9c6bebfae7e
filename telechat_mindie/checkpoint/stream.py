"""Runs a plan: every shard of every rank, journalled, in buffers of constant size."""

from __future__ import annotations

import hashlib
import json
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import telechat_mindie
from telechat_mindie.checkpoint.casting import Findings
from telechat_mindie.checkpoint.pipeline import Pipeline, Progress
from telechat_mindie.checkpoint.plan import Plan, Shard
from telechat_mindie.checkpoint.source import Checkpoint
from telechat_mindie.checkpoint.writer import FileRecord, HashedFile, Journal
from telechat_mindie.config import TelechatConfig
from telechat_mindie.errors import CheckpointError, InputError, OutputError, name_some
from telechat_mindie.staging import StagedDirectory

DTYPE_CHOICES = ("auto", "float16", "bfloat16", "float32")


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """What a person may choose of any conversion."""

    resume: bool = False
    allow_nonfinite: bool = False
    allow_overflow: bool = False


@dataclass(frozen=True)
class Written:
    """What a conversion wrote, and the odd numbers of the source by weight."""

    records: list[FileRecord]
    findings: dict[str, dict[str, int]]


def choose_dtype(wanted: str, stored: str, config: TelechatConfig) -> str:
    """`auto`: a 16-bit checkpoint keeps its dtype; float32 becomes float16 for a dense model, bfloat16 for a MoE.

    The latter is what the published mindformers yamls serve; the published 115B checkpoint is float32.
    """
    if wanted not in DTYPE_CHOICES:
        raise InputError("unknown dtype", where="--dtype", expected=" or ".join(DTYPE_CHOICES), found=wanted)
    if wanted != "auto":
        return wanted
    if stored != "float32":
        return stored
    return "bfloat16" if config.is_moe else "float16"


def convert_staged(
    plan: Plan,
    source: Checkpoint,
    staged: StagedDirectory,
    options: ConvertOptions,
    progress: Progress | None = None,
    *choices: object,
) -> Written:
    """Run the plan into a staged directory, with a journal that a killed run leaves behind for `resume`.

    An error, unlike a kill or an interrupt, removes what was written, unless it was a resumed run.

    Args:
        choices: whatever else decides the output; another value makes an old journal invalid.

    Raises:
        CheckpointError, OutputError: see `convert`.
    """
    staged.keep = True
    try:
        journal = Journal(staged.path, fingerprint(plan, source, *choices), resume=options.resume)
        try:
            _remove_strays(staged.path, journal)
            records = convert(
                plan,
                source,
                staged.path,
                journal,
                allow_nonfinite=options.allow_nonfinite,
                allow_overflow=options.allow_overflow,
                progress=progress,
            )
        finally:
            journal.close()
    except Exception:
        staged.keep = options.resume
        raise
    staged.keep = False
    return Written(records, journal.findings)


def _remove_strays(root: Path, journal: Journal) -> None:
    """Delete what a killed run left unfinished, so that it cannot end up in the result."""
    kept = {root / path for path in journal.records} | {root / Journal.NAME}
    for path in root.rglob("*"):
        if not path.is_dir() and path not in kept:
            path.unlink()


def fingerprint(plan: Plan, source: Checkpoint, *choices: object) -> str:
    """A hash of everything that decides the bytes of a conversion: plan, options, version, and the source's files."""
    files = {}
    for weight in source.weights.values():
        for tile in weight.tiles:
            for extent in tile.stored.extents:
                if str(extent.file) not in files:
                    status = extent.file.stat()
                    files[str(extent.file)] = (status.st_size, status.st_mtime_ns)
    shards = [
        [shard.file, shard.nbytes, hashlib.sha256(b"".join(frame.prefix for frame in shard.frames)).hexdigest()]
        for shard in plan.shards
    ]
    decisive = [telechat_mindie.__version__, plan.dtype, plan.tp, choices, shards, sorted(files.items())]
    return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()


def convert(
    plan: Plan,
    checkpoint: Checkpoint,
    root: Path,
    journal: Journal,
    *,
    allow_nonfinite: bool = False,
    allow_overflow: bool = False,
    progress: Progress | None = None,
) -> list[FileRecord]:
    """Write every shard of every rank below `root`, skipping those that the journal has.

    Args:
        progress: called with the number of output bytes just written (or found finished).

    Returns:
        A record of every file, in rank and shard order.

    Raises:
        CheckpointError: the source is damaged, or holds NaN, infinity or values beyond float16 that are not allowed.
        OutputError: not enough space, or a file cannot be written.
    """
    report = progress or (lambda _: None)
    pending = [shard for shard in plan.shards if not _is_finished(plan, shard, journal)]
    report(plan.output_bytes - plan.tp * sum(shard.nbytes for shard in pending))
    _check_space(root, plan.tp * sum(shard.nbytes for shard in pending))
    syncing: Future[None] | None = None
    with Pipeline(plan, checkpoint) as pipeline, ThreadPoolExecutor(1, "sync") as sync_pool:
        for shard in pending:
            files = [HashedFile(root, plan.path(rank, shard), shard.frames) for rank in range(plan.tp)]
            try:
                findings = pipeline.write(shard, files, report)
                _judge(findings, allow_nonfinite, allow_overflow)
            except BaseException:
                pipeline.stop()
                for file in files:
                    file.close()
                raise
            if syncing is not None:
                syncing.result()
            syncing = sync_pool.submit(_finish, files, findings, journal)  # while the next shard is written
        if syncing is not None:
            syncing.result()
    return [journal.records[plan.path(rank, shard)] for rank in range(plan.tp) for shard in plan.shards]


def _is_finished(plan: Plan, shard: Shard, journal: Journal) -> bool:
    return all(plan.path(rank, shard) in journal.records for rank in range(plan.tp))


def _finish(files: list[HashedFile], findings: dict[str, Findings], journal: Journal) -> None:
    """Sync a shard's files, then remember them."""
    records = [file.finish() for file in files]
    journal.add(records, {name: asdict(found) for name, found in findings.items()})


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
