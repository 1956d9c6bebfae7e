"""What a conversion will do, before it does anything: every output byte and where it comes from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from telechat_mindie.checkpoint.formats.containers import SAFETENSORS, Container, Frame
from telechat_mindie.checkpoint.mapping import Target
from telechat_mindie.config import TelechatConfig
from telechat_mindie.dtypes import DTYPES

SHARD_BYTES = 2 << 30
"""Size a shard is closed at: also the most that a killed conversion has to do again for a rank."""


@dataclass(frozen=True)
class Shard:
    """One output file of every rank: the same tensors, hence the same size and layout, in each."""

    file: str
    targets: tuple[Target, ...]
    frames: tuple[Frame, ...]

    @property
    def nbytes(self) -> int:
        """Size of one rank's file."""
        return sum(len(frame.prefix) + frame.nbytes for frame in self.frames)


@dataclass(frozen=True)
class ConversionPlan:
    """A conversion into shards of `dtype` for `tp` ranks; `folder` is each rank's, below the output directory."""

    config: TelechatConfig
    dtype: str
    tp: int
    shards: tuple[Shard, ...]
    folder: str = "rank_{rank}"

    @property
    def rank_bytes(self) -> int:
        """Bytes of one rank's files."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def output_bytes(self) -> int:
        return self.tp * self.rank_bytes

    def path(self, rank: int, shard: Shard) -> str:
        """A rank's file, relative to the output directory."""
        return (f"{self.folder}/{shard.file}" if self.folder else shard.file).format(rank=rank)


def make_plan(
    config: TelechatConfig,
    targets: Sequence[Target],
    dtype: str,
    tp: int = 1,
    *,
    container: Container = SAFETENSORS,
    shard_bytes: int | None = None,
    folder: str = "rank_{rank}",
    file: str = "model-{number:05d}-of-{count:05d}",
) -> ConversionPlan:
    """Lay `targets` out in shards of at most `shard_bytes` (one tensor at least; SHARD_BYTES) for `tp` ranks.

    Args:
        container: the files' format.
        folder: of each rank, by `{rank}`, below the output directory; may be empty.
        file: name of a shard, without suffix, by its `{number}`, the `{count}` of shards and `{{rank}}`.

    Raises:
        ConfigError: the model cannot be split into `tp` ranks; the allowed values are named.
    """
    config.check_tp(tp)
    groups: list[list[Target]] = [[]]
    filled = 0
    for target in targets:
        nbytes = math.prod(target.rank_shape(tp)) * DTYPES[target.dtype or dtype].itemsize
        if groups[-1] and filled + nbytes > (shard_bytes or SHARD_BYTES):
            groups.append([])
            filled = 0
        groups[-1].append(target)
        filled += nbytes
    shards = []
    for number, group in enumerate(groups, 1):
        frames = container.frames([(target.name, target.dtype or dtype, target.rank_shape(tp)) for target in group])
        name = file.format(number=number, count=len(groups)) + container.suffix
        shards.append(Shard(name, tuple(group), frames))
    return ConversionPlan(config, dtype, tp, tuple(shards), folder)
