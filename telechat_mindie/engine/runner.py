"""The seam to the model: what the engine asks of a runner, and one step of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from telechat_mindie.engine.model_input import forward_arguments, swap_arguments
from telechat_mindie.engine.scheduler import Batch


class Runner(Protocol):
    """`telechat_mindie.backend.model_runner.ModelRunner`, as far as the engine uses it."""

    npu_num_blocks: int
    cpu_num_blocks: int
    model_config: Any  # vocab_size, eos_token_id, max_position_embedding

    @property
    def forward(self) -> Callable[..., Any]:
        """Takes keyword arguments; gives a two-dimensional tensor of logits, or a tuple with it as the first item."""

    def swap(self, block_tables: NDArray[np.int64], swap_type: bool) -> None:
        """Copy block [0, 0] to block [0, 1]: device to host where `swap_type` is true, else host to device."""


def run(runner: Runner, batch: Batch, tables: NDArray[np.int32], block_size: int) -> NDArray[np.float32]:
    """Make the batch's block copies, then its forward.

    Returns:
        [B, vocabulary]: logits after each sequence's last new token.

    Raises:
        Exception: whatever the runner raises.
        RuntimeError: it returned something of another shape.
    """
    for swap in batch.swaps:
        runner.swap(*swap_arguments(*swap))
    result = runner.forward(**forward_arguments(batch, tables, block_size))
    tensor = result[0] if isinstance(result, tuple) else result
    logits = np.asarray(tensor.asnumpy() if hasattr(tensor, "asnumpy") else tensor)
    expected = (len(batch.sequences), runner.model_config.vocab_size)
    if logits.shape != expected:
        raise RuntimeError(f"forward returned logits of shape {list(logits.shape)} instead of {list(expected)}")
    return logits.astype(np.float32, copy=False)
