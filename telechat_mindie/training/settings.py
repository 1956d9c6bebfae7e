"""What a training run computes with: the optimizer's numbers, LoRA, dtypes and ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass

from telechat_mindie.dtypes import DTYPES
from telechat_mindie.errors import InputError

SCHEDULES = ("cosine", "constant")

COMPUTE_DTYPES = ("float32", "bfloat16")
"""float16 is left out: without loss scaling its gradients underflow, and with it TeleChat2's runs have collapsed
(github.com/Tele-AI/TeleChat2 issue 35)."""

TARGETS = ("query", "key_value", "dense", "gate_proj", "up_proj", "down_proj")
"""The modules of a layer that LoRA can train, as Hugging Face names them."""

EXPERT_TARGETS = ("gate_proj", "up_proj", "down_proj")
"""Those that are stacks of experts in a MoE, which LoRA does not train here."""


@dataclass(frozen=True)
class Optimization:
    """AdamW with decoupled decay, clipping and a schedule, with the defaults of mindformers' TeleChat2 yamls.

    Attributes:
        learning_rate: the highest.
        min_learning_rate: what the cosine ends at.
        warmup_steps: steps of linear warm-up from 0: the first of them changes no weight.
        total_steps: optimizer steps of the run, warm-up included.
        schedule: of SCHEDULES, after the warm-up.
        weight_decay: per learning rate; not on biases and other vectors.
        clip_norm: of the gradient of all parameters together.

    Raises:
        InputError: a number that is out of range.
    """

    learning_rate: float
    total_steps: int
    min_learning_rate: float = 0.0
    warmup_steps: int = 0
    schedule: str = "cosine"
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise InputError("is unknown", where="schedule", expected=" or ".join(SCHEDULES), found=self.schedule)
        for name, low, high in (
            ("learning_rate", 0.0, math.inf),
            ("min_learning_rate", 0.0, self.learning_rate),
            ("total_steps", 1, math.inf),
            ("warmup_steps", 0, self.total_steps),
            ("weight_decay", 0.0, math.inf),
        ):
            if not low <= getattr(self, name) <= high:
                expected = f"at least {low:g}" if high == math.inf else f"{low:g} to {high:g}"
                raise InputError("is out of range", where=name, expected=expected, found=getattr(self, name))
        for name in ("beta1", "beta2"):
            if not 0 < getattr(self, name) < 1:
                raise InputError("is out of range", where=name, expected="between 0 and 1", found=getattr(self, name))
        for name in ("epsilon", "clip_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError("is out of range", where=name, expected="above 0", found=getattr(self, name))

    def rate(self, step: int) -> float:
        """The learning rate of step 1, 2 ... `total_steps`, as mindformers' CosineWithWarmUpLR counts from 0."""
        done = step - 1
        if done < self.warmup_steps:
            return self.learning_rate * done / self.warmup_steps
        if self.schedule == "constant":
            return self.learning_rate
        progress = min(1.0, (done - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
        fall = self.learning_rate - self.min_learning_rate
        return self.min_learning_rate + fall * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class Lora:
    """Low rank adapters: W + alpha / rank * B A, W frozen.

    Attributes:
        targets: of TARGETS.
        seed: of A; B begins at zero.

    Raises:
        InputError: a rank or alpha that is not positive, or a target that there is not.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = TARGETS
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rank", "alpha"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError("is out of range", where=f"LoRA {name}", expected="above 0", found=getattr(self, name))
        unknown = [target for target in self.targets if target not in TARGETS]
        if unknown or not self.targets:
            found = ", ".join(unknown) or "none"
            raise InputError(
                "is no module that LoRA can train",
                where="LoRA targets",
                expected=f"some of {', '.join(TARGETS)}",
                found=found,
            )

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True)
class Computation:
    """How a step is computed.

    Attributes:
        dtype: of matrix products and of what enters and leaves them, of COMPUTE_DTYPES; weights, norms, softmax,
            residuals and the optimizer are float32. A CPU has no products in bfloat16: there operands and results are
            rounded to it and the product is float32's, which is what a card's cube computes, and slower than float32.
        recompute: keep of each layer what enters attention and feed-forward, and compute the rest again. For a card,
            where it is unproven; on a CPU, where a graph gives no memory back before it ends, it takes more (`memory`).
        document_mask: tokens of a row see their own document alone, and their positions count from its start.
        capacity_factor: an expert of a MoE takes at most ceil(chosen * tokens * factor / experts) of a rank's tokens.
        balance_alpha: weight of the MoE's auxiliary loss, in each layer.
        dp, tp: data and tensor parallel sizes; dp * tp processes.

    Raises:
        InputError: an unknown dtype or a size below 1.
    """

    dtype: str = "float32"
    recompute: bool = False
    document_mask: bool = True
    capacity_factor: float = 1.2
    balance_alpha: float = 0.01
    dp: int = 1
    tp: int = 1

    def __post_init__(self) -> None:
        if self.dtype not in COMPUTE_DTYPES:
            raise InputError(
                "cannot be trained in", where="dtype", expected=" or ".join(COMPUTE_DTYPES), found=self.dtype
            )
        for name in ("dp", "tp"):
            if getattr(self, name) < 1:
                raise InputError("is out of range", where=name, expected="at least 1", found=getattr(self, name))

    @property
    def ranks(self) -> int:
        return self.dp * self.tp

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Place:
    """Which of dp * tp processes this is: rank = dp_rank * tp + tp_rank."""

    dp_rank: int = 0
    tp_rank: int = 0

    @classmethod
    def of(cls, rank: int, computation: Computation) -> Place:
        return cls(*divmod(rank, computation.tp))
