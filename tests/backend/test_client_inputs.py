"""Nothing that a client can send makes `forward` raise: MindIE would end the whole service."""

from __future__ import annotations

import logging

import mindspore as ms
import numpy as np
import pytest
from helpers.mindie_batching import Batching, Request
from helpers.scenario import BLOCK, NUM_BLOCKS, Model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from telechat_mindie.backend import inputs
from telechat_mindie.config import TelechatConfig
from telechat_mindie.errors import InputError
from telechat_mindie.model.kernels.ascend import AscendKernels
from telechat_mindie.model.kernels.ascend_graphs import DECODE, PLUGIN_GRAPHS, PREFILL, AscendCache
from telechat_mindie.model.rope import RotaryTable

VOCAB, LONGEST = 512, 64
PLUGINS = ([], ["prefix_cache"], ["splitfuse"], ["la"], ["memory_decoding"], ["prefix_cache", "memory_decoding"])
INT64 = st.integers(-(2**63), 2**63 - 1)
ODD_IDS = st.one_of(st.sampled_from([-1, -5, VOCAB, VOCAB + 1, 2**31, 2**32 + 5, 2**63 - 1, -(2**63)]), INT64)
IDS = st.one_of(st.integers(0, 5), st.integers(0, VOCAB - 1), ODD_IDS)
PROMPTS = st.one_of(
    st.lists(IDS, max_size=LONGEST + 8),
    st.builds(lambda ids, times: ids * times, st.lists(IDS, min_size=1, max_size=3), st.integers(8, 24)),  # over blocks
)
REQUESTS = st.builds(
    Request, ids=PROMPTS, max_tokens=st.integers(1, 90), adapter=st.sampled_from([None, "", "telechat2", "../../etc"])
)


@pytest.fixture(scope="module", params=["own", "external"])
def model(request, tmp_path_factory):
    return Model(tmp_path_factory.mktemp(request.param), {}, external=request.param == "external")


