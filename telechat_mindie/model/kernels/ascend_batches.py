"""Batches as the Ascend graphs need them: the mask of drafts, and the batch that has a graph compiled."""

from __future__ import annotations

import numpy as np

from telechat_mindie.errors import InputError
from telechat_mindie.model.batch import RaggedBatch
from telechat_mindie.model.kernels.ascend_graphs import DECODE, DRAFTS

BLOCKED = -10000.0
"""Added to a score that a token may not see; within float16."""


def first_batch(kind: str) -> RaggedBatch:
    """The smallest batch for a graph with history, of one sequence that writes nothing and reads block 0: it is there
    to have the graph compiled."""
    new = 1 if kind == DECODE else 2
    context = new + 1
    beside = np.array([[1, 1, 0], [1, 0, 1]], bool)  # two drafts for one place
    return RaggedBatch(
        token_ids=np.zeros(new, np.int32),
        positions=np.arange(1, context, dtype=np.int32),
        slots=np.full(new, -1, np.int32),
        query_lens=np.array([new], np.int32),
        context_lens=np.array([context], np.int32),
        block_tables=np.zeros((1, 1), np.int32),
        logits_rows=np.zeros(1, np.int32),
        mask=beside if kind == DRAFTS else None,
    )


def draft_mask(batch: RaggedBatch) -> np.ndarray | None:
    """[T, C] float32 with C the longest context: 0 where a token may look, else BLOCKED.

    None where the batch's mask says no more than that each token sees what comes before it.

    Raises:
        InputError: with one new token a sequence the kernel looks at no mask, and this one hides something.
    """
    assert batch.mask is not None
    position = np.arange(batch.context_lens.max())
    visible = np.zeros((len(batch.token_ids), len(position)), bool)
    given = batch.mask[:, : len(position)]
    visible[:, : given.shape[1]] = given
    visible &= position < np.repeat(batch.context_lens, batch.query_lens)[:, None]
    # Tokens of the same sequence from this one on, itself included.
    after = np.repeat(batch.query_starts + batch.query_lens, batch.query_lens) - np.arange(len(visible))
    ends = np.repeat(batch.context_lens, batch.query_lens) - after + 1
    if (visible == (position < ends[:, None])).all():
        return None
    # ragged_batch passes no mask where every sequence has one new token, so no call of MindIE's comes here.
    if batch.query_lens.max() == 1:
        raise InputError("hides context from a sequence with one new token", where="spec_mask")
    return np.where(visible, np.float32(0), np.float32(BLOCKED))
