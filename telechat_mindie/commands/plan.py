"""`telechat-mindie plan`."""

from __future__ import annotations

from pathlib import Path

import typer

from telechat_mindie.commands.options import (
    AsJson,
    Backend,
    ConfigDir,
    Dtype,
    NoQkvConcat,
    PackedByRank,
    Source,
    Step,
    Strategy,
    Tp,
    Variant,
)

LISTED_FILES = 10


def plan(
    checkpoint: Path = typer.Option(
        None, "--checkpoint", help="A checkpoint; its config.json alone is enough, as a folder or a file."
    ),
    config_dir: ConfigDir = None,
    strategy: Strategy = None,
    step: Step = None,
    other_sources: Source = None,
    packed_by_rank: PackedByRank = False,
    variant: Variant = None,
    backend: Backend = "ms",
    tp: Tp = 1,
    dtype: Dtype = "auto",
    no_qkv_concat: NoQkvConcat = False,
    max_seq_len: int = typer.Option(None, "--max-seq-len", min=1, help="Longest sequence in tokens."),
    block_size: int = typer.Option(128, "--block-size", min=1, help="Tokens of a KV cache block."),
    device_mem: float = typer.Option(
        None, "--device-mem", "--npu-mem", help="Memory of a card in GB: what fits there? Besides 32 and 64."
    ),
    target: Path = typer.Option(Path(), "--target", help="Folder to build in: its free space is looked up."),
    probe: bool = typer.Option(
        False, "--probe/--no-probe", help="Write a file of 256 MiB there to say how long a build takes."
    ),
    as_json: AsJson = False,
) -> None:
    """Say what a build would write and need, and what fits on which cards, without building.

    Examples:
        telechat-mindie plan --checkpoint TeleChat2-7B --tp 2 --device-mem 32
        telechat-mindie plan --variant 35b --tp 4
    """
    import shutil

    from telechat_mindie.checkpoint.estimate import probe_disk
    from telechat_mindie.checkpoint.fitting import CARD_SIZES, smallest
    from telechat_mindie.checkpoint.training_run import RunChoice
    from telechat_mindie.commands.output import print_table
    from telechat_mindie.commands.plan_facts import Model, plan_for_atb, plan_for_ms
    from telechat_mindie.errors import InputError
    from telechat_mindie.mindie import ATB, backend_named
    from telechat_mindie.model_dir.atb.plan import refuse_ms_options
    from telechat_mindie.units import format_bytes, format_duration

    if (checkpoint is None) == (variant is None):
        raise InputError("name one of the two", where="--checkpoint, --variant")
    choice = RunChoice(strategy, step, tuple(other_sources or ()), packed_by_rank)
    if checkpoint is None and (config_dir or choice):
        raise InputError("is for a checkpoint", where="--config, --strategy, --step, --source, --packed-by-rank")
    model = Model(checkpoint, variant, config_dir, choice)
    if backend_named(backend) == ATB:
        refuse_ms_options(dtype, not no_qkv_concat, max_seq_len, block_size)
        planned = plan_for_atb(model, tp)
    else:
        planned = plan_for_ms(model, tp, dtype, not no_qkv_concat, max_seq_len, block_size)
    facts, fitting = planned.facts, planned.fitting
    free = shutil.disk_usage(target).free
    short = max(0, planned.output_bytes - free)
    missing = f": {format_bytes(short)} too little" if short else ""
    disk = f"{format_bytes(free)} free in {target.resolve()}{missing}"
    facts.add("disk", disk, disk_free_bytes=free, disk_short_bytes=short)
    if probe:
        speed = probe_disk(target)
        # Reading and writing go on side by side; a disk that does both takes the sum.
        seconds = (planned.source_bytes + planned.output_bytes) / speed
        time = f"about {format_duration(seconds)} at {format_bytes(speed)}/s, if one disk reads and writes"
        facts.add("time", time, disk_bytes_per_second=round(speed), estimated_seconds=round(seconds))
    cards = sorted({*CARD_SIZES, *([] if device_mem is None else [device_mem])})
    table = fitting.table(planned.tp, cards)
    best = smallest(table)
    if device_mem is not None:
        (fit,) = (fit for row in table for fit in row if (fit.tp, fit.card) == (planned.tp, device_mem))
        held = f"{fit.budget}, so {fit.cache:.4g} GB of cache: {fit}"
        facts.add(f"{fit.tp} x {device_mem:g} GB", fit.refusal or held, fit=fit.as_dict())
    named = (
        f"{best.tp} x {best.card:g} GB: {best}"
        if best
        else f"none of these holds one sequence of {fitting.longest:,} tokens"
    )
    facts.add(
        "smallest that fits",
        named,
        smallest=None if best is None else best.as_dict(),
        cards=[fit.as_dict() for row in table for fit in row],
    )
    facts.show(str(checkpoint or variant), as_json=as_json)
    if as_json:
        return
    rows = [(str(row[0].tp), format_bytes(row[0].rank_bytes), *map(str, row)) for row in table]
    print_table("what fits", rows, ("cards (tp)", "weights each", *(f"{card:g} GB cards" for card in cards)))
    listing = [(name, format_bytes(nbytes)) for name, nbytes in planned.listing]
    if len(listing) > LISTED_FILES:
        listing[LISTED_FILES - 1 :] = [(f"and {len(listing) - LISTED_FILES + 1} more", "")]
    print_table("files", listing, ("file", "size each"))
