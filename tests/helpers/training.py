"""A tiny model to train, its rows, and a run of it that a process of its own can be given."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from helpers.checkpoints import CONFIG, MOE, make_weights
from telechat_mindie.config import TelechatConfig
from telechat_mindie.training.rows import Batch
from telechat_mindie.training.settings import Computation, Lora, Optimization, Place
from telechat_mindie.training.trainer import StepResult, Trainer
from telechat_mindie.training.weights import array_weights, decoder_targets

TINY = {"vocab_size": 40, "hidden_size": 16, "n_layer": 1, "n_head": 4, "num_key_value_heads": 2, "ffn_hidden_size": 24}
LENGTH = 12


def tiny_config(**changes: Any) -> TelechatConfig:
    return TelechatConfig.from_dict(CONFIG | TINY | changes)


def tiny_rows(rows: int, seed: int = 0) -> Batch:
    """Two conversations a row, the second cut off, with padding on the right; answers are labelled."""
    random = np.random.default_rng(seed)
    ids = random.integers(7, TINY["vocab_size"], (rows, LENGTH + 1)).astype(np.int32)
    ids[:, [0, 6]], ids[:, [1, 7]], ids[:, [3, 9]], ids[:, 5], ids[:, -1] = 6, 4, 5, 2, 3
    labels = np.full_like(ids, -100)
    labels[:, [4, 5, 10, 11]] = ids[:, [4, 5, 10, 11]]
    return Batch(ids, labels)


@dataclass(frozen=True)
class TinyRun:
    """`steps` updates over `batches` each, of `rows` rows."""

    computation: Computation = field(default_factory=Computation)
    lora: Lora | None = None
    moe: bool = False
    steps: int = 3
    batches: int = 1
    rows: int = 4
    learning_rate: float = 1e-2

    def trainer(self, rank: int = 0) -> Trainer:
        # Every expert is chosen: which are is a jump that no gradient knows.
        config = tiny_config(**MOE | {"num_experts_per_tok": 4} if self.moe else {})
        tp_rank, tp = Place.of(rank, self.computation).tp_rank, self.computation.tp
        weights = array_weights(make_weights(config, "float32"), decoder_targets(config), tp_rank, tp)
        optimization = Optimization(
            self.learning_rate, self.steps, clip_norm=0.5, epsilon=1e-3
        )  # smooth: not the sign of rounding
        return Trainer(config, weights, optimization, self.computation, self.lora, rank=rank)

    def __call__(self, rank: int) -> tuple[list[StepResult], dict[str, np.ndarray]]:
        trainer, results = self.trainer(rank), []
        for step in range(self.steps):
            rows = tiny_rows(self.rows, step)
            for index in range(self.batches):
                trainer.accumulate(rows.part(index, self.batches))
            results.append(trainer.update())
        return results, trainer.trained()
