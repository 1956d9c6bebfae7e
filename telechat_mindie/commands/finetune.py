"""`telechat-mindie finetune`."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from telechat_mindie.commands.finetune_render import (
    DEFAULT_LENGTH,
    DEFAULT_RATE,
    MINDFORMERS,
    Cards,
    DeviceMem,
    Ep,
    Interleave,
    Loaded,
    MasterAddr,
    MasterPort,
    MicroBatches,
    Nodes,
    Offset,
    OptimizerShard,
    Pp,
    Render,
    Variant,
    matrices,
    one_source,
    refuse_others,
    render_mindformers,
    whole_epochs,
)
from telechat_mindie.commands.options import AsJson, ConfigDir, Force, Resume
from telechat_mindie.kv_budget import DEFAULT_CARD_GB

if TYPE_CHECKING:
    from collections.abc import Sequence

    from telechat_mindie.commands.output import Facts
    from telechat_mindie.training.curve import Point
    from telechat_mindie.training.run import Job, Request
    from telechat_mindie.training.settings import Lora

_LORA = "R,ALPHA[,MODULE+MODULE...]: train a LoRA adapter, such as 8,16 or 8,16,query+key_value; default: all weights."
_BATCH = "Rows of an optimizer step, over all ranks and micro batches; default: 8."

WHAT, OPTIMIZER, COMPUTATION = "What is trained, and how long", "Optimizer", "Computation"
RESULT = "Evaluation and result"


def finetune(
    context: typer.Context,
    model: Path = typer.Argument(None, help="A TeleChat2 checkpoint."),
    data: list[str] = typer.Argument(None, help="What `preprocess` made, or what it reads; patterns in quotes."),
    output: Path = typer.Option(None, "-o", "--output", help="Folder of the run: its checkpoints, curve and result."),
    config: ConfigDir = None,
    lora: str = typer.Option(None, "--lora", help=_LORA, rich_help_panel=WHAT),
    epochs: float = typer.Option(
        None, "--epochs", help="Times that each row is trained on; default: 3.", rich_help_panel=WHAT
    ),
    steps: int = typer.Option(None, "--steps", help="Optimizer steps, in place of --epochs.", rich_help_panel=WHAT),
    batch_size: int = typer.Option(None, "--batch-size", help=_BATCH, rich_help_panel=WHAT),
    micro_batch: int = typer.Option(
        1, "--micro-batch", help="Rows that a rank computes at once.", rich_help_panel=WHAT
    ),
    max_length: int = typer.Option(
        None,
        "--max-length",
        help="Tokens of a row where data are made into rows; default: as the model was trained.",
        rich_help_panel=WHAT,
    ),
    seed: int = typer.Option(
        0, "--seed", help="Of the order of rows and of the first LoRA factors.", rich_help_panel=WHAT
    ),
    no_shuffle: bool = typer.Option(False, "--no-shuffle", help="Rows in the order of the data.", rich_help_panel=WHAT),
    learning_rate: float = typer.Option(
        None, "--learning-rate", help="The highest; default: 2e-5, with --lora 2e-4.", rich_help_panel=OPTIMIZER
    ),
    min_learning_rate: float = typer.Option(
        None,
        "--min-learning-rate",
        help="What the cosine ends at; default: a tenth of the highest.",
        rich_help_panel=OPTIMIZER,
    ),
    warmup: int = typer.Option(
        None, "--warmup", help="Steps of linear warm-up from 0; default: 3 % of all.", rich_help_panel=OPTIMIZER
    ),
    weight_decay: float = typer.Option(
        0.1, "--weight-decay", help="Of AdamW; not on norms and biases.", rich_help_panel=OPTIMIZER
    ),
    clip: float = typer.Option(1.0, "--clip", help="Norm that the gradient is clipped to.", rich_help_panel=OPTIMIZER),
    dtype: str = typer.Option(
        None,
        "--dtype",
        help="bf16 or fp32 computation; weights and optimizer are fp32. Default: fp32.",
        rich_help_panel=COMPUTATION,
    ),
    recompute: bool = typer.Option(
        False, "--recompute", help="Less memory for activations, a third more time.", rich_help_panel=COMPUTATION
    ),
    no_document_mask: bool = typer.Option(
        False,
        "--no-document-mask",
        help="Conversations of one row see each other, as in mindformers' recipe.",
        rich_help_panel=COMPUTATION,
    ),
    dp: int = typer.Option(
        None,
        "--dp",
        help="Data parallel size: copies of the model, each in a process of its own; default: 1.",
        rich_help_panel=COMPUTATION,
    ),
    tp: int = typer.Option(
        None, "--tp", help="Tensor parallel size: processes that share a copy; default: 1.", rich_help_panel=COMPUTATION
    ),
    ignore_memory: bool = typer.Option(
        False, "--ignore-memory", help="Begin although memory seems too small.", rich_help_panel=COMPUTATION
    ),
    dry_run: bool = typer.Option(
        False, "--dry-run", help="Check everything, estimate the memory, train nothing.", rich_help_panel=COMPUTATION
    ),
    eval_data: list[str] = typer.Option(
        None, "--eval", help="Held-out data, as DATA; repeatable.", rich_help_panel=RESULT
    ),
    eval_share: float = typer.Option(
        0.0, "--eval-share", help="Part of the rows to hold out, such as 0.02.", rich_help_panel=RESULT
    ),
    eval_every: int = typer.Option(
        0, "--eval-every", help="Steps between evaluations; 0: at the end alone.", rich_help_panel=RESULT
    ),
    save_every: int = typer.Option(
        0, "--save-every", help="Steps between checkpoints; 0: at the end alone.", rich_help_panel=RESULT
    ),
    keep: int = typer.Option(2, "--keep", min=1, help="Checkpoints that stay, the newest.", rich_help_panel=RESULT),
    save_dtype: str = typer.Option(
        "auto",
        "--save-dtype",
        help="auto (as MODEL's), float16, bfloat16 or float32 weights in the result.",
        rich_help_panel=RESULT,
    ),
    render: Render = None,
    variant: Variant = None,
    nodes: Nodes = 1,
    cards: Cards = 8,
    pp: Pp = None,
    ep: Ep = None,
    micro_batches: MicroBatches = None,
    interleave: Interleave = 1,
    offset: Offset = None,
    optimizer_shard: OptimizerShard = None,
    device_mem: DeviceMem = DEFAULT_CARD_GB,
    master_addr: MasterAddr = None,
    master_port: MasterPort = 8118,
    load: Loaded = None,
    resume: Resume = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Train all weights of a checkpoint, or a LoRA adapter, on conversations.

    OUTPUT/model is a checkpoint for `build`, OUTPUT/adapter one for `build --adapter`. It runs on a CPU; on Ascend it
    is the same code, unproven. --render mindformers trains nothing: it writes what mindformers needs to do it on
    Ascend machines, and without DATA only proposes how to divide the model over the cards.

    Examples:
        telechat-mindie finetune TeleChat2-7B rows -o run --lora 8,16
        telechat-mindie finetune TeleChat2-7B rows -o run --lora 8,16 --resume
        telechat-mindie finetune TeleChat2-115B rows -o cluster --render mindformers --nodes 8 --cards 8
        telechat-mindie finetune --render mindformers --variant 35b --nodes 2
    """
    from telechat_mindie.errors import InputError

    refuse_others(context, rendering=render is not None)
    if render is not None:
        if render != MINDFORMERS:
            raise InputError("is unknown", where="--render", expected=MINDFORMERS, found=render)
        factors = _lora(lora, seed)
        named = [*([] if model is None else [str(model)]), *(data or ())]  # with --variant all of them are DATA
        render_mindformers(
            None if variant is not None else model,
            one_source(named if variant is not None else data),
            output,
            variant=variant,
            nodes=nodes,
            cards=cards,
            dp=dp,
            tp=tp,
            pp=pp,
            ep=ep,
            sequence_length=max_length or DEFAULT_LENGTH,
            global_batch=batch_size,
            micro_batches=micro_batches,
            batch_size=micro_batch,
            interleave=interleave,
            offset=offset,
            optimizer_shard=optimizer_shard,
            recompute="full" if recompute else None,
            dtype=_dtype(dtype or "bf16"),
            lora_rank=factors.rank if factors else None,
            lora_alpha=factors.alpha if factors else 0,
            lora_targets=matrices(factors.targets) if factors and (lora or "").count(",") > 1 else (),
            epochs=whole_epochs(epochs),
            learning_rate=learning_rate or DEFAULT_RATE,
            weight_decay=weight_decay,
            save_steps=save_every or None,
            keep=keep,
            seed=seed,
            device_mem=device_mem,
            master_addr=master_addr,
            master_port=master_port,
            load=load,
            force=force,
            as_json=as_json,
        )
        return
    for name, value in (("MODEL", model), ("DATA", data), ("-o", output)):
        if not value:
            raise InputError("is missing", where=name, advice="telechat-mindie finetune MODEL DATA -o OUTPUT")

    from telechat_mindie.training.run import Request
    from telechat_mindie.training.settings import Computation

    request = Request(
        model=model,
        config_dir=config,
        data=data,
        held_out=eval_data or (),
        held_out_share=eval_share,
        max_length=max_length,
        epochs=epochs,
        steps=steps,
        batch=8 if batch_size is None else batch_size,
        micro_batch=micro_batch,
        learning_rate=learning_rate,
        min_learning_rate=min_learning_rate,
        warmup=warmup,
        weight_decay=weight_decay,
        clip=clip,
        lora=_lora(lora, seed),
        computation=Computation(
            dtype=_dtype(dtype or "fp32"),
            recompute=recompute,
            document_mask=not no_document_mask,
            dp=1 if dp is None else dp,
            tp=1 if tp is None else tp,
        ),
        seed=seed,
        shuffle=not no_shuffle,
        eval_every=eval_every,
        save_every=save_every,
        save_dtype=save_dtype,
    )
    if dry_run:
        _try(request, output, as_json)
    else:
        _run(request, output, keep, resume, force, ignore_memory, as_json)


