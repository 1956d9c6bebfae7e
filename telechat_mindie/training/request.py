"""What a person asks of a finetune, and what is chosen where nobody says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from telechat_mindie.dtypes import WEIGHT_DTYPES
from telechat_mindie.errors import InputError
from telechat_mindie.training.settings import Computation, Lora, Optimization
from telechat_mindie.units import INT32_MAX, UINT32_MAX

EPOCHS = 3.0
"""Where nobody says how long."""

WARMUP_SHARE = 0.03
"""Of all steps, where nobody says how many."""

MIN_RATE_SHARE = 0.1
"""What the learning rate falls to, of its highest, where nobody says: the ratio of mindformers' TeleChat2 yamls."""

LEARNING_RATES = {False: 2e-5, True: 2e-4}
"""The highest learning rate where nobody says, by whether LoRA is trained: what papers of both settle on."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a person asked for; None where it follows from the model or the data.

    Attributes:
        model: a checkpoint of any form, `config_dir` where its config.json is if not there.
        data, held_out: mindrecord files and folders, or what `preprocess` reads.
        held_out_share: of the rows, in place of `held_out`.
        max_length: of rows that are made here; a row has one token more.
        epochs, steps: how long; one of them, or EPOCHS.
        batch: rows of a step.
        micro_batch: rows that one rank computes at once.
        save_dtype: of the result's weights; auto: that of the model.

    Raises:
        InputError: a number that is out of range, or two options that exclude each other.
    """

    model: Path
    config_dir: Path | None = None
    data: Sequence[str]
    held_out: Sequence[str] = ()
    held_out_share: float = 0.0
    max_length: int | None = None
    epochs: float | None = None
    steps: int | None = None
    batch: int = 8
    micro_batch: int = 1
    learning_rate: float | None = None
    min_learning_rate: float | None = None
    warmup: int | None = None
    weight_decay: float = 0.1
    clip: float = 1.0
    lora: Lora | None = None
    computation: Computation
    seed: int = 0
    shuffle: bool = True
    eval_every: int = 0
    save_every: int = 0
    save_dtype: str = "auto"

    def __post_init__(self) -> None:
        for flags, both in (
            ("--steps, --epochs", self.steps is not None and self.epochs is not None),
            ("--eval, --eval-share", bool(self.held_out) and self.held_out_share != 0),
            ("--lora, --save-dtype", self.lora is not None and self.save_dtype != "auto"),
        ):
            if both:
                raise InputError("are two answers to one question", where=flags, advice="Give one of them.")
        if self.save_dtype not in ("auto", *WEIGHT_DTYPES):
            expected = " or ".join(("auto", *WEIGHT_DTYPES))
            raise InputError("unknown dtype", where="--save-dtype", expected=expected, found=self.save_dtype)
        for flag, value, low, high in (
            ("--steps", self.steps, 1, INT32_MAX),
            ("--epochs", self.epochs, 1e-6, 1e6),
            ("--batch-size", self.batch, 1, INT32_MAX),
            ("--micro-batch", self.micro_batch, 1, INT32_MAX),
            ("--warmup", self.warmup, 0, INT32_MAX),
            ("--eval-every", self.eval_every, 0, INT32_MAX),
            ("--save-every", self.save_every, 0, INT32_MAX),
            ("--eval-share", self.held_out_share, 0, 0.9),
            ("--seed", self.seed, 0, UINT32_MAX),
        ):
            if value is not None and not low <= value <= high:
                raise InputError("is out of range", where=flag, expected=f"{low:g} to {high:g}", found=value)
        if self.batch % self.ranks_batch:
            raise InputError(
                "cannot be divided",
                where="--batch-size",
                expected=f"a multiple of --micro-batch times --dp, {self.ranks_batch}",
                found=self.batch,
            )
        self.optimization(INT32_MAX)  # whose own checks come before the data are read

    @property
    def ranks_batch(self) -> int:
        """Rows that all ranks compute at once."""
        return self.micro_batch * self.computation.dp

    def optimization(self, steps: int) -> Optimization:
        """The optimizer's numbers for a run of so many steps."""
        highest, lowest = self.learning_rate, self.min_learning_rate
        if highest is None:
            highest = LEARNING_RATES[self.lora is not None]
        return Optimization(
            learning_rate=highest,
            total_steps=steps,
            min_learning_rate=highest * MIN_RATE_SHARE if lowest is None else lowest,
            warmup_steps=int(steps * WARMUP_SHARE) if self.warmup is None else self.warmup,
            weight_decay=self.weight_decay,
            clip_norm=self.clip,
        )

    @property
    def learned_epochs(self) -> float | None:
        """How often each row is trained on; None where a number of steps is given."""
        return EPOCHS if self.epochs is None and self.steps is None else self.epochs