@pytest.fixture(autouse=True)
def nothing_mentioned_yet():
    inputs.mention.cache_clear()


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    requests=st.lists(REQUESTS, min_size=1, max_size=6),
    plugins=st.sampled_from(PLUGINS),
    knows_vocabulary=st.booleans(),
    max_seq_len=st.sampled_from([LONGEST // 2, LONGEST, LONGEST + 16]),
    spare=st.sampled_from([1, Batching.DRAFTS]),
    twice=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_whatever_clients_send_is_answered(model, requests, plugins, knows_vocabulary, max_seq_len, spare, twice, seed):
    rng = np.random.default_rng(seed)
    service = Batching(
        model.runner,
        BLOCK,
        NUM_BLOCKS,
        rng,
        vocab_size=VOCAB if knows_vocabulary else 0,
        max_seq_len=max_seq_len,
        plugins=plugins,
        spare=spare,
        caches=model.caches,
    )
    if twice:  # the same prompts again: hits, of whole prompts too
        requests = requests + [Request(list(r.ids), r.max_tokens, r.adapter) for r in requests]
    drive(service, requests, rng)


def drive(service, requests, rng):
    """Serve the requests to their end, or until the pool is full."""
    for request in requests:
        service.submit(request)
    for _ in range(40):
        answer = service.step(simulate=bool(rng.integers(4) == 0))
        if answer is None:
            break
        logits, rows = answer
        assert logits.shape == (rows, VOCAB) and np.isfinite(logits).all()


class AscendHost:
    """What an NPU's runner does before its graph: the batch, the kernels' call, and the graph that it is for."""

    def __init__(self, plugins):
        config = TelechatConfig(VOCAB, 64, 1, 4, 96, num_kv_heads=2)
        cache = AscendCache(1, NUM_BLOCKS, BLOCK, config.num_kv_heads, config.head_dim, "float16", on_device=False)
        self.kernels = AscendKernels(config, 1, cache, RotaryTable.of(config), max_seq_len=LONGEST)
        self.limits = inputs.BatchLimits(VOCAB, NUM_BLOCKS, BLOCK, LONGEST)
        self.graphs = {PREFILL, DECODE, *(graph for name in plugins for graph in PLUGIN_GRAPHS[name])}

    def forward(self, input_ids, adapter_ids=None, key_cache=None, value_cache=None, **arguments):
        inputs.ignore_adapters(adapter_ids)
        batch = inputs.ragged_batch(self.limits, input_ids=input_ids, **arguments)
        (call,) = self.kernels.calls(batch)
        assert call.kind in self.graphs  # which the first prompt has compiled
        if call.kind != PREFILL:
            for table, context in zip(batch.block_tables, batch.context_lens, strict=True):
                assert (table[: -(-context // BLOCK)] >= 0).all()
        return ms.Tensor(np.zeros((len(batch.logits_rows), VOCAB), np.float32))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    requests=st.lists(REQUESTS, min_size=1, max_size=6),
    plugins=st.sampled_from(PLUGINS),
    max_seq_len=st.sampled_from([LONGEST // 2, LONGEST, LONGEST + 16]),
    spare=st.sampled_from([1, Batching.DRAFTS]),
    seed=st.integers(0, 2**32 - 1),
)
def test_an_npu_gets_calls_of_the_graphs_that_it_has(requests, plugins, max_seq_len, spare, seed):
    rng = np.random.default_rng(seed)
    options = {"vocab_size": VOCAB, "max_seq_len": max_seq_len, "plugins": plugins, "spare": spare}
    drive(Batching(AscendHost(plugins), BLOCK, NUM_BLOCKS, rng, **options), requests, rng)


@pytest.mark.parametrize("odd", [-1, -5, VOCAB, 2**32 + 7, 2**63 - 1, -(2**63)])
def test_ids_outside_the_vocabulary_are_the_unknown_token(model, caplog, odd):
    driver = model.driver
    table, other = driver.table(32), driver.table(32)
    ids = np.array([7, 0, 9, 11], np.int64)
    strange = ids.copy()
    strange[1] = odd
    with caplog.at_level(logging.WARNING):
        found = [driver.prefill([prompt, ids[::-1]], [table, other], **model.caches) for prompt in (ids, strange)]
        decoded = [driver.decode([token], [4], [table], **model.caches) for token in (0, odd, odd)]
    np.testing.assert_array_equal(*found)
    np.testing.assert_array_equal(decoded[0], decoded[1])
    assert len([record for record in caplog.records if "unknown token" in record.message]) == 1
    driver.release(table)
    driver.release(other)


def test_adapters_are_ignored_and_mentioned_once(model, caplog):
    driver = model.driver
    table = driver.table(16)
    plain = driver.prefill([np.arange(5, 15)], [table], **model.caches)
    with caplog.at_level(logging.WARNING):
        for name in ("telechat2", "other"):
            found = driver.prefill([np.arange(5, 15)], [table], adapter_ids=[name], **model.caches)
            np.testing.assert_array_equal(found, plain)
    assert len([record for record in caplog.records if "adapter" in record.message]) == 1
    assert "telechat2" not in caplog.text  # a client's words have no place in the log
    driver.release(table)


def test_more_tokens_than_the_directory_is_built_for(model, caplog):
    """MindIE with a maxSeqLen above the model's, which it only warns of; positions stay within the rotary tables."""
    driver = model.driver
    table = driver.table(LONGEST + 20)
    with caplog.at_level(logging.WARNING):
        driver.prefill([np.arange(LONGEST + 4) % VOCAB], [table], **model.caches)
        logits = driver.decode([7], [LONGEST + 4], [table], **model.caches)
    assert np.isfinite(logits).all()
    assert len([record for record in caplog.records if "maxSeqLen" in record.message]) == 1
    driver.release(table)


def test_positions_beyond_and_before_the_sequence():
    limits = inputs.BatchLimits(VOCAB, NUM_BLOCKS, BLOCK, LONGEST)
    common = {
        "input_ids": np.array([5, 6]),
        "valid_length_each_example": np.array([2**31 - 1, 0]),
        "block_tables": np.zeros((2, 1), np.int32),
        "slot_mapping": np.array([-1, -1]),
        "prefill": False,
        "position_ids": np.array([2**40, -3]),
    }
    with pytest.raises(InputError, match="block_tables"):  # a table that MindIE itself could not have used
        inputs.ragged_batch(limits, **common)
    common["valid_length_each_example"] = np.array([1, 0])
    batch = inputs.ragged_batch(limits, **common)
    assert batch.positions.tolist() == [LONGEST - 1, 0] and batch.context_lens.tolist() == [1, 1]


def test_drafts_without_a_block_live_in_the_last_one():
    """MindIE's two ways of counting from a block that a table lacks: lookahead's slots and memory_decoding's."""
    limits = inputs.BatchLimits(VOCAB, NUM_BLOCKS, BLOCK, LONGEST)
    end = NUM_BLOCKS * BLOCK
    for beyond in ([end - BLOCK, end - BLOCK + 1], [-BLOCK, -BLOCK + 1]):
        batch = inputs.ragged_batch(
            limits,
            input_ids=np.array([5, 6, 7]),
            valid_length_each_example=np.array([BLOCK + 2]),
            block_tables=np.array([[4, -1]]),
            slot_mapping=np.array([5 * BLOCK - 1, *beyond]),
            prefill=False,
            position_ids=np.array([BLOCK - 1, BLOCK, BLOCK + 1]),
            spec_mask=np.zeros((3, BLOCK + 2)),
            q_seq_lens=[3],
        )
        assert batch.slots.tolist() == [5 * BLOCK - 1, end - BLOCK, end - BLOCK + 1]
        assert batch.block_tables.tolist() == [[4, NUM_BLOCKS - 1]]


def test_a_mask_is_read_for_drafts_alone():
    limits = inputs.BatchLimits(VOCAB, NUM_BLOCKS, BLOCK, LONGEST)
    common = {
        "input_ids": np.array([5, 6]),
        "block_tables": np.array([[4], [5]]),
        "slot_mapping": np.array([64, 80]),
        "prefill": False,
        "spec_mask": np.zeros((2, 4)),
    }
    alone = inputs.ragged_batch(limits, valid_length_each_example=np.array([1, 1]), q_seq_lens=[1, 1], **common)
    assert alone.mask is None
    common["block_tables"] = common["block_tables"][:1]
    drafted = inputs.ragged_batch(limits, valid_length_each_example=np.array([2]), q_seq_lens=[2], **common)
    assert drafted.mask.shape == (2, 4) and drafted.mask.all()
    common["spec_mask"] = np.zeros((3, 4))
    with pytest.raises(InputError, match="spec_mask"):
        inputs.ragged_batch(limits, valid_length_each_example=np.array([2]), q_seq_lens=[2], **common)


def test_prompts_end_where_mindie_says(model):
    """Where only the local cache knows of hits, MindIE passes the whole prompts, ones as their lengths and no mask."""
    driver = model.driver
    prompts = [np.arange(5, 5 + BLOCK + 4), np.arange(40, 47)]
    tables = [driver.table(32), driver.table(16)]
    plain = driver.prefill(prompts, tables, **model.caches)
    odd = driver.prefill(prompts, tables, q_seq_lens=[1, 1], spec_mask=[[0], [0]], **model.caches)
    np.testing.assert_array_equal(odd, plain)
    for table in tables:
        driver.release(table)
