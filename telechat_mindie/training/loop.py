"""The steps of a run, as every rank goes through them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from telechat_mindie.errors import TelechatMindieError
from telechat_mindie.training.checkpoints import Checkpoints
from telechat_mindie.training.curve import Curve, Point
from telechat_mindie.training.dataset import Dataset
from telechat_mindie.training.order import BLANK, Order
from telechat_mindie.training.settings import Place
from telechat_mindie.training.stop import Stop

if TYPE_CHECKING:
    from telechat_mindie.training.trainer import StepResult, Trainer


class TrainingError(TelechatMindieError):
    """A run that cannot go on: its loss is no number any more."""


@dataclass(frozen=True)
class Plan:
    """What is done when.

    Attributes:
        steps: in all.
        batch: rows of a step, over all ranks and micro batches.
        micro_batch: rows that all ranks compute at once.
        eval_every, save_every: steps; 0: only once the last is done.
    """

    steps: int
    batch: int
    micro_batch: int
    eval_every: int = 0
    save_every: int = 0


class Loop:
    """One rank of a run; every rank goes through the same rows, of which its trainer takes its share.

    Args:
        trainer: of this rank.
        rows, held_out: to train on; to evaluate on, if any.
        order: of the rows.
        plan: what is done when.
        rank: of this process.
        checkpoints: of the run.
        settings: all that decides the result, by name; goes into the checkpoints.
        curve: of the run; the first rank alone has it.
        advance: told each step that is done by the first rank.
    """

    def __init__(
        self,
        trainer: Trainer,
        rows: Dataset,
        held_out: Dataset | None,
        order: Order,
        plan: Plan,
        checkpoints: Checkpoints,
        settings: Mapping[str, Any],
        *,
        rank: int = 0,
        curve: Curve | None = None,
        advance: Callable[[Point], None] = lambda _: None,
    ) -> None:
        self._trainer = trainer
        self._rows = rows
        self._held_out = held_out
        self._order = order
        self._plan = plan
        self._checkpoints = checkpoints
        self._settings = settings
        self._place = Place.of(rank, trainer.computation)
        self._first = rank == 0
        self._curve = curve
        self._advance = advance

    def run(self, stop: Stop) -> bool:
        """Go on behind the trainer's last step, to the plan's last; False where `stop` ended it. It is saved then.

        Raises:
            TrainingError: the loss is no number any more; nothing of that step is saved.
            OutputError: a checkpoint cannot be written.
        """
        plan = self._plan
        for step in range(self._trainer.step + 1, plan.steps + 1):
            began = time.monotonic()
            result = self._step(step)
            seconds = time.monotonic() - began
            complete = step == plan.steps
            stopped = stop.after(step) and not complete
            eval_loss = None
            if self._held_out is not None and (complete or _due(step, plan.eval_every)):
                eval_loss = self._evaluate(self._held_out)
            if self._curve is not None:
                point = Point(
                    step, result.loss, eval_loss, result.learning_rate, result.grad_norm, result.tokens, seconds
                )
                self._curve.add(point)
                self._advance(point)
            if complete or stopped or _due(step, plan.save_every):
                self._save(step)
            if stopped:
                return False
        return True

    def _step(self, step: int) -> StepResult:
        plan = self._plan
        numbers = self._order.take((step - 1) * plan.batch, plan.batch)
        for micro in numbers.reshape(-1, plan.micro_batch):
            self._trainer.accumulate(self._rows.take(micro))
        result = self._trainer.update()
        for name, value in (("loss", result.loss), ("gradient norm", result.grad_norm)):
            if not math.isfinite(value):
                saved = self._checkpoints.steps()
                advice = f"Step {saved[-1]} is saved." if saved else "No step is saved."
                raise TrainingError(
                    f"the {name} is no number any more",
                    where=f"step {step}",
                    found=value,
                    advice=f"{advice} Begin again with a lower --learning-rate or a longer --warmup.",
                )
        return result

    def _evaluate(self, rows: Dataset) -> float:
        """Mean loss of the held-out rows."""
        total, tokens, size = 0.0, 0, self._plan.micro_batch
        for begin in range(0, len(rows), size):
            numbers = np.full(size, BLANK)
            numbers[: len(rows) - begin] = np.arange(begin, min(begin + size, len(rows)))
            loss, count = self._trainer.evaluate(rows.take(numbers))
            total += loss
            tokens += count
        return total / tokens

    def _save(self, step: int) -> None:
        """Every rank of one copy of the model writes its part; the first gives the checkpoint its name."""
        if self._place.dp_rank == 0:
            state = self._trainer.state(copied=False)  # it is written before the next step
            self._checkpoints.save_rank(step, self._place.tp_rank, state)
        if self._first:
            position = self._order.position(step * self._plan.batch)
            self._checkpoints.commit(step, position, self._trainer.computation.tp, self._settings)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
