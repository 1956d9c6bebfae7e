"""`telechat-mindie info`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from telechat_mindie.commands.options import AsJson, ConfigDir, Source, Step, Strategy

if TYPE_CHECKING:
    from telechat_mindie.checkpoint.training_run import TrainingRun
    from telechat_mindie.commands.output import Facts
    from telechat_mindie.config import TelechatConfig
    from telechat_mindie.model_dir.atb.layout import AtbDir
    from telechat_mindie.model_dir.layout import ModelDir


def info(
    model_path: Path = typer.Argument(help="A model directory, or the output of a training run."),
    kv_gb: int = typer.Option(8, "--kv-gb", min=1, help="Memory for the KV cache of each card (npuMemSize), in GB."),
    config: ConfigDir = None,
    strategy: Strategy = None,
    step: Step = None,
    source: Source = None,
    as_json: AsJson = False,
) -> None:
    """Say what a model directory holds, and how many tokens fit into a given cache; or what a training run has left.

    Examples:
        telechat-mindie info model
        telechat-mindie info training/output --json
    """
    from telechat_mindie.checkpoint.training_run import RunChoice, find_run
    from telechat_mindie.errors import InputError
    from telechat_mindie.model_dir.atb.layout import AtbDir, is_atb
    from telechat_mindie.model_dir.layout import MANIFEST
    from telechat_mindie.service.facts import open_model

    choice = RunChoice(strategy, step, tuple(source or ()))
    if not (model_path / MANIFEST).exists() and (choice or model_path.is_dir()) and not is_atb(model_path):
        run = find_run(model_path, choice)
        if run is not None:
            _show_run(run, config, as_json=as_json)
            return
    if choice or config is not None:
        raise InputError("is for the output of a training run", where="--config, --strategy, --step, --source")
    directory = open_model(model_path)
    if isinstance(directory, AtbDir):
        _show_atb_dir(directory, kv_gb, as_json=as_json)
    else:
        _show_model_dir(directory, kv_gb, as_json=as_json)


def _show_run(run: TrainingRun, config_dir: Path | None, *, as_json: bool) -> None:
    from telechat_mindie.checkpoint.mapping import training_state
    from telechat_mindie.checkpoint.source import config_beside
    from telechat_mindie.checkpoint.training_run import counter_values, spelled
    from telechat_mindie.commands.output import Facts
    from telechat_mindie.units import format_bytes

    facts, strategy = Facts(), run.strategy
    facts.add("ranks", str(len(run.files)), ranks=len(run.files))
    if run.step:
        step, steps = spelled(run.step), [spelled(step) for step in run.steps]
        facts.add("step", f"{step}; every rank has {', '.join(steps)}", step=step, steps=steps)
    if strategy:
        stages, cuts, shards = len(strategy.stages), strategy.most_cuts, strategy.most_shards
        text = f"{stages} pipeline stage(s), parameters cut into {cuts} at most, optimizer parallel over {shards}"
        facts.add("strategy", text, stages=stages, parameter_cuts=cuts, optimizer_shards=shards)
    else:
        facts.add("strategy", "no strategy files beside the checkpoints", stages=None)
    tensors = run.whole(config_beside(run.path, config_dir) if run.needs_config else None)
    for label, kind in (("weights", None), ("optimizer", "optimizer"), ("buffers", "buffer")):
        held = [tensor for name, tensor in tensors.items() if training_state(name) == kind]
        nbytes = sum(tensor.nbytes for tensor in held)
        dtypes = sorted({tensor.dtype for tensor in held})
        text = f"{len(held)} tensors, {format_bytes(nbytes)} of {' and '.join(dtypes)}" if held else "none"
        facts.add(label, text, **{label: {"tensors": len(held), "bytes": nbytes, "dtypes": dtypes}})
    counters = counter_values(tensors)
    listed = ", ".join(f"{name} {value:g}" for name, value in counters.items())
    facts.add("counters", listed or "none", counters=counters)
    facts.show(str(run.path), as_json=as_json)


def _show_atb_dir(directory: AtbDir, kv_gb: int, *, as_json: bool) -> None:
    from telechat_mindie.commands.output import Facts
    from telechat_mindie.kv_budget import CacheShape
    from telechat_mindie.service.facts import model_facts
    from telechat_mindie.units import GB, format_bytes

    facts, measured, model = Facts(), model_facts(directory), directory.quantised
    shape = CacheShape(measured.kv_bytes_per_token_per_rank, measured.block_size)
    blocks, longest = shape.usable_blocks_in(kv_gb * GB), measured.default_length
    tokens, sequences = blocks * measured.block_size, shape.sequences(blocks, longest)
    _add_shape(facts, directory.config, measured.backend)
    facts.add("dtype", directory.dtype, dtype=directory.dtype)
    if model is not None:
        layers, left = model.layers(quantised=True), model.layers(quantised=False)
        text = f"{model.kind}: {', '.join(layers)}; {directory.dtype} in {', '.join(left) or 'norms'}"
        facts.add("quantised", text, quantised=model.kind, quantised_layers=layers, float_layers=left)
    cards, held = measured.tp, measured.weight_bytes_per_rank
    allowed = ", ".join(map(str, directory.allowed_tp))
    text = f"{cards} of {allowed} that are possible, {format_bytes(held)} of weights a card"
    facts.add("cards", text, tp=cards, allowed_tp=list(directory.allowed_tp), weight_bytes_per_rank=held)
    plain, most = directory.plain_length, measured.max_seq_len
    text = f"{most} tokens; right up to {plain}, as atb_llm has no dynamic NTK" if most > plain else f"{most} tokens"
    facts.add("longest sequence", text, max_seq_len=most, plain_length=plain)
    per_token = shape.token_bytes
    facts.add("KV cache", f"{per_token:,} bytes a token and card", kv_bytes_per_token_per_rank=per_token)
    text = f"{tokens:,} tokens, {sequences} sequences of {longest}"
    facts.add(f"{kv_gb} GB of cache", text, kv_gb=kv_gb, kv_tokens=tokens, kv_sequences=sequences)
    facts.show(str(directory.path), as_json=as_json)


def _show_model_dir(directory: ModelDir, kv_gb: int, *, as_json: bool) -> None:
    from telechat_mindie.commands.output import Facts
    from telechat_mindie.kv_budget import CacheShape
    from telechat_mindie.model.kernels.selection import describe_cpu_kernels
    from telechat_mindie.service.facts import model_facts
    from telechat_mindie.units import GB, format_bytes

    config, serving, tp = directory.config, directory.serving, directory.tp
    measured = model_facts(directory)
    shape = CacheShape(measured.kv_bytes_per_token_per_rank, serving.block_size)
    blocks = shape.usable_blocks_in(kv_gb * GB)
    tokens, sequences = blocks * serving.block_size, shape.sequences(blocks, serving.max_seq_len)
    weight_bytes, qkv_concat = measured.weight_bytes_per_rank, directory.manifest["qkv_concat"]
    kernels = describe_cpu_kernels(serving.dtype, tp)
    facts = Facts()
    _add_shape(facts, config, measured.backend)
    concat = f"qkv_concat {'on' if qkv_concat else 'off'}"
    facts.add("dtype", f"{serving.dtype}, {concat}", dtype=serving.dtype, qkv_concat=qkv_concat)
    weights = f"{tp}, {format_bytes(weight_bytes)} of weights a rank"
    facts.add("tensor parallel", weights, tp=tp, weight_bytes_per_rank=weight_bytes)
    longest, block_size = serving.max_seq_len, serving.block_size
    facts.add(
        "longest sequence", f"{longest} tokens, blocks of {block_size}", max_seq_len=longest, block_size=block_size
    )
    facts.add("CPU kernels", kernels, cpu_kernels=kernels)
    per_token = shape.token_bytes
    facts.add("KV cache", f"{per_token:,} bytes a token and rank", kv_bytes_per_token_per_rank=per_token)
    held = f"{tokens:,} tokens, {sequences} longest sequences"
    facts.add(f"{kv_gb} GB of cache", held, kv_gb=kv_gb, kv_tokens=tokens, kv_sequences=sequences)
    facts.show(str(directory.path), as_json=as_json)


def _add_shape(facts: Facts, config: TelechatConfig, backend: str) -> None:
    from telechat_mindie.mindie import BACKEND_WORDS

    facts.add("backend", BACKEND_WORDS[backend], backend=backend)
    experts = "none"
    if config.is_moe:
        active = f"{config.active_parameter_count:,} active parameters"
        experts = f"{config.num_experts}, {config.experts_per_token} a token, {active}"
    count = config.parameter_count
    facts.add("parameters", f"{count:,}", parameters=count, active_parameters=config.active_parameter_count)
    facts.add(
        "layers",
        f"{config.num_layers} of {config.hidden_size}, feed-forward {config.ffn_size}",
        layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_size=config.ffn_size,
    )
    facts.add(
        "heads",
        f"{config.num_heads} x {config.head_dim}, {config.num_kv_heads} for keys and values",
        heads=config.num_heads,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
    )
    facts.add("experts", experts, experts=config.num_experts, experts_per_token=config.experts_per_token)
    facts.add("vocabulary", str(config.vocab_size), vocab_size=config.vocab_size)
