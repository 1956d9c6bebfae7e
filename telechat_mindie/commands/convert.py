"""`telechat-mindie convert`."""

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
    ConfigDir,
    Force,
    PackedByRank,
    Resume,
    Source,
    Step,
    Strategy,
)

FORMS = ("hf", "llama", "safetensors", "ckpt")


def convert(
    checkpoint: Path = typer.Argument(help="A checkpoint in any form, a training run's output, or a model directory."),
    output: Path = typer.Argument(help="File or directory to make."),
    to: str = typer.Option(
        ...,
        "--to",
        help="hf or llama: a directory for other engines; safetensors or ckpt: one MindSpore file.",
        autocompletion=names_in("commands.convert", "FORMS"),
    ),
    config: ConfigDir = None,
    strategy: Strategy = None,
    step: Step = None,
    more_sources: Source = None,
    packed_by_rank: PackedByRank = False,
    to_strategy: Path = typer.Option(
        None, "--to-strategy", help="MindSpore: divide over the ranks of this strategy, a file or folder."
    ),
    keep_optimizer: bool = typer.Option(
        False, "--keep-optimizer", help="MindSpore: keep the optimizer's state and the counters."
    ),
    adapter: Adapter = None,
    dtype: str = typer.Option(
        "auto",
        "--dtype",
        help="auto (as stored), float16, bfloat16 or float32.",
        autocompletion=names_in("dtypes", "WEIGHT_DTYPES", "auto"),
    ),
    tp: int = typer.Option(None, "--tp", help="MindSpore: write rank_N folders for this tensor parallel size."),
    qkv_concat: bool = typer.Option(False, "--qkv-concat", help="MindSpore: pack q/k/v and gate/up."),
    gmm: bool = typer.Option(False, "--gmm", help="MindSpore: store experts for the grouped matmul."),
    force: Force = False,
    resume: Resume = False,
    allow_nonfinite: AllowNonfinite = False,
    allow_overflow: AllowOverflow = False,
) -> None:
    """Write a checkpoint in another form.

    hf is the published one, which transformers, vLLM and atb load; llama the same weights as a plain Llama, for tools
    that know no TeleChat2; safetensors and ckpt are MindSpore files for mindformers. docs/elsewhere.md says what runs
    where.

    With --to-strategy or --keep-optimizer tensors are copied as they are.

    Examples:
        telechat-mindie convert training/output TeleChat2-tuned --to hf --config TeleChat2-7B
        telechat-mindie convert TeleChat2-7B telechat.ckpt --to ckpt
    """
    from telechat_mindie.checkpoint.convert import (
        MindSporeForm,
        OutputOptions,
        to_hugging_face,
        to_llama,
        to_mindspore,
    )
    from telechat_mindie.checkpoint.elsewhere.limits import limits
    from telechat_mindie.checkpoint.redistribute import Redistribution, redistribute
    from telechat_mindie.checkpoint.source import open_checkpoint
    from telechat_mindie.checkpoint.training_run import RunChoice
    from telechat_mindie.commands.output import byte_progress
    from telechat_mindie.computation import refusal
    from telechat_mindie.errors import InputError, name_some
    from telechat_mindie.units import format_bytes

    elsewhere = {"hf": to_hugging_face, "llama": to_llama}
    if to not in FORMS:
        raise InputError("unknown form", where="--to", expected=" or ".join(FORMS), found=to)
    if to in elsewhere and (tp is not None or qkv_concat or gmm):
        raise InputError("--tp, --qkv-concat and --gmm are for MindSpore files", where=f"--to {to}")
    choice = RunChoice(strategy, step, tuple(more_sources or ()), packed_by_rank)
    if to_strategy is not None or keep_optimizer:
        given = {
            f"--to {to}": to in elsewhere,
            "--dtype": dtype != "auto",
            "--tp": tp is not None,
            "--packed-by-rank": packed_by_rank,
            "--qkv-concat": qkv_concat,
            "--gmm": gmm,
            "--adapter": bool(adapter),
            "--resume": resume,
            "--allow-nonfinite": allow_nonfinite,
            "--allow-overflow": allow_overflow,
        }
        if refused := [flag for flag, is_given in given.items() if is_given]:
            raise InputError(
                "--to-strategy and --keep-optimizer copy tensors as they are into MindSpore files",
                where=", ".join(refused),
            )
        wanted = Redistribution(
            choice=choice, strategy=to_strategy, training_state=keep_optimizer, container=to, force=force
        )
        with byte_progress("copying") as start:
            done = redistribute(checkpoint, output, wanted, config, start)
        ranks = f", for {done.ranks} ranks" if to_strategy is not None else ""
        print(f"{output}: {done.tensors} tensors, {format_bytes(done.nbytes)}{ranks}, from {done.kind}")
        return
    chosen: dict[str, Any] = {
        "dtype": dtype,
        "force": force,
        "resume": resume,
        "allow_nonfinite": allow_nonfinite,
        "allow_overflow": allow_overflow,
    }
    source = open_checkpoint(checkpoint, config, adapter or (), choice)
    if source.note:
        logger.info(source.note)
    with byte_progress("converting") as start:
        if to in elsewhere:
            plan = elsewhere[to](source, output, OutputOptions(**chosen), start)
        else:
            form = MindSporeForm(
                container=to,
                tp=tp or 1,
                ranks=tp is not None,
                qkv_concat=qkv_concat,
                transposed_experts=gmm,
                **chosen,
            )
            plan = to_mindspore(source, output, form, start)
    merged = f" with {name_some(adapter)} merged" if adapter else ""
    print(f"{output}: {format_bytes(plan.output_bytes)} of {plan.dtype} weights, from {source.kind}{merged}")
    for sentence in limits(to, source.config):
        logger.warning(sentence)
    if (refused := refusal(source.config)) is not None:
        logger.info(f"The weights are converted; `build` would refuse them: {refused}")
