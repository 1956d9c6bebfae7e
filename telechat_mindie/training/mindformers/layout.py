"""How the cards of a cluster divide a finetune, and what mindformers 1.6.0 asks of such a layout.

    cards = dp x tp x pp; ranks of one tensor parallel group are neighbours, those of a stage lie together
    sequences of a step = batch size x dp x micro batches

Sources are files of mindformers v1.6.0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from telechat_mindie.config import TelechatConfig
from telechat_mindie.errors import ConfigError, InputError, TelechatMindieError

RECOMPUTE = ("off", "select", "full")
"""What the backward pass computes again, instead of keeping it: nothing; the feed-forward's activation and product and
the norms' gathered outputs (models/utils.py LayerSetting, its default patterns); whole layers. From fast to small."""

ATTENTION_BLOCK = 16
"""Flash attention takes sequences of a multiple of it."""

MAX_CARDS, MAX_DEVICE_GB = 4096, 4096


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
    dropout: float = 0.0


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


def check(layout: Layout, work: Work, cluster: Cluster) -> None:
    """Raise the first of `faults`."""
    for fault in faults(layout, work, cluster):
        raise fault


def faults(layout: Layout, work: Work, cluster: Cluster) -> Iterator[TelechatMindieError]:
    """Why mindformers could not train so, each a sentence that names the numbers."""
    yield from work_faults(work)
    yield from _size_faults(layout, cluster)
    yield from _tensor_faults(layout, work, cluster)
    yield from _world_faults(layout, cluster)
    yield from _stage_faults(layout, work.config)
    yield from _batch_faults(layout, work)
    yield from _expert_faults(layout, work.config)
    yield from _optimizer_faults(layout, work)


def work_faults(work: Work) -> Iterator[TelechatMindieError]:
    """What no layout mends."""
    config, lora = work.config, work.lora
    if config.tie_word_embeddings or config.embed_layernorm:
        what = "tied embeddings" if config.tie_word_embeddings else "a norm after its embedding"
        yield ConfigError(f"has {what}, which mindformers' TeleChat2 has not", where="config.json")
    if work.dtype != "bfloat16":
        advice = "float16 needs a loss scale that this recipe has not, and flash attention takes no float32."
        yield InputError("cannot be trained in", where="--dtype", expected="bfloat16", found=work.dtype, advice=advice)
    if work.sequence_length < 1 or work.sequence_length % ATTENTION_BLOCK:
        yield InputError(
            "does not suit flash attention",
            where="--sequence-length",
            expected=f"a multiple of {ATTENTION_BLOCK}",
            found=work.sequence_length,
        )
    if lora is None:
        return
    if lora.rank < 1 or lora.alpha <= 0 or not 0 <= lora.dropout < 1:
        found = f"rank {lora.rank}, alpha {lora.alpha:g}, dropout {lora.dropout:g}"
        yield InputError(
            "is out of range", where="LoRA", expected="rank >= 1, alpha > 0, 0 <= dropout < 1", found=found
        )
    allowed = adaptable(config)
    if not lora.targets or (unknown := [name for name in lora.targets if name not in allowed]):
        yield InputError(
            "cannot be adapted" + (": mindformers adapts no experts" if config.is_moe else ""),
            where="LoRA targets",
            expected=", ".join(allowed),
            found=", ".join(unknown) if lora.targets else "none",
        )


def too_small(numbers: Mapping[str, int | None]) -> Iterator[InputError]:
    """What is given of these and not at least 1, by its flag."""
    for flag, number in numbers.items():
        if number is not None and number < 1:
            yield InputError("is too small", where=flag, expected="at least 1", found=number)


def _size_faults(layout: Layout, cluster: Cluster) -> Iterator[InputError]:
    numbers = {
        "--dp": layout.dp,
        "--tp": layout.tp,
        "--pp": layout.pp,
        "--ep": layout.ep,
        "--batch-size": layout.batch_size,
        "--micro-batches": layout.micro_batches,
        "--interleave": layout.interleave,
        "--optimizer-shard": layout.optimizer_shard,
    }
    yield from too_small(numbers)
    if cluster.world > MAX_CARDS:
        yield InputError("are too many cards", where="--nodes x --cards", expected=MAX_CARDS, found=cluster.world)
    if layout.recompute not in RECOMPUTE:
        yield InputError("is unknown", where="--recompute", expected=" or ".join(RECOMPUTE), found=layout.recompute)


