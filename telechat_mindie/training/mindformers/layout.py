"""How the cards of a cluster divide a finetune.

There are dp x tp x pp cards; ranks of one tensor parallel group are neighbours, those of a stage lie together. A step
trains batch size x dp x micro batches sequences.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from telechat_mindie.config import TelechatConfig
from telechat_mindie.errors import InputError

RECOMPUTE = ("off", "select", "full")
"""What the backward pass computes again, instead of keeping it: nothing; the feed-forward's activation and product and
the norms' gathered outputs (models/utils.py LayerSetting, its default patterns); whole layers. From fast to small."""

MAX_DEVICE_GB = 4096


def too_small(numbers: Mapping[str, int | None]) -> Iterator[InputError]:
    """What is given of these and not at least 1, by its flag."""
    for flag, number in numbers.items():
        if number is not None and number < 1:
            yield InputError("is too small", where=flag, expected="at least 1", found=number)


@dataclass(frozen=True)
class Cluster:
    """Machines that are alike: `cards` of each, and the memory of a card in GB."""

    nodes: int
    cards: int
    device_gb: float

    def __post_init__(self) -> None:
        for fault in too_small({"--nodes": self.nodes, "--cards": self.cards}):
            raise fault
        if not 0 < self.device_gb <= MAX_DEVICE_GB:
            expected = f"above 0, at most {MAX_DEVICE_GB}"
            raise InputError("is out of range", where="--device-mem", expected=expected, found=self.device_gb)

    @property
    def world(self) -> int:
        return self.nodes * self.cards


@dataclass(frozen=True)
class Layout:
    """Who computes what.

    Attributes:
        dp: copies of the model, each with other sequences.
        tp: neighbouring cards that share every matrix.
        pp: stages of layers, one after the other.
        ep: groups of experts over the copies; each is divided by tp too (ep_extend_tp).
        micro_batches: parts of a step, of batch_size sequences for each copy, of which a card computes one at a time.
        interleave: runs of layers that a stage has.
        offset: [interleave][pp] layers more or fewer than num_layers // (pp * interleave); () balances them.
        optimizer_shard: copies over which weights and the optimizer's state are divided.
        recompute: of RECOMPUTE.
    """

    dp: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1
    micro_batches: int = 1
    batch_size: int = 1
    interleave: int = 1
    offset: tuple[tuple[int, ...], ...] = ()
    optimizer_shard: int = 1
    recompute: str = "off"

    @property
    def world(self) -> int:
        return self.dp * self.tp * self.pp

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.dp * self.micro_batches

    @property
    def sequence_parallel(self) -> bool:
        """The residual stream is cut along the sequence; mindformers asks for it where experts meet tp."""
        return self.tp > 1

    def offsets(self, num_layers: int) -> tuple[tuple[int, ...], ...]:
        """As given, or the layers that are left over given to the middle of the stages: the first keeps most micro
        batches, the last has the logits."""
        return self.offset or _balanced(num_layers % (self.pp * self.interleave), self.interleave, self.pp)

    def stage_layers(self, num_layers: int) -> list[list[int]]:
        """[interleave][pp] layers."""
        average = num_layers // (self.pp * self.interleave)
        return [[average + more for more in run] for run in self.offsets(num_layers)]

    def __str__(self) -> str:
        parts = [f"dp {self.dp}", f"tp {self.tp}", f"pp {self.pp}"] + ([f"ep {self.ep}"] if self.ep > 1 else [])
        return ", ".join(parts)


def _balanced(left: int, runs: int, stages: int) -> tuple[tuple[int, ...], ...]:
    places = [(run, stage) for run in range(runs) for stage in range(stages)]
    places.sort(key=lambda place: abs(2 * place[1] + 1 - stages))  # the middle first
    chosen = set(places[:left])
    return tuple(tuple(int((run, stage) in chosen) for stage in range(stages)) for run in range(runs))


ATTENTION = ("wq", "wk_v", "wo")
FEED_FORWARD = ("w1", "w2", "w3")


@dataclass(frozen=True)
class Lora:
    """What mindformers' pet_config says. Matrices of `targets` get two factors of this rank."""

    rank: int = 8
    alpha: float = 16
    targets: tuple[str, ...] = ATTENTION + FEED_FORWARD


def adaptable(config: TelechatConfig) -> tuple[str, ...]:
    """The matrices that mindformers' LoRA can adapt; it knows no stacks of experts."""
    return ATTENTION if config.is_moe else ATTENTION + FEED_FORWARD


@dataclass(frozen=True)
class Work:
    """What is to be trained, whoever does it."""

    config: TelechatConfig
    sequence_length: int
    lora: Lora | None = None
    dtype: str = "bfloat16"
    rows: int | None = None  # None: not known

    @property
    def param_dtype(self) -> str:
        """Of the weights as they are stored and loaded: an adapter's frozen ones need no more than is computed with."""
        return self.dtype if self.lora else "float32"


def parse_offset(text: str) -> tuple[tuple[int, ...], ...]:
    """`-1,1,1,-1`, or with interleaving a run after the other: `-1,0,0,0; 0,0,0,1`.

    Raises:
        InputError: something else.
    """
    try:
        return tuple(tuple(int(number) for number in run.split(",")) for run in text.split(";"))
    except ValueError:
        raise InputError("is no list of numbers", where="--offset", expected="as -1,1,1,-1", found=text) from None


def as_yaml_offset(offset: Sequence[Sequence[int]]) -> Any:
    """0 where all stages are alike, a list for one run, a list of lists for more."""
    if not any(map(any, offset)):
        return 0
    return list(offset[0]) if len(offset) == 1 else [list(run) for run in offset]
