"""MindIE's numpy arguments read as one ragged batch: T new tokens of B sequences.

MindIE ends its whole service where `forward` raises (plugins/plugin_manager.py:236-245), so nothing that a client
chooses is refused here: such values are mended, and the log says so once. What still raises is a fault of MindIE
itself, or of whoever else calls; each place says why no request leads there. Shapes and dtypes are those that
MindIE-LLM v3.0.0.beta.2 delivers (mf_model_wrapper.py, plugin_manager.py): flat or in the legacy shapes (1, T) and
(B, 1), int32 or int64. Its paths are given below mindie_llm/text_generator where they do not begin with src.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from telechat_mindie.errors import InputError
from telechat_mindie.model.batch import RaggedBatch
from telechat_mindie.text.vocabulary import UNKNOWN_ID

_log = logging.getLogger(__name__)

NO_SLOT = -1
"""A token with this slot is computed, but its key and value are not kept."""


@dataclass(frozen=True)
class BatchLimits:
    """What a batch may ask for."""

    vocab_size: int
    num_blocks: int
    block_size: int
    max_seq_len: int
    scratch_row: int | None = None  # see RaggedBatch


@cache
def mention(message: str) -> None:
    """Warn of something that was mended, the first time in this process. Only of fixed texts: each is remembered."""
    _log.warning(message)


def ignore_adapters(adapter_ids: Sequence[str | None] | None) -> None:
    """Answer a request that names an adapter as if it named none.

    Any client can name one: `model` of vLLM's /generate and TGI's `parameters.adapter_id` are passed on unchecked
    (src/server/endpoint/single_req_infer_interface/single_req_vllm_infer_interface.cpp:39-58).
    """
    if adapter_ids is not None and any(adapter is not None for adapter in adapter_ids):
        mention("a request names a LoRA adapter; it is answered by the model alone, and so are all such requests")


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
        InputError: a wrong dtype or shape, a block or slot out of range, or lengths that do not fit together.
    """
    token_ids = _integers("input_ids", input_ids).reshape(-1)
    context_lens = _integers("valid_length_each_example", valid_length_each_example).reshape(-1)
    slots = _integers("slot_mapping", slot_mapping).reshape(-1)
    tables = _integers("block_tables", block_tables)
    total, count = len(token_ids), len(context_lens)
    # These lengths are MindIE's own: its lists are as long as its batch, whoever is in it, and it runs no empty one.
    if not count:
        raise InputError("is empty", where="valid_length_each_example")
    query_lens = _query_lens(prefill, prefill_head_indices, q_seq_lens, context_lens, total)
    _check_length("slot_mapping", slots, total)
    if tables.ndim != 2 or len(tables) != count:
        raise InputError(
            "has the wrong shape", where="block_tables", expected=f"[{count}, blocks]", found=list(tables.shape)
        )
    # Ids of blocks are the scheduler's, out of as many as this runner said it has; a request cannot name one.
    _check_below("block_tables", tables, limits.num_blocks)
    _check_below("slot_mapping", slots, limits.num_blocks * limits.block_size)
    # A simulated request that is not the batch's first has context 0 (plugins/plugin_manager.py:481-486 mends the
    # first alone).
    context_lens = np.maximum(context_lens, query_lens)
    # Drafts may reach beyond the longest sequence: MindIE ends a request by the tokens that it keeps, after the call
    # (la and memory_decoding clip no draft by maxSeqLen), and it has blocks for them.
    drafts = np.zeros_like(query_lens) if prefill else query_lens - 1
    if (context_lens - drafts > limits.max_seq_len).any():
        mention(
            f"sequences grow beyond the {limits.max_seq_len} tokens that this directory is built for, where answers "
            "lose their sense: lower maxSeqLen in MindIE's config, or build with a larger --max-seq-len"
        )
    starts = np.cumsum(query_lens) - query_lens
    last = starts + query_lens - 1
    if position_ids is None:
        positions = np.arange(total) - np.repeat(starts - (context_lens - query_lens), query_lens)
    else:
        positions = _integers("position_ids", position_ids).reshape(-1)
        _check_length("position_ids", positions, total)  # MindIE's, as above
    return RaggedBatch(
        token_ids=_known_ids(token_ids, limits.vocab_size),
        # MindIE only warns of a maxSeqLen above the model's (mindie_llm/connector/request_router/router_impl.py:193).
        positions=positions.clip(0, limits.max_seq_len - 1 + drafts.max()).astype(np.int32),
        slots=_writable(slots, limits).astype(np.int32),
        query_lens=query_lens.astype(np.int32),
        context_lens=context_lens.astype(np.int32),
        # Only a context with history is read through its block table.
        block_tables=_readable(tables, np.where(context_lens > query_lens, context_lens, 0), limits).astype(np.int32),
        logits_rows=(last if prefill else np.arange(total)).astype(np.int32),
        # A mask matters for drafts that form a tree. After a prefix hit it says what causality says anyway, and so it
        # does where every sequence has one new token.
        mask=None if spec_mask is None or prefill or total == count else _visible(spec_mask, total),
        scratch_row=limits.scratch_row,
    )