def _tensor_faults(layout: Layout, work: Work, cluster: Cluster) -> Iterator[TelechatMindieError]:
    tp = layout.tp
    if cluster.cards % tp:
        yield InputError(
            "a tensor parallel group would reach over machines",
            where="--tp",
            expected=f"a divisor of the {cluster.cards} cards of one",
            found=tp,
            advice="It exchanges every layer's activations several times a step.",
        )
    try:
        work.config.check_tp(tp)  # the same rule as for serving
    except ConfigError as error:
        yield error
    if layout.sequence_parallel and work.sequence_length % tp:
        yield InputError(
            "cannot be cut by sequence parallelism",
            where="--sequence-length",
            expected=f"a multiple of tp {tp}",
            found=work.sequence_length,
        )


def _world_faults(layout: Layout, cluster: Cluster) -> Iterator[InputError]:
    if layout.world != cluster.world:  # tools/check_rules.py _check_parallel
        yield InputError(
            f"dp {layout.dp} x tp {layout.tp} x pp {layout.pp} is another number of cards than there are",
            where="--dp, --tp, --pp",
            expected=f"{cluster.world}, {cluster.nodes} x {cluster.cards}",
            found=layout.world,
        )


def _stage_faults(layout: Layout, config: TelechatConfig) -> Iterator[InputError]:
    pp, runs, layers = layout.pp, layout.interleave, config.num_layers
    if runs > 1 and pp == 1:
        yield InputError("needs stages to interleave", where="--interleave", expected="1 with pp 1", found=runs)
    if layers < pp * runs:
        yield InputError(
            "are too few for the stages", where="layers", expected=f"at least {pp} x {runs} = {pp * runs}", found=layers
        )
        return
    offset, left = layout.offsets(layers), layers % (pp * runs)
    if len(offset) != runs or any(len(run) != pp for run in offset):  # models/utils.py LayerSetting._check_inputs
        yield InputError(
            "has the wrong length",
            where="--offset",
            expected=f"{runs} x {pp} numbers, one a stage",
            found=" ; ".join(",".join(map(str, run)) for run in offset),
        )
        return
    if (total := sum(map(sum, offset))) != left:
        yield InputError(
            f"has the wrong sum: {layers} layers over {pp} stages x {runs} leave {left}",
            where="--offset",
            expected=left,
            found=total,
        )
    if (fewest := min(map(min, layout.stage_layers(layers)))) < 1:
        yield InputError("leaves a stage without layers", where="--offset", expected="at least 1", found=fewest)


def _batch_faults(layout: Layout, work: Work) -> Iterator[InputError]:
    if layout.micro_batches < layout.pp:  # modules/transformer/transformer.py TransformerOpParallelConfig
        yield InputError(
            "are fewer than the stages", where="--micro-batches", expected=layout.pp, found=layout.micro_batches
        )
    if layout.world == 1 and layout.micro_batches > 1:  # trainer/base_trainer.py _check_grad_accumulation_steps
        yield InputError(
            "cannot be accumulated by mindformers on a single card",
            where="--micro-batches",
            expected=1,
            found=layout.micro_batches,
            advice="Raise --batch-size instead.",
        )
    if work.rows is not None and work.rows < layout.global_batch:
        yield InputError(
            f"are fewer than the sequences of one step, {layout.batch_size} x dp {layout.dp} x "
            f"{layout.micro_batches} micro batches: mindformers would train nothing",
            where="rows",
            expected=f"at least {layout.global_batch}",
            found=work.rows,
        )


def _expert_faults(layout: Layout, config: TelechatConfig) -> Iterator[InputError]:
    if not config.is_moe:
        if layout.ep > 1:
            yield InputError("is for a model with experts", where="--ep", expected=1, found=layout.ep)
        return
    if layout.dp % layout.ep:  # modules/transformer/moe.py _check_moe_config
        yield InputError("does not divide dp", where="--ep", expected=f"a divisor of {layout.dp}", found=layout.ep)
    groups = layout.ep * layout.tp
    if config.num_experts % groups:
        yield InputError(
            f"does not divide the experts: ep {layout.ep} x tp {layout.tp} = {groups} groups",
            where="--ep",
            expected=f"a divisor of {config.num_experts}",
            found=groups,
        )


def _optimizer_faults(layout: Layout, work: Work) -> Iterator[InputError]:
    copies = layout.dp // layout.ep if work.config.is_moe else layout.dp
    if max(copies, 1) % layout.optimizer_shard:
        meaning = f"the {copies} copies of an expert, dp / ep" if work.config.is_moe else f"dp {layout.dp}"
        yield InputError(
            "does not divide the copies of a weight",
            where="--optimizer-shard",
            expected=f"a divisor of {meaning}",
            found=layout.optimizer_shard,
        )


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
