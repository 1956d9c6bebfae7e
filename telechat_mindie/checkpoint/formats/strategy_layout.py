"""How the ranks of a pipeline stage divide its parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

MAX_RUN_RANKS = 65_536
"""Ranks of one training run; TeleChat2-115B's published yaml is for 4,096."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How the ranks of a stage divide one parameter.

    Attributes:
        devices: the stage's ranks as an array of this shape, in rank order.
        axes: of each axis of the parameter, the axes of `devices` that divide it, outermost first.
        shards: into how many parts axis 0 is cut once more, inside the cut of `axes`, over ranks that would else hold
            copies (optimizer parallelism); 1 where they do hold copies.
    """

    devices: tuple[int, ...]
    axes: tuple[tuple[int, ...], ...]
    shards: int = 1

    @property
    def ranks(self) -> int:
        return math.prod(self.devices)

    @property
    def cuts(self) -> tuple[int, ...]:
        """Parts that each axis is cut into, without `shards`."""
        return tuple(math.prod(self.devices[device] for device in axis) for axis in self.axes)

    def place(self, rank: int) -> tuple[int, ...]:
        """Which part of each axis a rank of the stage, counted from 0, holds or has a share of."""
        at = []
        for size in reversed(self.devices):
            rank, index = divmod(rank, size)
            at.append(index)
        at.reverse()
        place = []
        for axis in self.axes:
            part = 0
            for device in axis:
                part = part * self.devices[device] + at[device]
            place.append(part)
        return tuple(place)

    def groups(self) -> dict[tuple[int, ...], list[int]]:
        """The stage's ranks by place, in rank order: those of a group hold copies, or one shard after the other."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.ranks):
            groups.setdefault(self.place(rank), []).append(rank)
        return groups


Stage = Mapping[str, Layout]
"""The layouts of a pipeline stage by parameter."""
