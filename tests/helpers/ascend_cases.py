"""Decoders over the Ascend kernels in every size, and the kinds of batches that MindIE sends them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from telechat_mindie.dtypes import HALF_DTYPES
from telechat_mindie.model.batch import RaggedBatch
from telechat_mindie.model.decoder import TelechatForCausalLM
from telechat_mindie.model.export import rank_decoder
from telechat_mindie.model.kernels.ascend_batches import first_batch
from telechat_mindie.model.kernels.ascend_graphs import GRAPHS, PREFILL
from telechat_mindie.model.rope import RotaryTable
from telechat_mindie.model_dir.serving import LAYER_FORMS
from telechat_mindie.variants import VARIANTS

BLOCK = 128
NUM_BLOCKS = 1024
TRAINED = 8192


def batch(queries: Sequence[int], contexts: Sequence[int], *, block: int = BLOCK, tree: bool = False) -> RaggedBatch:
    """Sequences that bring `queries` new tokens to contexts of `contexts`; with `tree` the new ones are drafts."""
    query_lens, context_lens = np.array(queries, np.int32), np.array(contexts, np.int32)
    width = int(-(-context_lens.max() // block))
    tables = (np.arange(len(queries) * width) % NUM_BLOCKS).reshape(len(queries), width).astype(np.int32)
    positions = np.concatenate([np.arange(c - q, c) for q, c in zip(queries, contexts, strict=True)]).astype(np.int32)
    sequence = np.repeat(np.arange(len(queries)), queries)
    decodes = query_lens.max() == 1
    last = np.cumsum(query_lens) - 1
    mask = None
    if tree:  # no draft sees another
        mask = np.arange(context_lens.max()) < np.repeat(context_lens - query_lens, query_lens)[:, None]
        mask[np.arange(len(positions)), positions] = True
    return RaggedBatch(
        token_ids=np.zeros(len(positions), np.int32),
        positions=positions,
        slots=(tables[sequence, positions // block] * block + positions % block).astype(np.int32),
        query_lens=query_lens,
        context_lens=context_lens,
        block_tables=tables,
        logits_rows=(np.arange(len(positions)) if decodes or tree else last).astype(np.int32),
        mask=mask,
    )


BATCHES = {
    "prefill of one token": batch([1], [1]),
    "prefill": batch([1000, 7, 2000], [1000, 7, 2000]),
    "prefill of 8,192": batch([8192], [8192]),
    "decode": batch([1], [9]),
    "decode of 32": batch([1] * 32, [*range(100, 132)]),
    "decode of 200": batch([1] * 200, [*range(300, 500)]),
    "decode at 32,768": batch([1, 1], [32768, 5]),
    "dummy": dataclasses.replace(batch([1], [1]), slots=np.array([-1], np.int32)),
    **{f"the first of {kind}": first_batch(kind) for kind in GRAPHS if kind != PREFILL},
    "chunk": batch([2048], [32768]),
    "decodes and a chunk": batch([1] * 100 + [512], [*range(700, 800), 1024]),
    "prefix hit": batch([2048], [8192]),
    "prefix hit beside a prompt": batch([3, 5], [131, 5]),
    "drafts": batch([4, 1, 4], [300, 13, 4096], tree=True),
}
"""What MindIE's scheduler makes, by what is odd in it."""


def sizes() -> Iterator[tuple[str, int, str, str]]:
    """(variant, tensor parallel size, dtype, form of the layers): all that can be served."""
    for variant, config in VARIANTS.items():
        yield from itertools.product((variant,), config.allowed_tp(), HALF_DTYPES, LAYER_FORMS)


def decoder(
    variant: str,
    tp: int,
    dtype: str,
    layer_form: str,
    *,
    block: int = BLOCK,
    longest: int = TRAINED,
    rotary_dtype: str = "float32",
) -> TelechatForCausalLM:
    """One layer of rank 0, without data, with rotary tables for sequences of `longest` tokens; by default in the dtype
    that `build` writes into the yaml."""
    config = dataclasses.replace(VARIANTS[variant], num_layers=1)
    rotary = RotaryTable.of(config, rotary_dtype=rotary_dtype)
    options: dict[str, Any] = {"rotary": rotary, "max_seq_len": longest, "layer_form": layer_form}
    return rank_decoder(config, tp, dtype, NUM_BLOCKS, block, **options)
