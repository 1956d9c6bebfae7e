"""`telechat-mindie build`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from telechat_mindie.commands.completion import names_in
from telechat_mindie.commands.messages import logger
from telechat_mindie.commands.options import (
    Adapter,
    AllowNonfinite,
    AllowOverflow,
    AsJson,
    Backend,
    BlockSize,
    ConfigDir,
    Dtype,
    Force,
    NoQkvConcat,
    PackedByRank,
    Resume,
    Source,
    Step,
    Strategy,
    Tp,
)


def build(
    model_path: Path = typer.Argument(help="Directory to make."),
    checkpoint: Path = typer.Option(..., "--checkpoint", help="A TeleChat2 checkpoint, or the output of its training."),
    config: ConfigDir = None,
    adapter: Adapter = None,
    strategy: Strategy = None,
    step: Step = None,
    source: Source = None,
    packed_by_rank: PackedByRank = False,
    backend: Backend = "ms",
    tp: Tp = 1,
    dtype: Dtype = "auto",
    no_qkv_concat: NoQkvConcat = False,
    max_seq_len: int = typer.Option(None, "--max-seq-len", help="Longest sequence in tokens; default: as trained."),
    block_size: BlockSize = 128,
    bare_prompt: str = typer.Option(
        "chat",
        "--bare-prompt",
        help="chat: a prompt without control tokens is a user's question; raw: plain text.",
        autocompletion=names_in("text.settings", "BARE_PROMPT_MODES"),
    ),
    force: Force = False,
    resume: Resume = False,
    allow_nonfinite: AllowNonfinite = False,
    allow_overflow: AllowOverflow = False,
    as_json: AsJson = False,
) -> None:
    """Turn a checkpoint into a model directory that MindIE serves.

    Examples:
        telechat-mindie build model --checkpoint TeleChat2-7B
        telechat-mindie build model --checkpoint TeleChat2-35B --tp 4 --dtype bfloat16
        telechat-mindie build model --checkpoint TeleChat2-7B --adapter lora --resume
    """
    from telechat_mindie.checkpoint.training_run import RunChoice
    from telechat_mindie.commands.output import byte_progress, print_json
    from telechat_mindie.errors import name_some
    from telechat_mindie.mindie import ATB, MS, backend_named
    from telechat_mindie.model_dir.atb.build import build_atb
    from telechat_mindie.model_dir.atb.plan import AtbOptions, refuse_ms_options
    from telechat_mindie.model_dir.build import BuildOptions
    from telechat_mindie.model_dir.build import build as run
    from telechat_mindie.units import format_bytes

    choice = RunChoice(strategy, step, tuple(source or ()), packed_by_rank)
    common: dict[str, Any] = {
        "tp": tp,
        "force": force,
        "adapters": tuple(adapter or ()),
        "config_dir": config,
        "choice": choice,
        "resume": resume,
        "allow_nonfinite": allow_nonfinite,
        "allow_overflow": allow_overflow,
    }
    with byte_progress("building") as start:
        if backend_named(backend) == ATB:
            refuse_ms_options(dtype, not no_qkv_concat, max_seq_len, block_size, bare_prompt)
            options = AtbOptions(**common)
            made = build_atb(model_path, checkpoint, options, lambda plan: start(plan.output_bytes), logger.info)
            kind, tp, nbytes = made.kind, made.tp, made.output_bytes
        else:
            ms = BuildOptions(
                dtype=dtype,
                qkv_concat=not no_qkv_concat,
                max_seq_len=max_seq_len,
                block_size=block_size,
                bare_prompt=bare_prompt,
                **common,
            )
            plan = run(model_path, checkpoint, ms, lambda plan: start(plan.output_bytes), logger.info)
            kind, tp, nbytes = plan.dtype, plan.tp, plan.output_bytes
    if as_json:
        print_json({"model_path": str(model_path), "backend": backend, "dtype": kind, "tp": tp, "weight_bytes": nbytes})
    else:
        merged = f", with {name_some(adapter)} merged" if adapter else ""
        ranks = (
            f"{tp} rank{'s' if tp > 1 else ''}"
            if backend == MS
            else f"MindIE's atb, on {tp} card{'s' if tp > 1 else ''}"
        )
        print(f"{model_path}: {format_bytes(nbytes)} of {kind} weights for {ranks}{merged}")
