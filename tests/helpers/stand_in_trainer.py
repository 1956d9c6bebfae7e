"""A run whose steps are a few lines of numpy: what is around the computed step, without the seconds of a compiler.

As a script it is one rank of such a run, from its first step or from its newest checkpoint:

    python stand_in_trainer.py ROWS LENGTH RUN STEPS SECONDS_A_STEP [RANK DP TP]
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from telechat_mindie.training.checkpoints import Checkpoints
from telechat_mindie.training.curve import Curve
from telechat_mindie.training.dataset import Dataset
from telechat_mindie.training.loop import Loop, Plan
from telechat_mindie.training.order import Order
from telechat_mindie.training.rows import Batch
from telechat_mindie.training.settings import Computation
from telechat_mindie.training.stop import Listener, Stop

SIZE = 1000


@dataclass
class StepResult:
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int


class StandInTrainer:
    """Weights that every row and the order of rows change, and a moment that has to be kept with them."""

    def __init__(self, computation: Computation | None = None, seconds: float = 0.0, nan_at: int = 0) -> None:
        self.computation = computation or Computation()
        self.step = 0
        self.seen: list[list[int]] = []  # the first token of each row of each batch
        self._seconds = seconds
        self._nan_at = nan_at
        self._weights, self._moment, self._gradient = (np.zeros(SIZE, np.float32) for _ in range(3))
        self._tokens = 0

    def accumulate(self, batch: Batch) -> tuple[float, int]:
        self.seen.append(batch.input_ids[:, 0].tolist())
        for row in batch.input_ids:
            self._gradient = np.sin(self._gradient + np.float32(row[0]))
        self._tokens += batch.tokens(3)
        return 1.0, batch.tokens(3)

    def update(self) -> StepResult:
        time.sleep(self._seconds)
        self.step += 1
        self._moment = np.float32(0.9) * self._moment + self._gradient
        self._weights = np.cos(self._weights + self._moment)
        self._gradient = np.zeros(SIZE, np.float32)
        tokens, self._tokens = self._tokens, 0
        loss = float("nan") if self.step == self._nan_at else float(self._weights[0])
        return StepResult(loss, 1.0, 0.1, tokens)

    def evaluate(self, batch: Batch) -> tuple[float, int]:
        return 2.0 * batch.tokens(3), batch.tokens(3)

    def state(self, *, copied: bool = True) -> dict[str, np.ndarray]:
        return {"weights": self._weights, "moment": self._moment, "global_step": np.array([self.step])}

    def load_state(self, state) -> None:
        self._weights, self._moment = state["weights"], state["moment"]
        self.step = int(state["global_step"][0])


def make_rows(file: Path, count: int = 11, length: int = 5, first: int = 10) -> Dataset:
    """Rows that begin with `first`, `first` + 1 ... and train all of their tokens."""
    rows = np.full((count, 2, length), 7, "<i4")
    rows[:, 0, 0] = np.arange(first, first + count)
    rows.tofile(file)
    return Dataset(file, length, np.arange(count), count * (length - 1), 0, "")


def main() -> None:
    file, length, run, steps, seconds, rank, dp, tp = [*sys.argv[1:], "0", "1", "1"][:8]
    data = Dataset(Path(file), int(length), np.arange(Path(file).stat().st_size // (8 * int(length))), 0, 0, "")
    checkpoints = Checkpoints(Path(run) / "checkpoints", 2)
    trainer = StandInTrainer(Computation(dp=int(dp), tp=int(tp)), float(seconds))
    if int(dp) * int(tp) == 1:
        checkpoints.clean()
    if saved := checkpoints.steps():
        trainer.load_state(checkpoints.load_rank(checkpoints.facts(saved[-1]), int(rank) % int(tp)))
    curve = Curve(Path(run), trainer.step) if rank == "0" else None
    plan = Plan(int(steps), 4, 2, save_every=2)
    loop = Loop(trainer, data, None, Order(len(data), 0), plan, checkpoints, {}, rank=int(rank), curve=curve)
    with Listener(Path(run)) as listener:
        print("ready", flush=True)
        sys.stdin.read()  # until it is closed: no rank saves while another looks for what is saved
        loop.run(Stop(Path(run), int(rank), int(dp) * int(tp)))
    sys.exit(128 + listener.signal if listener.signal else 0)


if __name__ == "__main__":
    main()
