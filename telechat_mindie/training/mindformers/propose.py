"""Layouts that a cluster can hold, best first.

The rule: least communication first. The smallest tp, which exchanges activations within every layer, inside a node;
then the smallest pp, which hands them on from stage to stage; then the smallest ep; dp takes the cards that are left.
Of each, as little is computed again as the memory allows. Stages of fewer than STAGE_LAYERS layers come last.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from telechat_mindie.errors import InputError, TelechatMindieError
from telechat_mindie.training.mindformers.layout import RECOMPUTE, Cluster, Layout, Work, too_small
from telechat_mindie.training.mindformers.memory import Memory, estimate, usable_bytes
from telechat_mindie.training.mindformers.rules import faults, work_faults
from telechat_mindie.units import GB

MICRO_BATCHES = 4
"""Micro batches of a stage where nobody says: the pipeline then idles for at most a fifth of a step."""


MAX_SEARCHED = 1024
"""Cards up to which a larger cluster is looked for."""

STAGE_LAYERS = 4
"""The head over 131,072 tokens costs the last stage about as much as a layer: with fewer, the others wait for it."""


@dataclass(frozen=True)
class Choice:
    """What is fixed of a layout; None is to be found."""

    dp: int | None = None
    tp: int | None = None
    pp: int | None = None
    ep: int | None = None
    global_batch: int | None = None
    micro_batches: int | None = None
    batch_size: int = 1
    interleave: int = 1
    offset: tuple[tuple[int, ...], ...] = ()
    optimizer_shard: int | None = None
    recompute: str | None = None

    def __post_init__(self) -> None:
        flags = {"global_batch": "--batch-size", "batch_size": "--micro-batch"}
        for name, value in vars(self).items():
            if isinstance(value, int):
                for fault in too_small({flags.get(name, f"--{name.replace('_', '-')}"): value}):
                    raise fault


@dataclass(frozen=True)
class Proposal:
    """A layout and the memory of a card of each of its stages."""

    layout: Layout
    stages: tuple[Memory, ...]

    @property
    def peak(self) -> float:
        return max(stage.total for stage in self.stages)


def propose(choice: Choice, work: Work, cluster: Cluster) -> list[Proposal]:
    """The layouts that keep all rules and fit into the cards' memory, the best first.

    Raises:
        InputError, ConfigError: there is none. Said is the first broken rule where none keeps them, else how much the
            smallest needs, and how many machines would do.
    """
    for wrong in work_faults(work):
        raise wrong
    proposals, smallest, fault = _search(choice, work, cluster)
    if proposals:
        return proposals
    if smallest is None:
        raise fault or _indivisible(choice)
    more = _enough_nodes(choice, work, cluster)
    advice = f"{more} such machines would do." if more else "Shorten --max-length, or take cards with more memory."
    where = f"{cluster.world} cards of {cluster.device_gb:g} GB"
    if choice.dp and choice.tp and choice.pp:
        advice += f" A larger --device-mem than {cluster.device_gb:g} writes it all the same."
    raise InputError(
        f"hold no such finetune: {smallest.layout} takes least",
        where=where,
        expected=f"at most {usable_bytes(cluster) / GB:.1f} GB of a card",
        found=f"about {smallest.peak / GB:.1f} GB",
        advice=advice,
    )


def _indivisible(choice: Choice) -> InputError:
    product = f"batch size {choice.batch_size} x dp" + (f" {choice.dp}" if choice.dp else "")
    if choice.micro_batches is not None:
        product += f" x {choice.micro_batches} micro batches"
    return InputError(
        "is not what the copies train in a step",
        where="--batch-size",
        expected=f"a multiple of {product}" if choice.micro_batches is None else product,
        found=choice.global_batch,
    )


def _search(
    choice: Choice, work: Work, cluster: Cluster
) -> tuple[list[Proposal], Proposal | None, TelechatMindieError | None]:
    """The proposals; of all layouts that keep the rules the one that takes least memory; the first broken rule."""
    found: list[Proposal] = []
    smallest: Proposal | None = None
    fault: TelechatMindieError | None = None
    shallow = work.config.num_layers / STAGE_LAYERS
    for layouts in sorted(_candidates(choice, work, cluster), key=lambda layouts: layouts[0].pp > shallow):
        for layout in layouts:
            if wrong := next(faults(layout, work, cluster), None):
                fault = fault or wrong
                break  # recompute breaks no rule
            proposal = Proposal(layout, tuple(estimate(layout, work)))
            if smallest is None or proposal.peak < smallest.peak:
                smallest = proposal
            if proposal.peak <= usable_bytes(cluster):
                found.append(proposal)
                break
    return found, smallest, fault


def _candidates(choice: Choice, work: Work, cluster: Cluster) -> Iterator[list[Layout]]:
    """In the order of the rule, each once for every way to compute again."""
    config = work.config
    for tp in [choice.tp] if choice.tp else _divisors(cluster.cards):
        for pp in [choice.pp] if choice.pp else _divisors(max(1, cluster.world // tp)):
            dp = choice.dp or max(1, cluster.world // (tp * pp))
            micro_batches = _micro_batches(choice, dp, pp, work.rows)
            if micro_batches is None:
                continue
            for ep in [choice.ep] if choice.ep else _divisors(dp) if config.is_moe else [1]:
                layout = Layout(
                    dp=dp,
                    tp=tp,
                    pp=pp,
                    ep=ep,
                    micro_batches=micro_batches,
                    batch_size=choice.batch_size,
                    interleave=choice.interleave,
                    offset=choice.offset,
                    optimizer_shard=choice.optimizer_shard or _optimizer_shard(dp, tp, ep, work),
                )
                yield [replace(layout, recompute=mode) for mode in _recompute_modes(choice, work)]


def _recompute_modes(choice: Choice, work: Work) -> tuple[str, ...]:
    if choice.recompute:
        return (choice.recompute,)
    return ("off", "full") if work.config.is_moe else RECOMPUTE  # the patterns name a dense layer's operators


def _micro_batches(choice: Choice, dp: int, pp: int, rows: int | None) -> int | None:
    """As chosen; None where the chosen step cannot be divided over the copies."""
    each = choice.batch_size * dp
    if choice.global_batch is None:
        if choice.micro_batches is not None:
            return choice.micro_batches
        wanted = MICRO_BATCHES * pp if pp > 1 else 1
        return wanted if rows is None else max(pp, min(wanted, rows // each))
    micro_batches, left = divmod(choice.global_batch, each)
    return None if left or choice.micro_batches not in (None, micro_batches) else micro_batches


def _optimizer_shard(dp: int, tp: int, ep: int, work: Work) -> int:
    """The most copies that can each take a part of every large weight, whose first axis is what is cut."""
    config = work.config
    axes = [config.hidden_size, config.vocab_size // tp, 2 * config.kv_size // tp]
    if config.is_moe:
        axes.append(max(1, config.num_experts // (ep * tp)))
        dp = max(1, dp // ep)
    else:
        axes.append(config.ffn_size // tp)
    return max(size for size in _divisors(dp) if all(axis % size == 0 for axis in axes))


def _enough_nodes(choice: Choice, work: Work, cluster: Cluster) -> int | None:
    """How many machines of this kind hold it, doubled from those there are; dp is left open."""
    work = replace(work, rows=None)
    nodes = cluster.nodes
    while 2 * nodes * cluster.cards <= MAX_SEARCHED:
        nodes *= 2
        larger = replace(cluster, nodes=nodes)
        open_choice = replace(choice, dp=None, optimizer_shard=None, global_batch=None, offset=())
        if choice.dp and choice.tp and choice.pp:
            open_choice = replace(open_choice, tp=None, pp=None, ep=None, micro_batches=None)
        if _search(open_choice, work, larger)[0]:
            return nodes
    return None


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
