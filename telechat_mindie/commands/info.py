"""`telechat-mindie info`."""

from __future__ import annotations

import typer

from telechat_mindie.commands.options import AsJson, ModelPath


def info(
    model_path: ModelPath,
    kv_gb: int = typer.Option(8, "--kv-gb", min=1, help="Memory for the KV cache of each card (npuMemSize), in GB."),
    as_json: AsJson = False,
) -> None:
    """Say what a model directory holds, and how many tokens fit into a given cache."""
    from telechat_mindie.commands.output import Facts
    from telechat_mindie.kv_budget import CacheShape
    from telechat_mindie.model.kernels.selection import describe_cpu_kernels
    from telechat_mindie.model_dir.layout import ModelDir
    from telechat_mindie.service.facts import model_facts
    from telechat_mindie.units import GB, format_bytes

    directory = ModelDir.open(model_path)
    config, serving, tp = directory.config, directory.serving, directory.tp
    measured = model_facts(directory)
    shape = CacheShape(measured.kv_bytes_per_token_per_rank, serving.block_size)
    blocks = shape.usable_blocks_in(kv_gb * GB)
    tokens, sequences = blocks * serving.block_size, shape.sequences(blocks, serving.max_seq_len)
    weight_bytes, qkv_concat = measured.weight_bytes_per_rank, directory.manifest["qkv_concat"]
    kernels = describe_cpu_kernels(serving.dtype, tp)
    experts = "none"
    if config.is_moe:
        active = f"{config.active_parameter_count:,} active parameters"
        experts = f"{config.num_experts}, {config.experts_per_token} a token, {active}"
    facts, count = Facts(), config.parameter_count
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
    facts.show(str(model_path), as_json=as_json)