def _try(request: Request, output: Path, as_json: bool) -> None:
    """All that comes before the first step, in a folder that does not stay."""
    import tempfile

    from telechat_mindie.commands.output import byte_progress
    from telechat_mindie.staging import reporting_os_errors
    from telechat_mindie.training.folder import RunFolder
    from telechat_mindie.training.run import prepare

    with reporting_os_errors(output):
        scratch = tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.")
    with scratch as path, RunFolder(Path(path) / "run", 1) as folder:
        with byte_progress("preprocessing") as start:
            job = prepare(request, folder, start)
        _facts(job).show(str(request.model), as_json=as_json)


def _run(
    request: Request, output: Path, keep: int, resume: bool, force: bool, ignore_memory: bool, as_json: bool
) -> None:
    from telechat_mindie.commands.output import byte_progress
    from telechat_mindie.training.curve import CSV, PICTURE, draw, read_points
    from telechat_mindie.training.folder import RunFolder
    from telechat_mindie.training.run import prepare, write_result

    with RunFolder(output, keep, resume=resume, force=force) as folder:
        with byte_progress("preprocessing") as start:
            job = prepare(request, folder, start)
        for label, text in _facts(job).rows:
            print(f"{label}: {text}", file=sys.stderr)
        if not job.is_done:
            if not ignore_memory:
                _check_memory(job)
            try:
                ended = _train(job)
            except KeyboardInterrupt:
                ended = signal.SIGINT
            finally:
                points = read_points(folder.path / CSV)
                if points and not draw(folder.path, points, f"{request.model.name}: {job.plan.steps} steps"):
                    print(f"no {PICTURE}: pip install 'telechat-mindie[plot]'", file=sys.stderr)
            if ended:
                saved = folder.checkpoints.steps()
                said = f"step {saved[-1]} of {job.plan.steps} is saved" if saved else "no step is saved"
                print(f"{output}: {said}; go on with the same command and --resume", file=sys.stderr)
                raise typer.Exit(128 + ended)
            write_result(job)
        _print_result(job, output / job.output.name, read_points(folder.path / CSV), as_json)


