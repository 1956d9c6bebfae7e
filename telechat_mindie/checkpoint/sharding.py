"""How a tensor is cut for tensor parallelism: one rule a role, used by the converter and by the model's layers."""

from __future__ import annotations

import enum
from collections.abc import Sequence

import numpy as np

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


def rank_range(size: int, rank: int, tp: int) -> tuple[int, int]:
    """First and past-the-last index of rank `rank`'s share of an axis of `size`.

    Raises:
        CheckpointError: `tp` does not divide `size`.
    """
    if size % tp:
        raise CheckpointError("axis cannot be cut evenly", expected=f"a multiple of {tp}", found=size)
    share = size // tp
    return rank * share, (rank + 1) * share


def rank_shape(shape: Sequence[int], role: Role, tp: int) -> tuple[int, ...]:
    """Shape of one rank's part of a tensor of `shape`."""
    if role.axis is None:
        return tuple(shape)
    begin, end = rank_range(shape[role.axis], 0, tp)
    return (*shape[: role.axis], end - begin, *shape[role.axis + 1 :])


def split(array: np.ndarray, role: Role, rank: int, tp: int) -> np.ndarray:
    """Rank `rank`'s part of `array`, a view."""
    if role.axis is None:
        return array
    begin, end = rank_range(array.shape[role.axis], rank, tp)
    return array[(slice(None),) * role.axis + (slice(begin, end),)]


def join(parts: Sequence[np.ndarray], role: Role) -> np.ndarray:
    """The whole tensor from every rank's part, in rank order; the inverse of `split`."""
    return parts[0] if role.axis is None else np.concatenate(parts, axis=role.axis)
