"""The processes of a run: how they are started, and whom each talks to."""

from __future__ import annotations

from typing import Any

from telechat_mindie.training.settings import Computation, Place


def groups(computation: Computation, place: Place) -> tuple[Any, Any, Any]:
    """Tensor parallel group, data parallel group, and all ranks, as this process sees them."""
    from mindspore import communication

    from telechat_mindie.model.parallel import TensorParallel

    dp, tp = computation.dp, computation.tp
    if dp == 1 or tp == 1:
        tensor = TensorParallel(place.tp_rank, tp)
        data = TensorParallel(place.dp_rank, dp)
        return tensor, data, tensor if dp == 1 else data
    for index in range(dp):
        communication.create_group(f"tensor-{index}", [index * tp + rank for rank in range(tp)])
    for index in range(tp):
        communication.create_group(f"data-{index}", [rank * tp + index for rank in range(dp)])
    return (
        TensorParallel(place.tp_rank, tp, f"tensor-{place.dp_rank}"),
        TensorParallel(place.dp_rank, dp, f"data-{place.tp_rank}"),
        TensorParallel(place.dp_rank * tp + place.tp_rank, dp * tp),
    )
