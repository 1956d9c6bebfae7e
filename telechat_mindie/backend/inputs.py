"""MindIE's numpy arguments checked and read as one ragged batch.

Shapes and dtypes are those that MindIE-LLM v3.0.0.beta.2 delivers (mf_model_wrapper.py, plugin_manager.py): T new
tokens of B sequences, flat or in the legacy shapes (1, T) and (B, 1), int32 or int64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from telechat_mindie.errors import InputError
from telechat_mindie.model.batch import RaggedBatch


@dataclass(frozen=True)
class BatchLimits:
    """What a batch may ask for."""

    vocab_size: int
    num_blocks: int
    block_size: int
    max_seq_len: int
    scratch_row: int | None = None  # see RaggedBatch


def ragged_batch(
    limits: BatchLimits,
    *,
    input_ids: np.ndarray,
    valid_length_each_example: np.ndarray,
    block_tables: np.ndarray,
    slot_mapping: np.ndarray,
    prefill: bool,
    position_ids: np.ndarray | None = None,
    prefill_head_indices: np.ndarray | None = None,
    spec_mask: Any = None,
    q_seq_lens: Sequence[int] | np.ndarray | None = None,
) -> RaggedBatch:
    """Read the arguments of `ModelRunner.forward`; see there for their meaning.

    Raises:
        InputError: a wrong dtype or shape, an id, block or slot out of range, or lengths that do not fit together.
    """
    token_ids = _integers("input_ids", input_ids).reshape(-1)
    context_lens = _integers("valid_length_each_example", valid_length_each_example).reshape(-1)
    slots = _integers("slot_mapping", slot_mapping).reshape(-1)
    tables = _integers("block_tables", block_tables)
    total, count = len(token_ids), len(context_lens)
    if not count:
        raise InputError("is empty", where="valid_length_each_example")
    query_lens = _query_lens(q_seq_lens, context_lens, prefill, total)
    _check_length("slot_mapping", slots, total)
    if tables.ndim != 2 or len(tables) != count:
        raise InputError(
            "has the wrong shape", where="block_tables", expected=f"[{count}, blocks]", found=list(tables.shape)
        )
    _check_range("input_ids", token_ids, 0, limits.vocab_size)
    _check_range("slot_mapping", slots, -1, limits.num_blocks * limits.block_size)
    _check_range("block_tables", tables, -1, limits.num_blocks)
    if (context_lens < query_lens).any():
        raise InputError("context is shorter than the new tokens", where="valid_length_each_example")
    # Drafts may reach beyond the longest sequence: MindIE ends a request by the tokens that it keeps, after the call
    # (la and memory_decoding clip no draft by maxSeqLen), and it has blocks for them.
    drafts = np.zeros_like(query_lens) if prefill else query_lens - 1
    _check_range("valid_length_each_example", context_lens - drafts, 1, limits.max_seq_len + 1)
    # Only a context with history is read through its block table.
    _check_tables(tables, np.where(context_lens > query_lens, context_lens, 0), limits.block_size)
    starts = np.cumsum(query_lens) - query_lens
    if position_ids is None:
        positions = np.arange(total) - np.repeat(starts - (context_lens - query_lens), query_lens)
    else:
        positions = _integers("position_ids", position_ids).reshape(-1)
        _check_length("position_ids", positions, total)
        _check_range("position_ids", positions, 0, limits.max_seq_len + int(drafts.max()))
    return RaggedBatch(
        token_ids=token_ids.astype(np.int32),
        positions=positions.astype(np.int32),
        slots=slots.astype(np.int32),
        query_lens=query_lens.astype(np.int32),
        context_lens=context_lens.astype(np.int32),
        block_tables=tables.astype(np.int32),
        logits_rows=_logits_rows(prefill, prefill_head_indices, starts + query_lens - 1, total),
        # After a prefix hit the mask only says what causality says anyway; it matters for drafts that form a tree.
        mask=None if spec_mask is None or prefill else _visible(spec_mask, total),
        scratch_row=limits.scratch_row,
    )


def _query_lens(
    q_seq_lens: Sequence[int] | np.ndarray | None, context_lens: np.ndarray, prefill: bool, total: int
) -> np.ndarray:
    if q_seq_lens is not None:
        lens = _integers("q_seq_lens", q_seq_lens).reshape(-1)
        _check_length("q_seq_lens", lens, len(context_lens))
    elif prefill:
        lens = context_lens
    else:
        lens = np.ones_like(context_lens)
    if (lens < 1).any():
        raise InputError("every sequence needs a new token", where="q_seq_lens", found=lens.tolist())
    if lens.sum() != total:
        raise InputError(
            "token count does not fit the sequences' lengths", where="input_ids", expected=int(lens.sum()), found=total
        )
    return lens


def _logits_rows(prefill: bool, head_indices: np.ndarray | None, last: np.ndarray, total: int) -> np.ndarray:
    if not prefill:
        return np.arange(total, dtype=np.int32)
    if head_indices is None:
        return last.astype(np.int32)
    rows = _integers("prefill_head_indices", head_indices).reshape(-1)
    _check_length("prefill_head_indices", rows, len(last))
    _check_range("prefill_head_indices", rows, 0, total)
    return rows.astype(np.int32)


def _visible(spec_mask: Any, total: int) -> np.ndarray:
    """[T, C] bool from MindIE's additive mask: 0 where a token may look, a large negative number elsewhere.

    lookahead casts its mask to the runner's dtype, and MindSpore's bfloat16 for numpy is neither of kind "f" nor
    ml_dtypes' own.
    """
    mask = np.asarray(spec_mask.asnumpy() if hasattr(spec_mask, "asnumpy") else spec_mask)
    if mask.ndim != 2 or len(mask) != total or not (mask.dtype.kind == "f" or mask.dtype.name == "bfloat16"):
        raise InputError(
            "has the wrong shape or dtype",
            where="spec_mask",
            expected=f"a float matrix [{total}, context]",
            found=f"{mask.dtype} {list(mask.shape)}",
        )
    return mask.astype(np.float32) > -1


def _integers(name: str, value: Any) -> np.ndarray:
    array = np.asarray(value.asnumpy() if hasattr(value, "asnumpy") else value)
    if array.dtype.kind not in "iu":
        raise InputError("must hold integers", where=name, expected="int32 or int64", found=array.dtype)
    return array


def _check_length(name: str, array: np.ndarray, expected: int) -> None:
    if len(array) != expected:
        raise InputError("has the wrong length", where=name, expected=expected, found=len(array))


def _check_range(name: str, array: np.ndarray, low: int, high: int) -> None:
    if array.size and not (low <= array.min() and array.max() < high):
        odd = array[(array < low) | (array >= high)].flat[0]
        raise InputError("holds a value out of range", where=name, expected=f"{low} to {high - 1}", found=int(odd))


def _check_tables(tables: np.ndarray, context_lens: np.ndarray, block_size: int) -> None:
    needed = -(-context_lens // block_size)
    if needed.max() > tables.shape[1]:
        raise InputError(
            "has too few blocks for the context",
            where="block_tables",
            expected=int(needed.max()),
            found=tables.shape[1],
        )
    used = np.arange(tables.shape[1]) < needed[:, None]
    if (tables[used] < 0).any():
        raise InputError("has no block where the context needs one", where="block_tables")
