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
    from telechat_mindie.commands.output import print_json, print_table
    from telechat_mindie.model.kernels.selection import describe_cpu_kernels
    from telechat_mindie.model_dir.layout import ModelDir
    from telechat_mindie.units import format_bytes

    directory = ModelDir.open(model_path)
    config, serving, tp = directory.config, directory.serving, directory.tp
    per_token = config.kv_bytes_per_token(serving.dtype, tp)
    blocks = (kv_gb << 30) // (per_token * serving.block_size)
    weight_bytes = sum(
        entry["nbytes"] for path, entry in directory.manifest["files"].items() if path.startswith("rank_0/")
    )
    facts = {
        "parameters": config.parameter_count,
        "active_parameters": config.active_parameter_count,
        "layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "ffn_size": config.ffn_size,
        "experts": config.num_experts,
        "experts_per_token": config.experts_per_token,
        "vocab_size": config.vocab_size,
        "dtype": serving.dtype,
        "tp": tp,
        "qkv_concat": directory.manifest["qkv_concat"],
        "max_seq_len": serving.max_seq_len,
        "block_size": serving.block_size,
        "weight_bytes_per_rank": weight_bytes,
        "kv_bytes_per_token_per_rank": per_token,
        "cpu_kernels": describe_cpu_kernels(serving.dtype, tp),
        "kv_gb": kv_gb,
        "kv_tokens": blocks * serving.block_size,
        "kv_sequences": blocks * serving.block_size // serving.max_seq_len,
    }
    if as_json:
        print_json(facts)
        return
    heads = f"{config.num_heads} x {config.head_dim}, {config.num_kv_heads} for keys and values"
    experts = "none"
    if config.is_moe:
        active = f"{config.active_parameter_count:,} active parameters"
        experts = f"{config.num_experts}, {config.experts_per_token} a token, {active}"
    print_table(
        str(model_path),
        [
            ("parameters", f"{config.parameter_count:,}"),
            ("layers", f"{config.num_layers} of {config.hidden_size}, feed-forward {config.ffn_size}"),
            ("heads", heads),
            ("experts", experts),
            ("vocabulary", str(config.vocab_size)),
            ("dtype", f"{serving.dtype}, qkv_concat {'on' if directory.manifest['qkv_concat'] else 'off'}"),
            ("tensor parallel", f"{tp}, {format_bytes(weight_bytes)} of weights a rank"),
            ("longest sequence", f"{serving.max_seq_len} tokens, blocks of {serving.block_size}"),
            ("CPU kernels", str(facts["cpu_kernels"])),
            ("KV cache", f"{per_token:,} bytes a token and rank"),
            (
                f"{kv_gb} GB of cache",
                f"{blocks * serving.block_size:,} tokens, {facts['kv_sequences']} longest sequences",
            ),
        ],
    )
