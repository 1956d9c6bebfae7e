"""What a conversion will do, before it does anything: every output byte and where it comes from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from telechat_mindie.checkpoint.mapping import Part, Target
from telechat_mindie.checkpoint.safetensors_format import encode_safetensors_header
from telechat_mindie.checkpoint.sharding import Role, rank_range
from telechat_mindie.checkpoint.tensors import DTYPES
from telechat_mindie.config import TelechatConfig

SHARD_BYTES = 2 << 30
"""Size a shard is closed at: also the most that a killed conversion has to do again for a rank."""


@dataclass(frozen=True, slots=True)
class Step:
    """Read rows of a weight once and append, for each (rank, columns) of `takers`, those columns to the rank's file."""

    source: str
    rows: tuple[int, int]
    columns: int  # of the source
    takers: tuple[tuple[int, tuple[int, int]], ...]
    transposed: bool = False


@dataclass(frozen=True)
class Shard:
    """One output file of every rank: the same tensors, hence the same size and layout, in each."""

    file: str
    targets: tuple[Target, ...]
    header: bytes
    nbytes: int  # of one rank's file, header included


@dataclass(frozen=True)
class Plan:
    """A conversion into `tp` folders of safetensors shards of `dtype`."""

    config: TelechatConfig
    dtype: str
    tp: int
    shards: tuple[Shard, ...]

    @property
    def rank_bytes(self) -> int:
        """Bytes of one rank's files."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def output_bytes(self) -> int:
        return self.tp * self.rank_bytes


def make_plan(
    config: TelechatConfig, targets: Sequence[Target], dtype: str, tp: int, shard_bytes: int = SHARD_BYTES
) -> Plan:
    """Lay `targets` out in shards of at most `shard_bytes` (one tensor at least) for `tp` ranks.

    Raises:
        ConfigError: the model cannot be split into `tp` ranks; the allowed values are named.
    """
    config.check_tp(tp)
    item = DTYPES[dtype].itemsize
    groups: list[list[Target]] = [[]]
    filled = 0
    for target in targets:
        nbytes = _elements(target.rank_shape(tp)) * item
        if groups[-1] and filled + nbytes > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(target)
        filled += nbytes
    shards = []
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        entries = [(target.name, dtype, target.rank_shape(tp)) for target in group]
        header, _ = encode_safetensors_header(entries, {"format": "np"})
        body = sum(_elements(target.rank_shape(tp)) for target in group) * item
        shards.append(Shard(file, tuple(group), header, len(header) + body))
    return Plan(config, dtype, tp, tuple(shards))


def steps(target: Target, config: TelechatConfig, tp: int) -> Iterator[Step]:
    """The reads that make a target, in the order in which its bytes lie in every rank's file."""
    role = target.role.per_expert
    for part in target.parts:
        columns = part.shape[1] if len(part.shape) == 2 else 1
        if role is Role.COLUMN:
            # Rank by rank: the ranks' rows are disjoint, so each byte is still read once.
            for rank in range(tp):
                for rows in _picked_rows(part, config.head_dim, rank, tp):
                    yield Step(part.source, rows, columns, ((rank, (0, columns)),), target.transposed)
        else:
            cuts = tuple(
                (rank, rank_range(columns, rank, tp) if role is Role.ROW else (0, columns)) for rank in range(tp)
            )
            yield Step(part.source, (0, part.shape[0]), columns, cuts, target.transposed)


def _picked_rows(part: Part, head_dim: int, rank: int, tp: int) -> Iterator[tuple[int, int]]:
    begin, end = rank_range(part.shape[0], rank, tp)
    if part.pick == "all":
        yield begin, end
        return
    for head in range(begin, end, 2 * head_dim):  # head_dim rows of the key, then head_dim of the value
        first = head if part.pick == "keys" else head + head_dim
        yield first, first + head_dim


def _elements(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
