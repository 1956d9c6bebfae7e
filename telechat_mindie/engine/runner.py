"""The seam to the model: what the engine asks of a runner, and a batch as the arguments of one step of it.

They are the numpy arguments that MindIE-LLM v3.0.0.beta.2 passes to `ModelRunner.forward`. Sources there:
tg_infer_context_store.py (plain prefill, decode, mixed batches), prefix_cache_preprocess.py and prefix_cache_plugin.py
(prefix hits), mf_model_wrapper.py (keywords, flat shapes, swap). T new tokens, B sequences, W blocks of the longest
sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from telechat_mindie.engine.scheduler import Batch


class Runner(Protocol):
    """`telechat_mindie.backend.model_runner.ModelRunner`, as far as the engine uses it."""

    npu_num_blocks: int
    cpu_num_blocks: int
    model_config: Any  # vocab_size, eos_token_id, max_position_embedding

    @property
    def forward(self) -> Callable[..., Any]:
        """Takes keyword arguments; gives logits, a two-dimensional array or tensor, or a tuple that begins so."""

    def swap(self, block_tables: NDArray[np.int64], swap_type: bool) -> None:
        """Copy block [0, 0] to block [0, 1]: device to host where `swap_type` is true, else host to device."""


def run(runner: Runner, batch: Batch, tables: NDArray[np.int32], block_size: int) -> NDArray[np.float32]:
    """Make the batch's block copies, then its forward.

    Returns:
        [B, vocabulary]: logits after each sequence's last new token; what the runner gave itself, if that is an array.

    Raises:
        Exception: whatever the runner raises.
        RuntimeError: it returned something of another shape.
    """
    for to_host, source, target in batch.swaps:
        runner.swap(np.array([[source, target]], np.int64), to_host)
    result = runner.forward(**forward_arguments(batch, tables, block_size))
    tensor = result[0] if isinstance(result, tuple) else result
    logits = np.asarray(tensor.asnumpy() if hasattr(tensor, "asnumpy") else tensor)
    expected = (len(batch.sequences), runner.model_config.vocab_size)
    if logits.shape != expected:
        raise RuntimeError(f"forward returned logits of shape {list(logits.shape)} instead of {list(expected)}")
    return logits.astype(np.float32, copy=False)


def forward_arguments(batch: Batch, tables: NDArray[np.int32], block_size: int) -> dict[str, Any]:
    """All keyword arguments of one forward.

    `spec_mask` is None even after a prefix hit. The plugin passes a triangle [T, context] of float64 there, 512 MiB for
    8192 tokens on 8192, which says what positions and lengths say already; the runner accepts it and does not read it.

    Args:
        batch: what the scheduler chose.
        tables: [rows, blocks] block tables, row `sequence.row`, -1 where unused.
        block_size: tokens of a block.
    """
    sequences, chunked = batch.sequences, batch.chunked
    rows = np.array([sequence.row for sequence in sequences])
    starts = np.array([sequence.num_computed for sequence in sequences], np.int32)
    arguments: dict[str, Any] = {"key_cache": None, "value_cache": None, "spec_mask": None}
    if not batch.is_prefill:
        context_lens = starts + np.int32(1)
        return arguments | {
            "input_ids": np.array([sequence.last_token for sequence in sequences], np.int64),
            "valid_length_each_example": context_lens,
            "block_tables": tables[rows, : -(-int(context_lens.max()) // block_size)],
            "slot_mapping": tables[rows, starts // block_size] * np.int32(block_size) + starts % block_size,
            "prefill": False,
            "position_ids": starts,
            "adapter_ids": [None] * len(sequences),
            "prefill_head_indices": None,
            "q_seq_lens": None,
        }
    query_lens = np.array(batch.query_lens, np.int32)
    context_lens = starts + query_lens
    ends = np.cumsum(query_lens, dtype=np.int64)  # of each sequence's new tokens among the T
    positions = np.arange(ends[-1]) - np.repeat(ends - context_lens, query_lens)  # [T], of each in its sequence
    slots = tables[np.repeat(rows, query_lens), positions // block_size] * np.int64(block_size) + positions % block_size
    token_ids = [s.token_ids[start:end] for s, start, end in zip(sequences, starts, context_lens, strict=True)]
    is_hit = any(0 < sequence.num_computed == sequence.num_cached for sequence in sequences[batch.num_decodes :])
    index_dtype = np.int64 if is_hit else np.int32  # the prefix cache plugin rebuilds these two as int64
    return arguments | {
        "input_ids": np.concatenate(token_ids),
        "valid_length_each_example": context_lens,
        "block_tables": tables[rows, : -(-int(context_lens.max()) // block_size)],  # [B, W]
        "slot_mapping": slots.astype(index_dtype, copy=False),
        "prefill": True,
        "position_ids": positions.astype(index_dtype, copy=False),
        "adapter_ids": None if chunked and not is_hit else [None] * len(sequences),
        "prefill_head_indices": ends - 1,
        "q_seq_lens": list(batch.query_lens) if is_hit or chunked else None,
    }
