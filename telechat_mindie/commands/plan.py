"""`telechat-mindie plan`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from telechat_mindie.commands.output import Facts
    from telechat_mindie.model_dir.atb.plan import AtbOptions


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
    device_mem: float = typer.Option(None, "--device-mem", "--npu-mem", help="Memory of a card in GB: what fits?"),
    target: Path = typer.Option(Path(), "--target", help="Folder to build in: its free space and speed are measured."),
    no_probe: bool = typer.Option(False, "--no-probe", help="Do not write a file to measure the disk."),
    as_json: AsJson = False,
) -> None:
    """Say what a build would write, need and leave room for, without building."""
    import shutil

    from telechat_mindie import variants
    from telechat_mindie.checkpoint.estimate import from_config, peak_memory, probe_disk, source_facts
    from telechat_mindie.checkpoint.generation import read_generation
    from telechat_mindie.checkpoint.mapping import mindformers_targets
    from telechat_mindie.checkpoint.plan import make_plan
    from telechat_mindie.checkpoint.stream import choose_dtype
    from telechat_mindie.checkpoint.training_run import RunChoice
    from telechat_mindie.commands.output import Facts, print_table
    from telechat_mindie.computation import refusal
    from telechat_mindie.errors import InputError
    from telechat_mindie.kv_budget import CacheShape, CardBudget
    from telechat_mindie.mindie import ATB, backend_named
    from telechat_mindie.model_dir.atb.plan import AtbOptions, refuse_ms_options
    from telechat_mindie.model_dir.build import BuildOptions, check_lengths, read_tokenizer
    from telechat_mindie.units import GB, format_bytes

    if (checkpoint is None) == (variant is None):
        raise InputError("name one of the two", where="--checkpoint, --variant")
    choice = RunChoice(strategy, step, tuple(other_sources or ()), packed_by_rank)
    if checkpoint is None and (config_dir or choice):
        raise InputError("is for a checkpoint", where="--config, --strategy, --step, --source, --packed-by-rank")
    if backend_named(backend) == ATB:
        refuse_ms_options(dtype, not no_qkv_concat, max_seq_len, block_size)
        options = AtbOptions(config_dir=config_dir, choice=choice)
        _atb_facts(checkpoint, variant, options, tp, device_mem, target).show(
            str(checkpoint or variant), as_json=as_json
        )
        return
    source = (
        from_config(variants.named(variant)) if checkpoint is None else source_facts(checkpoint, config_dir, choice)
    )
    config = source.config
    targets = mindformers_targets(config, qkv_concat=not no_qkv_concat, transposed_experts=config.is_moe)
    made = make_plan(config, targets, choose_dtype(dtype, source.dtype, config), tp)
    length = max_seq_len or config.seq_length
    shape = CacheShape(config.kv_bytes_per_token(made.dtype, tp), block_size)
    free, peak = shutil.disk_usage(target).free, peak_memory(made)
    short = max(0, made.output_bytes - free)
    facts = Facts()
    facts.add(
        "source",
        f"{source.tensors} tensors, {source.nbytes:,} bytes of {source.dtype}",
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
    facts.add("weights a card", f"{format_bytes(nbytes)} ({nbytes:,} bytes)", rank_bytes=nbytes)
    per_token = shape.token_bytes
    facts.add("KV cache", f"{per_token:,} bytes a token and card", kv_bytes_per_token=per_token, max_seq_len=length)
    facts.add("peak memory", f"about {format_bytes(peak)}, whatever the model", peak_memory_bytes=peak)
    missing = f": {format_bytes(short)} too little" if short else ""
    disk = f"{format_bytes(free)} free in {target.resolve()}{missing}"
    facts.add("disk", disk, disk_free_bytes=free, disk_short_bytes=short)
    if not no_probe:
        speed = probe_disk(target)
        # Reading and writing go on side by side; a disk that does both takes the sum.
        seconds = (source.nbytes + made.output_bytes) / speed
        time = f"about {_duration(seconds)} at {format_bytes(speed)}/s, if one disk reads and writes"
        facts.add("time", time, disk_bytes_per_second=round(speed), estimated_seconds=round(seconds))
    if device_mem is not None:
        budget = CardBudget.of(device_mem, nbytes, config.vocab_size)
        room = budget.room(shape, length)
        fit = {
            "device_bytes": int(budget.card * GB),
            "reserve_bytes": int(budget.reserve * GB),
            "npu_mem_gb": budget.cache,
            "kv_tokens": room.tokens,
            "sequences": room.sequences,
        }
        held = f"{budget.cache} GB of cache: {room.tokens:,} tokens, {room.sequences} sequences of {length}"
        facts.add(f"a {device_mem:g} GB card", f"{budget}, so {held}", fit=fit)
    facts.show(str(checkpoint or variant), as_json=as_json)
    if not as_json:
        ranks = f"rank_0 .. rank_{tp - 1}" if tp > 1 else "rank_0"
        listing = [(made.path(0, shard).replace("rank_0", ranks), f"{shard.nbytes:,}") for shard in made.shards]
        print_table("files", listing, ("file", "bytes each"))


def _atb_facts(
    checkpoint: Path | None, variant: str | None, options: AtbOptions, tp: int, device_mem: float | None, target: Path
) -> Facts:
    """What `build --backend atb` would write, and what fits beside it on a card."""
    import shutil

    from telechat_mindie import variants
    from telechat_mindie.checkpoint.estimate import source_facts
    from telechat_mindie.checkpoint.msmodelslim import description_file
    from telechat_mindie.commands.output import Facts
    from telechat_mindie.kv_budget import CacheShape, CardBudget
    from telechat_mindie.mindie import ATB
    from telechat_mindie.model_dir.atb.plan import open_source, plan_atb, plan_float16, refuse
    from telechat_mindie.model_dir.atb.rules import BLOCK_SIZE, DTYPE, plain_length
    from telechat_mindie.units import GB, format_bytes

    if checkpoint is not None and description_file(checkpoint) is not None:
        made = plan_atb(open_source(checkpoint, options), tp)
    else:
        config = (
            source_facts(checkpoint, options.config_dir, options.choice).config
            if checkpoint is not None
            else variants.named(str(variant))
        )
        refuse(config)
        made = plan_float16(config, tp)
    config, length = made.config, plain_length(made.config)
    facts = Facts()
    facts.add("backend", "atb: MindIE 3.0 and later", backend=ATB, parameters=config.parameter_count)
    listed = [{"path": name, "bytes": nbytes} for name, nbytes in made.files.items()]
    text = f"{len(listed)} file{'s' if len(listed) > 1 else ''}, {format_bytes(made.output_bytes)} of {made.kind}"
    facts.add("output", text, dtype=made.kind, tp=made.tp, files=listed, output_bytes=made.output_bytes)
    nbytes = made.rank_bytes
    text = f"{format_bytes(nbytes)} on each of {made.tp}: the embedding whole, query and key_value twice"
    facts.add("weights a card", text, rank_bytes=nbytes)
    shape = CacheShape(config.kv_bytes_per_token(DTYPE, made.tp), BLOCK_SIZE)
    per_token = shape.token_bytes
    facts.add("KV cache", f"{per_token:,} bytes a token and card", kv_bytes_per_token=per_token)
    text = f"{length} of {config.seq_length} tokens: atb_llm has no dynamic NTK"
    facts.add("right up to", text, max_seq_len=config.seq_length, plain_length=length)
    free = shutil.disk_usage(target).free
    short = max(0, made.output_bytes - free)
    missing = f": {format_bytes(short)} too little" if short else ""
    text = f"{format_bytes(free)} free in {target.resolve()}{missing}"
    facts.add("disk", text, disk_free_bytes=free, disk_short_bytes=short)
    if device_mem is not None:
        budget = CardBudget.of(device_mem, nbytes, config.vocab_size)
        room = budget.room(shape, length, -1)
        fit = {
            "device_bytes": int(budget.card * GB),
            "reserve_bytes": int(budget.reserve * GB),
            "kv_tokens": room.tokens,
            "sequences": room.sequences,
        }
        held = f"{budget.left:.1f} GB of cache: {room.tokens:,} tokens, {room.sequences} sequences of {length}"
        facts.add(f"a {device_mem:g} GB card", f"{budget}, so {held}", fit=fit)
    return facts


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
