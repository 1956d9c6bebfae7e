"""LoRA's factors: which modules have them, what they begin as, and how peft names them.

In a run they are called as mindformers calls them, `model.layers.0.attention.wq.mindpet_delta_lora_a`. The decoder's
packed weights have factors of each module that is packed; rows of B lie as the rows of the weight do.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from telechat_mindie.checkpoint.mapping import Target, weights
from telechat_mindie.checkpoint.sharding import Role, split
from telechat_mindie.config import TelechatConfig
from telechat_mindie.errors import InputError
from telechat_mindie.training.settings import EXPERT_TARGETS, Lora
from telechat_mindie.training.weights import decoder_targets, rectangles

A, B = ".mindpet_delta_lora_a", ".mindpet_delta_lora_b"


@dataclass(frozen=True)
class Module:
    """A linear layer with factors. `shape` is that of the whole weight."""

    name: str  # mindformers', without `.weight`
    source: str  # Hugging Face's, without `.weight`
    packed: Target  # the decoder's parameter that it is all or part of
    shape: tuple[int, ...]

    @property
    def target(self) -> str:
        """As `Lora.targets` names it."""
        return self.source.rpartition(".")[2]

    def rows(self, rank: int, tp: int) -> np.ndarray:
        """The rows of the whole weight that a rank holds, in the order in which they lie there."""
        found = rectangles(self.packed, rank, tp)
        return np.concatenate([np.arange(r.start, r.stop) for name, r, _ in found if name == f"{self.source}.weight"])

    def columns(self, rank: int, tp: int) -> slice:
        columns = split(self.shape, self.packed.role, rank, tp)[1]
        return slice(columns.start, columns.stop)

    def is_cut(self, factor: str) -> bool:
        """Whether each rank of a tensor parallel group has a part of the factor of its own."""
        return factor == (B if self.packed.role is Role.COLUMN else A)


def modules_of(target: Target, config: TelechatConfig) -> list[Module]:
    """The modules that a parameter of the decoder is packed of, in its order; none where LoRA cannot train it."""
    if len(target.shape) != 2 or not target.name.endswith(
        ("w_qkv.weight", "wo.weight", "w_gate_hidden.weight", "w2.weight")
    ):
        return []
    known = weights(config)
    sources = dict.fromkeys(part.source for part in target.parts)
    return [
        Module(
            known[source].target.removesuffix(".weight"), source.removesuffix(".weight"), target, known[source].shape
        )
        for source in sources
    ]


def trained_modules(config: TelechatConfig, lora: Lora) -> list[Module]:
    """Every module that a run trains.

    Raises:
        InputError: the targets are experts of a MoE.
    """
    if config.is_moe and (experts := [target for target in lora.targets if target in EXPERT_TARGETS]):
        raise InputError(
            "are stacks of experts, which LoRA does not train here",
            where="LoRA targets",
            found=", ".join(experts),
            advice="Name query, key_value and dense.",
        )
    found = [module for target in decoder_targets(config) for module in modules_of(target, config)]
    return [module for module in found if module.target in lora.targets]


def initial_factors(module: Module, lora: Lora, rank: int, tp: int) -> tuple[np.ndarray, np.ndarray]:
    """A rank's A [r, in], uniform within 1 / sqrt(in) as peft draws it, and B [rows, r] of zeros."""
    out_size, in_size = module.shape
    random = np.random.default_rng([lora.seed, zlib.crc32(module.name.encode())])
    bound = 1 / math.sqrt(in_size)
    a = random.uniform(-bound, bound, (lora.rank, in_size)).astype(np.float32)
    rows = out_size // tp if module.packed.role is Role.COLUMN else out_size
    return np.ascontiguousarray(a[:, module.columns(rank, tp)]), np.zeros((rows, lora.rank), np.float32)


def peft_tensors(
    config: TelechatConfig, lora: Lora, ranks: Sequence[Mapping[str, np.ndarray]]
) -> Iterator[tuple[str, np.ndarray]]:
    """(name in peft's adapter_model.safetensors, whole float32 array) of every factor.

    Args:
        ranks: the factors of each tensor parallel rank in turn, as `Trainer.trained` gives them.
    """
    tp = len(ranks)
    for module in trained_modules(config, lora):
        out_size, in_size = module.shape
        a, b = np.empty((lora.rank, in_size), np.float32), np.empty((out_size, lora.rank), np.float32)
        for rank, arrays in enumerate(ranks):
            a[:, module.columns(rank, tp)] = arrays[module.name + A]
            b[module.rows(rank, tp)] = arrays[module.name + B]
        prefix = f"base_model.model.{module.source}"
        yield f"{prefix}.lora_A.weight", a
        yield f"{prefix}.lora_B.weight", b


def peft_config(lora: Lora) -> dict[str, object]:
    """adapter_config.json."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": list(lora.targets),
        "bias": "none",
        "fan_in_fan_out": False,
    }