def _train(job: Job) -> int:
    """The steps of a run, in a process for each rank; 0, or the signal that ended it early."""
    from functools import partial

    from telechat_mindie.backend.device import device_name
    from telechat_mindie.training.ranks import run_ranks
    from telechat_mindie.training.stop import Listener

    with Listener(job.folder.scratch) as listener:
        complete = run_ranks(partial(_train_rank, job), job.request.computation.ranks, device_name())
    return 0 if all(complete) else int(listener.signal or signal.SIGTERM)


def _train_rank(job: Job, rank: int) -> bool:
    """One rank's part; the first tells how far it is."""
    from telechat_mindie.commands.output import step_progress
    from telechat_mindie.training.run import train_rank

    if rank:
        return train_rank(job, rank)
    row_tokens = job.plan.batch * (job.rows.length - 1)
    done = job.facts.step if job.facts else 0
    with step_progress("step", job.plan.steps, done, "the first one compiles ...") as advance:

        def told(point: Point) -> None:
            looked = "" if point.eval_loss is None else f"  held out {point.eval_loss:.4f}"
            advance(point.step, f"loss {point.loss:.4f}{looked}  {row_tokens / point.seconds:,.0f} tokens/s")

        return train_rank(job, rank, told)


def _check_memory(job: Job) -> None:
    """Raises InputError where the ranks need more than this machine has left; a card's own memory is not looked at."""
    import psutil

    from telechat_mindie.backend.device import device_name
    from telechat_mindie.errors import InputError
    from telechat_mindie.units import format_bytes

    ranks, free = job.request.computation.ranks, psutil.virtual_memory().available
    needed = ranks * job.memory().total
    if device_name() == "cpu" and needed > free:
        raise InputError(
            "needs more memory than is free",
            where=f"{ranks} rank{'s' if ranks > 1 else ''}",
            expected=f"about {format_bytes(needed)}",
            found=format_bytes(free),
            advice="Try --recompute, --lora or shorter rows; or begin all the same with --ignore-memory.",
        )


