"""What `plan` says of a build for either backend, before it comes to disk and cards."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from telechat_mindie import variants
from telechat_mindie.checkpoint.estimate import Source, from_config, peak_memory, source_facts
from telechat_mindie.checkpoint.fitting import Fitting
from telechat_mindie.checkpoint.generation import read_generation
from telechat_mindie.checkpoint.mapping import mindformers_targets
from telechat_mindie.checkpoint.msmodelslim import description_file
from telechat_mindie.checkpoint.plan import make_plan
from telechat_mindie.checkpoint.stream import choose_dtype
from telechat_mindie.checkpoint.training_run import RunChoice
from telechat_mindie.commands.output import Facts
from telechat_mindie.computation import plain_length, refusal
from telechat_mindie.config import TelechatConfig
from telechat_mindie.errors import InputError
from telechat_mindie.mindie import ATB, BACKEND_WORDS, MS
from telechat_mindie.model_dir.atb.plan import AtbOptions, open_quantised, plan_float16, plan_quantised, refuse
from telechat_mindie.model_dir.atb.rules import BLOCK_SIZE, DTYPE
from telechat_mindie.model_dir.build import BuildOptions, check_lengths, read_tokenizer
from telechat_mindie.units import format_bytes


@dataclass(frozen=True)
class Model:
    """What is to be built from.

    Attributes:
        checkpoint: a folder, a file of weights or a config.json; None for the released size `variant`.
        config_dir: where config.json is, if not beside the weights.
        choice: which step of a training run.
    """

    checkpoint: Path | None = None
    variant: str | None = None
    config_dir: Path | None = None
    choice: RunChoice = field(default_factory=RunChoice)

    def source(self) -> Source:
        """What is known of it without its weights."""
        if self.checkpoint is None:
            return from_config(variants.named(str(self.variant)))
        return source_facts(self.checkpoint, self.config_dir, self.choice)


@dataclass(frozen=True)
class Planned:
    """A build that was planned.

    Attributes:
        facts: so far.
        fitting: what it asks of cards.
        tp: how many share the model.
        source_bytes: that are read.
        output_bytes: that are written.
        listing: the files with weights, and the bytes of each.
    """

    facts: Facts
    fitting: Fitting
    tp: int
    source_bytes: int
    output_bytes: int
    listing: list[tuple[str, int]]


def plan_for_ms(
    model: Model, tp: int, dtype: str, qkv_concat: bool, max_seq_len: int | None, block_size: int
) -> Planned:
    """What `build` would write."""
    source = model.source()
    config = source.config
    targets = mindformers_targets(config, qkv_concat=qkv_concat, transposed_experts=config.is_moe)
    made = make_plan(config, targets, choose_dtype(dtype, source.dtype, config), tp)
    facts = Facts()
    _add_source(facts, source, MS)
    beside = model.config_dir or model.checkpoint
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
    if (refused := _refused(config, max_seq_len, block_size)) is not None:
        facts.add("build", f"would refuse it: {refused}", build_refusal=refused)
    facts.add("weights a card", format_bytes(made.rank_bytes), rank_bytes=made.rank_bytes)
    length = max_seq_len or config.seq_length
    per_token, peak = config.kv_bytes_per_token(made.dtype, tp), peak_memory(made)
    cache = f"{format_bytes(per_token)} a token and card"
    facts.add("KV cache", cache, kv_bytes_per_token=per_token, max_seq_len=length)
    facts.add("peak memory", f"about {format_bytes(peak)}, whatever the model", peak_memory_bytes=peak)

    def rank_bytes(ranks: int) -> int:
        return make_plan(config, targets, made.dtype, ranks).rank_bytes

    fitting = Fitting(config, made.dtype, block_size, length, rank_bytes, config.allowed_tp())
    ranks = f"rank_0 .. rank_{tp - 1}" if tp > 1 else "rank_0"
    listing = [(made.path(0, shard).replace("rank_0", ranks), shard.nbytes) for shard in made.shards]
    return Planned(facts, fitting, tp, source.nbytes, made.output_bytes, listing)


def plan_for_atb(model: Model, tp: int) -> Planned:
    """What `build --backend atb` would write."""
    if model.checkpoint is not None and description_file(model.checkpoint) is not None:
        opened = open_quantised(model.checkpoint, AtbOptions(config_dir=model.config_dir, choice=model.choice))
        source = Source(opened.config, opened.kind, opened.nbytes, len(opened.tensors))
        made = plan_quantised(opened, tp)
    else:
        source = model.source()
        refuse(source.config)
        made = plan_float16(source.config, tp)
    config, length = made.config, plain_length(made.config)
    facts = Facts()
    _add_source(facts, source, ATB)
    listed = [{"path": name, "bytes": nbytes} for name, nbytes in made.files.items()]
    text = f"{len(listed)} file{'s' if len(listed) > 1 else ''}, {format_bytes(made.output_bytes)} of {made.kind}"
    facts.add("output", text, dtype=made.kind, tp=made.tp, files=listed, output_bytes=made.output_bytes)
    text = f"{format_bytes(made.rank_bytes)} on each of {made.tp}: the embedding whole, query and key_value twice"
    facts.add("weights a card", text, rank_bytes=made.rank_bytes)
    per_token = config.kv_bytes_per_token(DTYPE, made.tp)
    facts.add("KV cache", f"{format_bytes(per_token)} a token and card", kv_bytes_per_token=per_token)
    text = f"{length} of {config.seq_length} tokens: atb_llm has no dynamic NTK"
    facts.add("right up to", text, max_seq_len=config.seq_length, plain_length=length)
    fitting = Fitting(config, DTYPE, BLOCK_SIZE, length, made.weights, made.allowed_tp, takes_what_is_left=True)
    return Planned(facts, fitting, made.tp, source.nbytes, made.output_bytes, list(made.files.items()))


def _add_source(facts: Facts, source: Source, backend: str) -> None:
    facts.add("backend", BACKEND_WORDS[backend], backend=backend)
    facts.add(
        "source",
        f"{source.tensors} tensors, {format_bytes(source.nbytes)} of {source.dtype}",
        source={"tensors": source.tensors, "bytes": source.nbytes, "dtype": source.dtype},
        parameters=source.config.parameter_count,
    )
    if source.assumed:
        facts.add("assumed", source.assumed, assumed=source.assumed)
    if source.note:
        facts.add("note", source.note, note=source.note)


def _refused(config: TelechatConfig, max_seq_len: int | None, block_size: int) -> str | None:
    """Why `build` would not."""
    try:
        check_lengths(BuildOptions(max_seq_len=max_seq_len, block_size=block_size), config)
    except InputError as error:
        return refusal(config) or str(error)
    return refusal(config)
