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

    from telechat_mindie import variants
    from telechat_mindie.checkpoint.estimate import from_config, peak_memory, probe_disk, source_facts
    from telechat_mindie.checkpoint.fitting import CARD_SIZES, Fitting, smallest
    from telechat_mindie.checkpoint.generation import read_generation
    from telechat_mindie.checkpoint.mapping import mindformers_targets
    from telechat_mindie.checkpoint.plan import make_plan
    from telechat_mindie.checkpoint.stream import choose_dtype
    from telechat_mindie.checkpoint.training_run import RunChoice
    from telechat_mindie.commands.output import Facts, print_table
    from telechat_mindie.commands.plan_atb import atb_facts
    from telechat_mindie.computation import refusal
    from telechat_mindie.errors import InputError
    from telechat_mindie.mindie import ATB, backend_named
    from telechat_mindie.model_dir.atb.plan import AtbOptions, refuse_ms_options
    from telechat_mindie.model_dir.build import BuildOptions, check_lengths, read_tokenizer
    from telechat_mindie.units import format_bytes, format_duration

    if (checkpoint is None) == (variant is None):
        raise InputError("name one of the two", where="--checkpoint, --variant")
    choice = RunChoice(strategy, step, tuple(other_sources or ()), packed_by_rank)
    if checkpoint is None and (config_dir or choice):
        raise InputError("is for a checkpoint", where="--config, --strategy, --step, --source, --packed-by-rank")
    if backend_named(backend) == ATB:
        refuse_ms_options(dtype, not no_qkv_concat, max_seq_len, block_size)
        options = AtbOptions(config_dir=config_dir, choice=choice)
        facts = atb_facts(checkpoint, variant, options, tp, device_mem, target)
        facts.show(str(checkpoint or variant), as_json=as_json)
        return
    source = (
        from_config(variants.named(variant)) if checkpoint is None else source_facts(checkpoint, config_dir, choice)
    )
    config = source.config
    targets = mindformers_targets(config, qkv_concat=not no_qkv_concat, transposed_experts=config.is_moe)
    made = make_plan(config, targets, choose_dtype(dtype, source.dtype, config), tp)
    length = max_seq_len or config.seq_length
    free, peak = shutil.disk_usage(target).free, peak_memory(made)
    short = max(0, made.output_bytes - free)
    facts = Facts()
    facts.add(
        "source",
        f"{source.tensors} tensors, {format_bytes(source.nbytes)} of {source.dtype}",
        source={"tensors": source.tensors, "bytes": source.nbytes, "dtype": source.dtype},
        parameters=config.parameter_count,
    )
    if source.assumed:
        facts.add("assumed", source.assumed, assumed=source.assumed)
    if source.note:
        facts.add("note", source.note, note=source.note)
    beside = config_dir or checkpoint
    if beside is not None and beside.is_dir():
        read_generation(beside, config)
        if (beside / "tokenizer.model").exists():
            read_tokenizer(beside, config, "chat")
            facts.add("tokenizer", "works, with the checkpoint's own settings", tokenizer=True)
        else:
            facts.add("tokenizer", "not there yet; `build` tries it before it writes", tokenizer=False)
    facts.add(
        "output",
        f"{tp} x {len(made.shards)} files, {format_bytes(made.output_bytes)} of {made.dtype}",
        dtype=made.dtype,
        tp=tp,
        files=[{"path": made.path(0, shard), "bytes": shard.nbytes, "ranks": tp} for shard in made.shards],
        output_bytes=made.output_bytes,
    )
    refused = refusal(config)
    try:
        check_lengths(BuildOptions(max_seq_len=max_seq_len, block_size=block_size), config)
    except InputError as error:
        refused = refused or str(error)
    if refused is not None:
        facts.add("build", f"would refuse it: {refused}", build_refusal=refused)
    nbytes = made.rank_bytes
    facts.add("weights a card", format_bytes(nbytes), rank_bytes=nbytes)
    per_token = config.kv_bytes_per_token(made.dtype, tp)
    cache = f"{format_bytes(per_token)} a token and card"
    facts.add("KV cache", cache, kv_bytes_per_token=per_token, max_seq_len=length)
    facts.add("peak memory", f"about {format_bytes(peak)}, whatever the model", peak_memory_bytes=peak)
    missing = f": {format_bytes(short)} too little" if short else ""
    disk = f"{format_bytes(free)} free in {target.resolve()}{missing}"
    facts.add("disk", disk, disk_free_bytes=free, disk_short_bytes=short)
    if probe:
        speed = probe_disk(target)
        # Reading and writing go on side by side; a disk that does both takes the sum.
        seconds = (source.nbytes + made.output_bytes) / speed
        time = f"about {format_duration(seconds)} at {format_bytes(speed)}/s, if one disk reads and writes"
        facts.add("time", time, disk_bytes_per_second=round(speed), estimated_seconds=round(seconds))
    fitting = Fitting(config, targets, made.dtype, block_size, length)
    cards = sorted({*CARD_SIZES, *([] if device_mem is None else [device_mem])})
    table = fitting.table(tp, cards)
    best = smallest(table)
    if device_mem is not None:
        (fit,) = fitting.on(tp, [device_mem])
        held = f"{fit.budget}, so {fit.budget.cache} GB of cache: {fit}"
        facts.add(f"{tp} x {device_mem:g} GB", fit.refusal or held, fit=fit.as_dict())
    named = (
        f"{best.tp} x {best.card:g} GB: {best}" if best else f"none of these holds one sequence of {length:,} tokens"
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
    ranks = f"rank_0 .. rank_{tp - 1}" if tp > 1 else "rank_0"
    listing = [(made.path(0, shard).replace("rank_0", ranks), format_bytes(shard.nbytes)) for shard in made.shards]
    if len(listing) > LISTED_FILES:
        listing[LISTED_FILES - 1 :] = [(f"and {len(listing) - LISTED_FILES + 1} more", "")]
    print_table("files", listing, ("file", "size each"))
