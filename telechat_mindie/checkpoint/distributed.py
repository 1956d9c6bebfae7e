"""A strategy applied: the tensors of a run's ranks put together, or whole tensors divided over ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

from telechat_mindie.checkpoint.formats.strategy import Strategy
from telechat_mindie.checkpoint.formats.strategy_layout import Layout
from telechat_mindie.checkpoint.formats.tensors import StoredTensor
from telechat_mindie.checkpoint.mapping import training_state
from telechat_mindie.checkpoint.pieces import copies, cut, join
from telechat_mindie.checkpoint.sharding import rank_range
from telechat_mindie.errors import CheckpointError, name_some

Tensors = Mapping[str, StoredTensor]

ANOTHER_RUN = "The strategy is that of another run; name the one that this run saved (output/strategy)."


def gather(strategy: Strategy, ranks: Sequence[Tensors], where: object) -> dict[str, StoredTensor]:
    """Every parameter of a run, whole. What the strategy does not know, counters and buffers, is the same in all ranks.

    Args:
        ranks: each rank's tensors by name. A rank may lack what others hold copies of, as `remove_redundancy` saves it.

    Raises:
        CheckpointError: the strategy is another run's, or pieces are missing or do not fit each other.
    """
    if len(ranks) != strategy.ranks:
        raise CheckpointError(
            "has another number of ranks than the strategy",
            where=where,
            expected=strategy.ranks,
            found=len(ranks),
            advice=ANOTHER_RUN,
        )
    gathered: dict[str, list[StoredTensor]] = {}
    size = strategy.stage_ranks
    for number, layouts in enumerate(strategy.stages):
        first = number * size
        holders = ranks[first : first + size]
        names = dict.fromkeys(name for tensors in holders for name in tensors)
        if unknown := [name for name in names if name not in layouts and not _common(name)]:
            raise CheckpointError(
                f"the strategy of stage {number} does not know {len(unknown)} of the ranks' {len(names)} tensors: "
                f"{name_some(unknown)}",
                where=where,
                advice=ANOTHER_RUN,
            )
        for name in names:
            if layout := layouts.get(name):
                gathered.setdefault(name, []).append(_gather_one(name, layout, holders, first, where))
    lost = [
        name for layouts in strategy.stages for name in layouts if name not in gathered and training_state(name) is None
    ]
    if lost:
        raise CheckpointError(
            f"no rank holds {len(lost)} of the weights that the strategy knows: {name_some(lost)}",
            where=where,
            advice=ANOTHER_RUN,
        )
    known = set().union(*strategy.stages)
    for tensors in ranks:
        for name, tensor in tensors.items():
            if name not in known:
                gathered.setdefault(name, []).append(tensor)
    return {name: _same(name, found, where) for name, found in gathered.items()}


def scatter(strategy: Strategy, tensors: Tensors, where: object) -> list[dict[str, StoredTensor]]:
    """What each rank of a run with this strategy holds of whole tensors, in their order; copies of it where it says so.

    Counters and buffers go to every rank.

    Raises:
        CheckpointError: the strategy does not know a tensor, or knows a weight that is not there, or cannot divide it.
    """
    known = set().union(*strategy.stages)
    if unknown := [name for name in tensors if name not in known and not _common(name)]:
        kinds = {training_state(name) for name in unknown}
        advice = "It is the strategy of another model."
        if None not in kinds:
            advice = "It is a strategy without an optimizer; leave the optimizer's state out."
        raise CheckpointError(
            f"does not know {len(unknown)} of {len(tensors)} tensors: {name_some(unknown)}", where=where, advice=advice
        )
    if missing := [name for name in known if name not in tensors and training_state(name) is None]:
        raise CheckpointError(
            f"asks for {len(missing)} weights that the checkpoint does not have: {name_some(missing)}",
            where=where,
            advice="It is the strategy of another model.",
        )
    result = []
    for layouts in strategy.stages:
        for rank in range(strategy.stage_ranks):
            held = {}
            for name, tensor in tensors.items():
                if layout := layouts.get(name):
                    held[name] = _share(tensor, layout, rank, where)
                elif name not in known:
                    held[name] = tensor
            result.append(held)
    return result


def part_by_part(tensor: StoredTensor, ranks: int) -> StoredTensor:
    """A packed weight [q k v] or [gate up] of one whose rows lie rank by rank, each with its share of every part."""
    rows, hidden = tensor.shape
    parts = (hidden, (rows - hidden) // 2, (rows - hidden) // 2) if "w_qkv" in tensor.name else (rows // 2, rows // 2)
    pieces, offset = [], 0
    for part in parts:
        share = len(rank_range(part, 0, ranks))
        for rank in range(ranks):
            begin = rank * (rows // ranks) + offset
            pieces.append(cut(tensor, 0, range(begin, begin + share)))
        offset += share
    return join(pieces, 0)


def _common(name: str) -> bool:
    """Whether a tensor may be without a layout: it is no parameter that ranks divide."""
    return training_state(name) in ("counter", "buffer")


@lru_cache(maxsize=256)
def _groups(layout: Layout) -> dict[tuple[int, ...], list[int]]:
    """`layout.groups()`, once for the many parameters that are divided alike."""
    return layout.groups()


def _gather_one(name: str, layout: Layout, holders: Sequence[Tensors], first: int, where: object) -> StoredTensor:
    """A parameter of one stage, whose ranks count from `first`."""
    held = [(rank, tensors[name]) for rank, tensors in enumerate(holders) if name in tensors]
    example = held[0][1]
    for rank, tensor in held:
        if (tensor.dtype, tensor.shape) != (example.dtype, example.shape):
            raise CheckpointError(
                f"{name} has another dtype or shape than in rank {first + held[0][0]}",
                where=f"{where}, rank {first + rank}",
                expected=f"{example.dtype} {list(example.shape)}",
                found=f"{tensor.dtype} {list(tensor.shape)}",
            )
    _check_axes(layout, example, where, ANOTHER_RUN)
    tiles: dict[tuple[int, ...], StoredTensor] = {}
    for place, group in _groups(layout).items():
        shards = []
        for shard in range(layout.shards):
            ranks = group[shard :: layout.shards]
            if not (found := [holders[rank][name] for rank in ranks if name in holders[rank]]):
                listed = name_some(f"rank {first + rank}" for rank in ranks)
                raise CheckpointError(f"lacks {name}", where=f"{where}, {listed}", advice="A rank's file is damaged.")
            shards.append(copies(found))
        tiles[place] = join(shards, 0) if layout.axes else shards[0]

    def build(place: tuple[int, ...]) -> StoredTensor:
        axis = len(place)
        if axis == len(layout.cuts):
            return tiles[place]
        return join([build((*place, part)) for part in range(layout.cuts[axis])], axis)

    return build(())


def _share(tensor: StoredTensor, layout: Layout, rank: int, where: object) -> StoredTensor:
    """What a rank of a stage, counted from 0, holds of a whole tensor."""
    _check_axes(layout, tensor, where)
    name, place = tensor.name, layout.place(rank)
    try:
        for axis, (part, parts) in enumerate(zip(place, layout.cuts, strict=True)):
            tensor = cut(tensor, axis, rank_range(tensor.shape[axis], part, parts))
        if layout.shards > 1:
            shard = _groups(layout)[place].index(rank) % layout.shards
            tensor = cut(tensor, 0, rank_range(tensor.shape[0], shard, layout.shards))
    except CheckpointError as error:
        raise CheckpointError(f"cannot be divided as the strategy says: {error}", where=f"{where}: {name}") from None
    return tensor


def _check_axes(layout: Layout, tensor: StoredTensor, where: object, advice: str | None = None) -> None:
    if len(layout.axes) != len(tensor.shape):
        raise CheckpointError(
            "has another number of axes than the strategy says",
            where=f"{where}: {tensor.name}",
            expected=len(layout.axes),
            found=list(tensor.shape),
            advice=advice,
        )


def _same(name: str, found: Iterable[StoredTensor], where: object) -> StoredTensor:
    """One tensor, of which several stages or ranks hold copies."""
    listed = list(found)
    if len({(tensor.dtype, tensor.shape) for tensor in listed}) > 1:
        shapes = " and ".join(sorted({f"{tensor.dtype} {list(tensor.shape)}" for tensor in listed}))
        raise CheckpointError("has several dtypes or shapes", where=f"{where}: {name}", found=shapes)
    # A buffer counts what its own rank saw, so those of other ranks need not agree.
    return listed[0] if training_state(name) == "buffer" else copies(listed)