def _known_ids(token_ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """[T] int32, with the unknown token where there is no such id.

    Clients send ids: /v1/completions and Triton's /infer let negative ones through, and MindIE's C++ refuses large ones
    by config.json's vocab_size alone (src/llm_manager_v2/impl/llm_manager_impl.cpp:1500-1513).
    """
    known = (token_ids >= 0) & (token_ids < vocab_size)
    if not known.all():
        mention("a prompt holds token ids that the vocabulary does not; they are read as the unknown token")
        token_ids = np.where(known, token_ids, UNKNOWN_ID)
    return token_ids.astype(np.int32)


def _query_lens(
    prefill: bool,
    head_indices: np.ndarray | None,
    q_seq_lens: Sequence[int] | np.ndarray | None,
    context_lens: np.ndarray,
    total: int,
) -> np.ndarray:
    """[B] new tokens of each sequence.

    In prefill MindIE says it by where each prompt ends. What its plug-ins say beside that is not always of this call:
    for hits that only the local cache knows it is a list of ones (prefix_cache/prefix_cache_plugin.py:180-181).
    """
    if prefill and head_indices is not None:
        heads = _integers("prefill_head_indices", head_indices).reshape(-1)
        _check_length("prefill_head_indices", heads, len(context_lens))  # MindIE's, as above
        name, lens = "prefill_head_indices", np.diff(heads, prepend=-1)
    elif q_seq_lens is not None:
        name, lens = "q_seq_lens", _integers("q_seq_lens", q_seq_lens).reshape(-1)
        _check_length("q_seq_lens", lens, len(context_lens))  # MindIE's, as above
    else:
        name, lens = "valid_length_each_example", context_lens if prefill else np.ones_like(context_lens)
    # MindIE's server refuses empty prompts in every format (single_req_*_infer_interface.cpp, "must be in (0, "),
    # computes the last block of a prompt that is cached as a whole (prefix_cache/prefix_cache_preprocess.py:85-87), and
    # begins drafts with the last token.
    if (lens < 1).any():
        raise InputError("every sequence needs a new token", where=name, found=lens.tolist())
    # Tokens and lengths come out of one loop over the batch there (utils/tg_infer_context_store.py:524-540).
    if lens.sum() != total:
        raise InputError(
            "token count does not fit the sequences' lengths", where="input_ids", expected=int(lens.sum()), found=total
        )
    return lens


def _visible(spec_mask: Any, total: int) -> np.ndarray:
    """[T, C] bool from MindIE's additive mask: 0 where a token may look, a large negative number elsewhere.

    lookahead casts its mask to the runner's dtype, and MindSpore's bfloat16 for numpy is neither of kind "f" nor
    ml_dtypes' own.
    """
    mask = np.asarray(spec_mask.asnumpy() if hasattr(spec_mask, "asnumpy") else spec_mask)
    # The plug-ins make it in the same loop as the drafts (la/decoding_policy.py:554-606,
    # memory_decoding/memory_decoding_plugin.py:71-97), which are as many and as long as the deployment's settings say.
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
    # A request's numbers are integers in MindIE's C++ already, and its arrays have a dtype of their own.
    if array.dtype.kind not in "iu":
        raise InputError("must hold integers", where=name, expected="int32 or int64", found=array.dtype)
    return array


def _check_length(name: str, array: np.ndarray, expected: int) -> None:
    if len(array) != expected:
        raise InputError("has the wrong length", where=name, expected=expected, found=len(array))


def _check_below(name: str, array: np.ndarray, high: int) -> None:
    if array.size and array.max() >= high:
        raise InputError("holds a value out of range", where=name, expected=f"-1 to {high - 1}", found=int(array.max()))


def _writable(slots: np.ndarray, limits: BatchLimits) -> np.ndarray:
    """The slots, those of drafts for which MindIE has no block in the last one; see `_readable`.

    memory_decoding takes block -1 for a number, which makes slots of less than -1 (decoding_policy.py:232-238).
    """
    return np.where(slots < NO_SLOT, slots + limits.num_blocks * limits.block_size, slots).clip(NO_SLOT)


def _readable(tables: np.ndarray, context_lens: np.ndarray, limits: BatchLimits) -> np.ndarray:
    """The tables, with a block wherever the context needs one.

    Where MindIE has no block for the last drafts it indexes its slots with -1, which is the last block, so that is
    where their keys are (la/decoding_policy.py:511-531). No request owns that block.
    """
    needed = -(-context_lens // limits.block_size)
    # MindIE takes the slots of these very tokens from the table, and would have failed on a narrower one
    # (utils/batch_context.py:839-841, la/decoding_policy.py:511-531).
    if needed.max() > tables.shape[1]:
        raise InputError(
            "has too few blocks for the context",
            where="block_tables",
            expected=int(needed.max()),
            found=tables.shape[1],
        )
    missing = (np.arange(tables.shape[1]) < needed[:, None]) & (tables < 0)
    return np.where(missing, limits.num_blocks - 1, tables)
