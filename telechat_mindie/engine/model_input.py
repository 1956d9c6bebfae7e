"""A batch as the numpy arguments of `ModelRunner.forward`, as MindIE-LLM v3.0.0.beta.2 delivers them.

Sources there: tg_infer_context_store.py (plain prefill, decode, mixed batches), prefix_cache_preprocess.py and
prefix_cache_plugin.py (prefix hits), mf_model_wrapper.py (keywords, flat shapes, swap). T new tokens, B sequences, W
blocks of the longest sequence.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from telechat_mindie.engine.scheduler import Batch


def forward_arguments(batch: Batch, tables: NDArray[np.int32], block_size: int) -> dict[str, Any]:
    """All keyword arguments of one forward.

    Args:
        batch: what the scheduler chose.
        tables: [rows, blocks] block tables, row `sequence.row`, -1 where unused.
        block_size: tokens of a block.
    """
    if not batch.is_prefill:
        return _decode_arguments(batch, tables, block_size)
    query_lens = np.array(batch.query_lens, np.int32)
    starts = np.array([sequence.num_computed for sequence in batch.sequences], np.int32)
    context_lens = starts + query_lens
    heads = np.cumsum(query_lens, dtype=np.int64)
    # [T] position of each token in its sequence, and the row of its block table
    positions = np.arange(heads[-1]) - np.repeat(heads - context_lens, query_lens)
    rows = np.repeat([sequence.row for sequence in batch.sequences], query_lens)
    slots = tables[rows, positions // block_size] * np.int64(block_size) + positions % block_size
    token_ids = [
        sequence.token_ids[sequence.num_computed : sequence.num_computed + query_len]
        for sequence, query_len in zip(batch.sequences, batch.query_lens, strict=True)
    ]
    is_hit = any(0 < sequence.num_computed == sequence.num_cached for sequence in batch.sequences[batch.num_decodes :])
    # The prefix cache plugin rebuilds these two as int64.
    index_dtype = np.int64 if is_hit else np.int32
    return {
        "input_ids": np.concatenate(token_ids).astype(np.int64, copy=False),
        "valid_length_each_example": context_lens,
        "block_tables": _tables(batch, tables, int(context_lens.max()), block_size),
        "slot_mapping": slots.astype(index_dtype, copy=False),
        "prefill": True,
        "position_ids": positions.astype(index_dtype, copy=False),
        "adapter_ids": [None] * len(batch.sequences) if is_hit or not batch.chunked else None,
        "prefill_head_indices": heads - 1,
        "key_cache": None,
        "value_cache": None,
        "spec_mask": causal_mask(positions, int(context_lens.max())) if is_hit else None,
        "q_seq_lens": list(batch.query_lens) if is_hit or batch.chunked else None,
    }


def _decode_arguments(batch: Batch, tables: NDArray[np.int32], block_size: int) -> dict[str, Any]:
    rows = np.array([sequence.row for sequence in batch.sequences])
    positions = np.array([sequence.num_computed for sequence in batch.sequences], np.int32)
    return {
        "input_ids": np.array([sequence.token_ids[-1] for sequence in batch.sequences], np.int64),
        "valid_length_each_example": positions + np.int32(1),
        "block_tables": _tables(batch, tables, int(positions.max()) + 1, block_size),
        "slot_mapping": tables[rows, positions // block_size] * np.int32(block_size) + positions % block_size,
        "prefill": False,
        "position_ids": positions,
        "adapter_ids": [None] * len(batch.sequences),
        "prefill_head_indices": None,
        "key_cache": None,
        "value_cache": None,
        "spec_mask": None,
        "q_seq_lens": None,
    }


def _tables(batch: Batch, tables: NDArray[np.int32], longest: int, block_size: int) -> NDArray[np.int32]:
    """[B, W]"""
    width = -(-longest // block_size)
    return tables[[sequence.row for sequence in batch.sequences], :width]


def causal_mask(positions: NDArray[np.integer[Any]], width: int) -> NDArray[np.float64]:
    """[T, width]: 0 up to each token's own position, the lowest float32 beyond it."""
    return np.where(np.arange(width) <= positions[:, None], 0.0, float(np.finfo(np.float32).min))


def swap_arguments(to_host: bool, source: int, target: int) -> tuple[NDArray[np.int64], bool]:
    """The positional arguments of `ModelRunner.swap`: [1, 2] source and destination block, and the direction."""
    return np.array([[source, target]], np.int64), to_host