def _facts(job: Job) -> Facts:
    """What is going to be done."""
    from telechat_mindie.commands.output import Facts
    from telechat_mindie.units import format_bytes

    facts, request, plan = Facts(), job.request, job.plan
    lora = request.lora
    what = "all weights" if lora is None else f"LoRA of rank {lora.rank} on {', '.join(lora.targets)}"
    facts.add("trained", f"{what}, in {request.computation.dtype}", lora=lora and lora.rank)
    held = f", {len(job.held_out):,} held out" if job.held_out else ""
    left = f", {job.rows.left_out:,} without a token to train on left out" if job.rows.left_out else ""
    facts.add(
        "rows",
        f"{len(job.rows):,} of {job.rows.length - 1:,} tokens{held}{left}",
        rows=len(job.rows),
        max_length=job.rows.length - 1,
        held_out=len(job.held_out) if job.held_out else 0,
    )
    rate = job.optimization
    facts.add(
        "steps",
        f"{plan.steps:,} of {plan.batch:,} rows, learning rate {rate.learning_rate:g} to {rate.min_learning_rate:g} "
        f"after {rate.warmup_steps:,} of warm-up",
        steps=plan.steps,
        batch=plan.batch,
    )
    memory = job.memory()
    parts = {name: nbytes for name, nbytes in memory.parts().items() if nbytes}
    listed = ", ".join(f"{name} {format_bytes(nbytes)}" for name, nbytes in parts.items())
    facts.add(
        "memory of each rank",
        f"about {format_bytes(memory.total)}: {listed}",
        ranks=request.computation.ranks,
        memory=parts | {"total": memory.total},
    )
    if job.facts is not None:
        facts.add("goes on", f"behind step {job.facts.step:,}", resumed=job.facts.step)
    return facts


def _print_result(job: Job, result: Path, points: Sequence[Point], as_json: bool) -> None:
    from telechat_mindie.commands.output import print_json
    from telechat_mindie.training.curve import CSV

    lora, last = job.request.lora, points[-1] if points else None  # without: somebody took loss.csv away
    if as_json:
        facts = {"result": str(result), "kind": "adapter" if lora else "model", "steps": job.plan.steps}
        course = {"loss": last.loss, "eval_loss": last.eval_loss} if last else {}
        seconds = sum(point.seconds for point in points)
        print_json(facts | course | {"seconds": seconds, "curve": str(result.with_name(CSV))})
        return
    if last is not None:
        held = "" if last.eval_loss is None else f", held out {last.eval_loss:.4f}"
        print(f"{result}: loss {points[0].loss:.4f} -> {last.loss:.4f}{held}")
    base = f"{job.request.model} --adapter {result}" if lora else result
    print(f"telechat-mindie build model_path --checkpoint {base}")


def _lora(text: str | None, seed: int) -> Lora | None:
    """`8,16` or `8,16,query+key_value`."""
    from telechat_mindie.errors import InputError
    from telechat_mindie.training.settings import TARGETS, Lora

    if text is None:
        return None
    rank, _, rest = text.partition(",")
    alpha, _, modules = rest.partition(",")
    try:
        return Lora(int(rank), float(alpha), tuple(modules.split("+")) if modules else TARGETS, seed)
    except ValueError:
        raise InputError(
            "is not understood", where="--lora", expected="R,ALPHA or R,ALPHA,MODULE+MODULE", found=text
        ) from None


def _dtype(name: str) -> str:
    from telechat_mindie.errors import InputError
    from telechat_mindie.training.settings import COMPUTE_DTYPES

    short = {"fp32": "float32", "bf16": "bfloat16"}
    if short.get(name, name) not in COMPUTE_DTYPES:
        raise InputError("is unknown", where="--dtype", expected=" or ".join(short), found=name)
    return short.get(name, name)
