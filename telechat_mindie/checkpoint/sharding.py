"""How a tensor is cut for tensor parallelism: one rule a role, for the converter and for the model's layers alike."""

from __future__ import annotations

import enum
from collections.abc import Sequence

from telechat_mindie.errors import CheckpointError


class Role(enum.Enum):
    """What a weight does in a layer; the value is the axis that ranks divide, None where every rank holds it all.

    Matrices are [out, in]. COLUMN cuts the outputs (q, k, v, gate, up, lm_head, the embedding's vocabulary), ROW the
    inputs (dense, down); the expert roles are the same for stacked [experts, out, in] weights.
    """

    COLUMN = ("column", 0)
    ROW = ("row", 1)
    REPLICATED = ("replicated", None)
    EXPERT_COLUMN = ("expert column", 1)
    EXPERT_ROW = ("expert row", 2)

    @property
    def axis(self) -> int | None:
        axis: int | None = self.value[1]
        return axis

    @property
    def per_expert(self) -> Role:
        """The role of one expert's matrix inside the stack."""
        return {Role.EXPERT_COLUMN: Role.COLUMN, Role.EXPERT_ROW: Role.ROW}.get(self, self)


def split(shape: Sequence[int], role: Role, rank: int, tp: int) -> tuple[range, ...]:
    """Rank `rank`'s part of a tensor of `shape`: the range of each axis that it holds.

    Raises:
        CheckpointError: `tp` does not divide the axis that `role` cuts.
    """
    return tuple(rank_range(size, rank, tp) if axis == role.axis else range(size) for axis, size in enumerate(shape))


def rank_shape(shape: Sequence[int], role: Role, tp: int) -> tuple[int, ...]:
    """Shape of one rank's part of a tensor of `shape`."""
    return tuple(len(part) for part in split(shape, role, 0, tp))


def rank_range(size: int, rank: int, tp: int) -> range:
    """Rank `rank`'s share of an axis of `size`.

    Raises:
        CheckpointError: `tp` does not divide `size`.
    """
    if size % tp:
        raise CheckpointError("axis cannot be cut evenly", expected=f"a multiple of {tp}", found=size)
    share = size // tp
    return range(rank * share, (rank + 1) * share)
