"""`finetune`: a checkpoint and data in, a run that can be resumed, a checkpoint or an adapter out."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from telechat_mindie.checkpoint.formats.tensors import TensorReader
from telechat_mindie.checkpoint.source import Checkpoint, open_checkpoint
from telechat_mindie.computation import check_computation
from telechat_mindie.data.encoding import Encoding
from telechat_mindie.data.preprocess import Options, preprocess
from telechat_mindie.errors import InputError, name_some
from telechat_mindie.training.checkpoints import Facts
from telechat_mindie.training.curve import Curve, Point
from telechat_mindie.training.dataset import Dataset, gather_rows, mindrecord_files
from telechat_mindie.training.folder import RunFolder
from telechat_mindie.training.loop import Loop, Plan
from telechat_mindie.training.memory import Memory, estimate
from telechat_mindie.training.order import Order, held_out
from telechat_mindie.training.request import Request
from telechat_mindie.training.result import Trained
from telechat_mindie.training.settings import Optimization, Place
from telechat_mindie.training.stop import Stop
from telechat_mindie.training.weights import checkpoint_weights

_HEAD_BYTES = 4096  # of each tensor that a model is known by

Start = Callable[[int], Callable[[int], None]]
"""Of a progress bar: told the bytes in all, gives what is told of those that are done."""


@dataclass(frozen=True)
class Job:
    """A run as its ranks need it, made out and not begun.

    Attributes:
        facts: of the checkpoint that it goes on from, if any.
        settings: all that decides the result, by the name that a person knows it by.
    """

    request: Request
    folder: RunFolder
    checkpoint: Checkpoint
    rows: Dataset
    held_out: Dataset | None
    order: Order
    plan: Plan
    optimization: Optimization
    settings: Mapping[str, Any]
    facts: Facts | None

    @property
    def output(self) -> Path:
        return self.folder.result(lora=self.request.lora is not None)

    @property
    def is_done(self) -> bool:
        """Whether the result is there already, of the run that this one goes on with."""
        return self.folder.resume and self.output.exists()

    @property
    def trained(self) -> Trained:
        """What the ranks hand over."""
        return Trained(self.folder.scratch / "trained", self.request.computation.tp)

    def memory(self) -> Memory:
        """What a rank will take at its highest."""
        request = self.request
        rows, length = self.plan.micro_batch, self.rows.length - 1
        return estimate(self.checkpoint.config, rows, length, request.computation, request.lora)


def prepare(request: Request, folder: RunFolder, start: Start) -> Job:
    """Open the model, read and check the data, and find the checkpoint to go on from. No weight is loaded.

    Args:
        folder: of the run, open.
        start: of a progress bar over data that are made into rows.

    Raises:
        InputError: data or a choice that cannot be trained with, or other settings than those of the run there.
        ConfigError, CheckpointError, TokenizerError: the model cannot be read.
    """
    checkpoint = open_checkpoint(request.model, request.config_dir)
    check_computation(checkpoint.config, checkpoint.config_dir / "config.json")
    checkpoint.config.check_tp(request.computation.tp)
    rows = _read_rows(request, request.data, "rows", checkpoint, folder, start)
    if request.held_out_share and len(rows) < 2:
        raise InputError("leaves nothing to train on", where="--eval-share", found="1 row of data")
    looked_at = None
    if request.held_out:
        looked_at = _read_rows(request, request.held_out, "held-out", checkpoint, folder, start)
    elif request.held_out_share:
        trained, kept = held_out(len(rows), request.held_out_share, request.seed)
        rows, looked_at = rows.only(trained), rows.only(kept)
    epochs = request.learned_epochs
    end = None if epochs is None else max(1, round(epochs * len(rows)))
    steps = request.steps or math.ceil((end or 0) / request.batch)
    optimization = request.optimization(steps)
    settings = _settings(request, checkpoint, rows, optimization)
    saved = folder.saved()
    facts = folder.checkpoints.facts(saved[-1]) if saved else None
    if facts is not None:
        _check_settings(facts, settings, folder.checkpoints.path(facts.step))
    return Job(
        request,
        folder,
        checkpoint,
        rows,
        looked_at,
        Order(len(rows), request.seed, request.shuffle, end),
        Plan(steps, request.batch, request.ranks_batch, request.eval_every, request.save_every),
        optimization,
        settings,
        facts,
    )


def train_rank(job: Job, rank: int, advance: Callable[[Point], None] = lambda _: None) -> bool:
    """One rank's part of a run, from its first step or from a checkpoint, in a process that has joined the others.

    Returns:
        Whether all steps are done and what was trained is handed over. Else a `Listener` has ended it, and it is saved.

    Raises:
        TrainingError, CheckpointError, OutputError: see `Loop.run`.
    """
    from telechat_mindie.backend.device import device_name
    from telechat_mindie.training.trainer import Trainer

    request, computation, checkpoints = job.request, job.request.computation, job.folder.checkpoints
    place = Place.of(rank, computation)
    trainer = Trainer(
        job.checkpoint.config,
        checkpoint_weights(job.checkpoint, place.tp_rank, computation.tp),
        job.optimization,
        computation,
        request.lora,
        rank=rank,
        device=device_name(),
    )
    if job.facts is not None:
        trainer.load_state(checkpoints.load_rank(job.facts, place.tp_rank))
    loop = Loop(
        trainer,
        job.rows,
        job.held_out,
        job.order,
        job.plan,
        checkpoints,
        job.settings,
        rank=rank,
        curve=Curve(job.folder.path, trainer.step) if rank == 0 else None,
        advance=advance,
    )
    complete = loop.run(Stop(job.folder.scratch, rank, computation.ranks))
    if complete and place.dp_rank == 0:
        job.trained.save(place.tp_rank, trainer.trained(copied=False))
    return complete


def write_result(job: Job) -> None:
    """The result of a run whose ranks are all done."""
    lora = job.request.lora
    if lora is not None:
        job.trained.write_adapter(job.checkpoint, lora, job.output)
    else:
        job.trained.write_model(job.checkpoint, job.output, job.request.save_dtype)


def _read_rows(
    request: Request, names: Sequence[str], name: str, checkpoint: Checkpoint, folder: RunFolder, start: Start
) -> Dataset:
    """The rows of mindrecord files, or of conversations that are made into rows first."""
    config = checkpoint.config
    files = mindrecord_files(names)
    if not files:
        made = folder.scratch / f"{name}.made"
        options = Options(config.training_seqlen if request.max_length is None else request.max_length)
        report = preprocess(names, made, Encoding(checkpoint.config_dir), options, start)
        files = [made / shard for shard in report.shards]
    rows = gather_rows(files, folder.scratch / name, config)
    if request.max_length is not None and rows.length != request.max_length + 1:
        raise InputError(
            "is another length than that of the rows",
            where="--max-length",
            expected=rows.length - 1,
            found=request.max_length,
            advice="Rows in mindrecord files stay as they are: leave the option out, or preprocess again.",
        )
    return rows


def _settings(request: Request, checkpoint: Checkpoint, rows: Dataset, optimization: Optimization) -> dict[str, Any]:
    lora, computation = request.lora, request.computation
    return {
        "MODEL": _model_sha256(checkpoint),
        "DATA": rows.sha256,
        "--eval-share": request.held_out_share,
        "--lora": lora and f"{lora.rank},{lora.alpha:g},{'+'.join(lora.targets)}",
        "--epochs": request.learned_epochs,
        "--steps": optimization.total_steps,
        "--batch-size": request.batch,
        "--micro-batch": request.micro_batch,
        "--learning-rate": optimization.learning_rate,
        "--min-learning-rate": optimization.min_learning_rate,
        "--warmup": optimization.warmup_steps,
        "--weight-decay": optimization.weight_decay,
        "--clip": optimization.clip_norm,
        "--dtype": computation.dtype,
        "--recompute": computation.recompute,
        "--no-document-mask": not computation.document_mask,
        "--dp": computation.dp,
        "--tp": computation.tp,
        "--seed": request.seed,
        "--no-shuffle": not request.shuffle,
    }


def _check_settings(facts: Facts, settings: Mapping[str, Any], where: Path) -> None:
    """Refuse to go on with settings that would give another result than the run that was begun."""
    before = facts.settings
    names = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
    if names:
        raise InputError(
            f"was saved with other settings than {name_some(names, len(names))}",
            where=where,
            expected=", ".join(str(before.get(name)) for name in sorted(names)),
            found=", ".join(str(settings.get(name)) for name in sorted(names)),
            advice="Give those that the run was begun with, or begin anew with --force.",
        )


def _model_sha256(checkpoint: Checkpoint) -> str:
    """Of the names, shapes and first bytes of all weights: enough to tell models apart without reading them whole."""
    digest = hashlib.sha256()
    with TensorReader() as reader:
        for name, weight in checkpoint.weights.items():
            tensor = weight.tiles[0].stored
            head = np.empty(min(tensor.nbytes, _HEAD_BYTES), np.uint8)
            reader.read_into(tensor, 0, head.data)
            digest.update(f"{name} {weight.dtype} {weight.shape}".encode() + head.tobytes())
    return digest.hexdigest()
