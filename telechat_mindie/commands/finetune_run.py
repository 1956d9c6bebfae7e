"""`telechat-mindie finetune` where it trains here: the run, what is said of it, and what it ends with."""

from __future__ import annotations

import shlex
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from telechat_mindie.commands.output import Facts
    from telechat_mindie.training.curve import Point
    from telechat_mindie.training.request import Request
    from telechat_mindie.training.run import Job


def try_finetune(request: Request, output: Path, as_json: bool) -> None:
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


def run_finetune(
    request: Request, output: Path, keep: int, resume: bool, force: bool, ignore_memory: bool, as_json: bool
) -> None:
    """Train, or go on with what is there, and write the result."""
    from telechat_mindie.commands.output import byte_progress
    from telechat_mindie.installing import install_extra
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
            folder.begin()
            try:
                ended = _train(job)
            except KeyboardInterrupt:
                ended = signal.SIGINT
            finally:
                points = read_points(folder.path / CSV)
                if points and not draw(folder.path, points, f"{request.model.name}: {job.plan.steps} steps"):
                    print(f"no {PICTURE}: {install_extra('plot')}", file=sys.stderr)
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
        lora = "--lora, " if job.request.lora is None else ""
        raise InputError(
            "needs more memory than is free",
            where=f"{ranks} rank{'s' if ranks > 1 else ''}",
            expected=f"about {format_bytes(needed)}",
            found=format_bytes(free),
            advice=f"Try {lora}a smaller --micro-batch or shorter rows; or begin all the same with --ignore-memory.",
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
    base = [str(job.request.model), "--adapter", str(result)] if lora else [str(result)]
    print(shlex.join(["telechat-mindie", "build", "model_path", "--checkpoint", *base]))
