"""Every mode of MindIE's contract, mixed at random, against a plain recompute of the same tokens."""

from __future__ import annotations

import ctypes
import functools

import mindspore as ms
import numpy as np
import pytest
from helpers.checkpoints import MOE
from helpers.mindie_calls import Draft, MindIECalls, Sequence_
from helpers.scenario import BLOCK, MASK_DTYPES, NUM_BLOCKS, TOLERANCE, Model, Scenario
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from telechat_mindie.backend.plugins import parse_plugin_params
from telechat_mindie.dtypes import DTYPES
from telechat_mindie.errors import InputError

MODELS = {
    "mha": {"num_key_value_heads": 8},
    "gqa": {},
    "moe": MOE,
    "ntk": {"training_seqlen": 32, "base_seqlen": 16, "seq_length": 32, "rope_theta": 500000},
}
SPECULATIVE = ("memory_decoding", "lookahead")
MODES = ("prefill", "decode", "splitfuse", "prefix_hit", "swap", *SPECULATIVE)


@pytest.fixture(scope="module", params=["native", "mindspore"])
def kernels(request):
    from telechat_mindie.model.kernels.native_build import NativeUnavailable, library

    if request.param == "native":
        try:
            library()
        except NativeUnavailable as error:
            pytest.skip(f"no native kernels on this machine: {error}")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("TELECHAT_CPU_KERNELS", request.param)
        yield request.param


@pytest.fixture(scope="module")
def models(kernels, tmp_path_factory):
    """Name -> the model on these kernels, with a cache of its own."""
    return functools.cache(lambda name: Model(tmp_path_factory.mktemp(name), MODELS[name]))


@pytest.fixture(scope="module", params=MODELS)
def any_model(request, models):
    return models(request.param)


@pytest.fixture(scope="module")
def own(models):
    return models("gqa")


@pytest.fixture(scope="module")
def external(kernels, tmp_path_factory):
    """With npu_mem_size -1: every call brings the caches."""
    return Model(tmp_path_factory.mktemp("external"), {}, external=True)


@pytest.fixture(params=["own", "external"])
def model(request, own, external):
    return own if request.param == "own" else external


@pytest.fixture
def scenario(external):
    made = Scenario(external, 7, chunk=(2, 5))
    made.prefill()
    yield made
    made.close()


@pytest.mark.slow
@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_mix_of_modes(any_model, data):
    """With dynamic NTK beyond the trained length too, but without drafts: L would count those that none keeps."""
    extended = any_model.config.training_seqlen < 64
    modes = st.sampled_from(MODES[: -len(SPECULATIVE)] if extended else MODES)
    scenario = Scenario(any_model, data.draw(st.integers(0, 2**32 - 1)))
    try:
        for mode in data.draw(st.lists(modes, min_size=8, max_size=16)):
            scenario.step(mode)
    finally:
        scenario.close()


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "swap"])
def test_each_mode_over_the_caches_of_mindie(scenario, mode):
    for step in (mode, mode, "decode"):
        scenario.step(step)


def test_the_caches_of_mindie_are_not_the_runners_to_swap(external):
    with pytest.raises(InputError, match="device block"):
        external.runner.swap(np.array([[0, 0]]), True)


@pytest.mark.parametrize(("dtype", "held"), [("float32", "float32"), ("float16", "float16"), ("bfloat16", "int16")])
def test_rows_are_the_memory_of_mindies_caches(dtype, held):
    from telechat_mindie.backend.caches import as_rows
    from telechat_mindie.model.kv_cache import address_of

    keys, values = (ms.Tensor.from_numpy(np.zeros((3, 4, 2, 8), DTYPES[dtype].numpy)) for _ in range(2))
    (key_rows,), (value_rows,) = as_rows([keys], [values], 16, np.dtype(held))
    assert key_rows.shape == value_rows.shape == (12, 16)
    assert key_rows.dtype == value_rows.dtype == getattr(ms, held)
    ctypes.memset(address_of(value_rows), 0xFF, value_rows.nbytes // 12)  # a row
    found = values.asnumpy().astype(np.float32).reshape(12, 16)
    assert np.isnan(found[0]).all() and not found[1:].any() and not keys.asnumpy().astype(np.float32).any()


@pytest.mark.parametrize("shape", [(), (5,), (5, BLOCK), (5, BLOCK, 32, 1, 1)])
def test_caches_of_another_rank(shape):
    from telechat_mindie.backend.caches import external_caches

    caches = [ms.ops.zeros(shape, ms.float32)]
    if len(shape) == 5:
        assert external_caches(caches, caches, (1, BLOCK, 32), "float32")[2] == 5
    else:
        with pytest.raises(InputError, match=r"key_cache\[0\]: has the wrong shape"):
            external_caches(caches, caches, (1, BLOCK, 32), "float32")


def forward(model, **changes):
    """A prefill of 20 and 12 tokens of id 1, as MindIE warms up: every block 0, one slot written."""
    lengths = np.array([20, 12], np.int32)
    arguments = {
        "input_ids": np.ones(32, np.int64),
        "valid_length_each_example": lengths,
        "block_tables": np.zeros((2, 2), np.int32),
        "slot_mapping": np.array([0] + [-1] * 31, np.int32),
        "prefill": True,
        "position_ids": np.concatenate([np.arange(20), np.arange(12)]).astype(np.int32),
        "adapter_ids": [None, None],
        "prefill_head_indices": np.cumsum(lengths, dtype=np.int64) - 1,
        "spec_mask": None,
        "q_seq_lens": None,
    }
    return model.driver.forward(**(arguments | model.caches | changes))


def test_warm_up(model):
    """Without history attention is over the call's own tokens, so even these logits are the right ones."""
    wanted = model.logits(np.ones(20, int))[[19, 11]]
    if model.caches:  # MindIE's first call brings one block, to see what is left of the memory
        np.testing.assert_allclose(forward(model, **model.external_caches(1)), wanted, atol=TOLERANCE)
    np.testing.assert_allclose(forward(model), wanted, atol=TOLERANCE)
    # With splitfuse the first token of every prompt goes to slot 0 (tg_infer_context_store.py).
    both = {"slot_mapping": np.array([0] + [-1] * 19 + [0] + [-1] * 11), "q_seq_lens": [20, 12], "adapter_ids": None}
    np.testing.assert_allclose(forward(model, **both), wanted, atol=TOLERANCE)


def test_warm_up_of_the_prefix_cache(model):
    """The first prompt hits one block, and its other tokens go to block 0 as well: the second prompt's row is right,
    the first one's only finite."""
    rows = forward(
        model,
        input_ids=np.ones(16, np.int64),
        valid_length_each_example=np.array([20, 12], np.int32),
        slot_mapping=np.array([*range(4), *range(12)]),
        position_ids=np.array([*range(16, 20), *range(12)]),
        prefill_head_indices=np.array([3, 15]),
        q_seq_lens=[4, 12],
        spec_mask=np.zeros((16, 20)),
    )
    assert np.isfinite(rows).all()
    np.testing.assert_allclose(rows[1], model.logits(np.ones(12, int))[-1], atol=TOLERANCE)


@pytest.mark.parametrize("prefill", [True, False])
def test_a_dummy_batch_on_the_last_block_disturbs_nobody(scenario, prefill):
    """Token 30 on the block that no request gets: written where it is a prefill, nowhere where it is simulated."""
    model = scenario.model
    for _ in range(2):
        rows = forward(
            model,
            input_ids=np.array([30]),
            valid_length_each_example=np.array([1], np.int32),
            block_tables=np.array([[NUM_BLOCKS - 1, -1, -1]]),
            slot_mapping=np.array([(NUM_BLOCKS - 1) * BLOCK if prefill else -1], np.int32),
            prefill=prefill,
            position_ids=np.array([0], np.int32),
            adapter_ids=[None],
            prefill_head_indices=np.array([0]) if prefill else None,
        )
        assert np.isfinite(rows).all()
        scenario.decode()


def test_the_model_config_is_overwritten_as_mindie_does(scenario):
    runner = scenario.model.runner
    for key, value in {"block_size": 128, "top_k": 1000, "eos_token_id": [[2]], "rank": 1, "world_size": 4}.items():
        setattr(runner.model_config, key, value)
    scenario.decode()
    np.testing.assert_array_equal(runner.generate_position_ids(np.array([9, 9, 9])), [0, 1, 2])


@pytest.mark.parametrize("plugin", SPECULATIVE)
def test_drafts_may_reach_beyond_the_longest_sequence(model, plugin):
    """MindIE ends a request at maxSeqLen by the tokens that it keeps, so the last calls' drafts lie beyond it."""
    longest = model.runner.model_config.max_position_embedding
    rng = np.random.default_rng(5)
    sequence = Sequence_(rng.integers(0, 512, longest + 5), model.driver.table(longest + 5))
    calls = MindIECalls(model.driver, rng, **model.caches)
    calls.prefill([sequence], [longest - 1])
    sequence.done = longest - 1
    if plugin == "memory_decoding":
        found = calls.memory_decoding([sequence], [5])
    else:
        found = calls.lookahead([sequence], [Draft(sequence.ids[longest - 1 :][:5], range(-1, 4))], MASK_DTYPES[0])
    np.testing.assert_allclose(found, model.logits(sequence.ids)[longest - 1 : longest + 4], atol=TOLERANCE)
    model.driver.release(sequence.table)


def computed(model, sequences, cuts):
    """The sequences from nothing, the i-th in calls that end at cuts[i]; in one call whatever comes at the same turn.
    Gives each one's last logits."""
    calls = MindIECalls(model.driver, np.random.default_rng(0), **model.caches)
    last = [None] * len(sequences)
    for turn in range(max(map(len, cuts))):
        there = [i for i, ends in enumerate(cuts) if turn < len(ends)]
        lengths = [cuts[i][turn] - sequences[i].done for i in there]
        rows = calls.splitfuse([sequences[i] for i in there], lengths)
        for i, row in zip(there, rows, strict=True):
            last[i], sequences[i].done = row, cuts[i][turn]
    for sequence in sequences:
        model.driver.release(sequence.table)
    return np.array(last)


@pytest.mark.slow
def test_dynamic_ntk_depends_on_where_calls_end_and_on_nothing_else(kernels, tmp_path):
    """L is a sequence's context when the call ends, but at least the trained length, and a key keeps the rotation of
    the call that wrote it. So up to the trained length (32) any chunks give what token by token gives. Beyond, equal
    ends give equal logits, whoever shares the calls and wherever the blocks lie; other ends give other logits."""
    model = Model(tmp_path, MODELS["ntk"], block_size=128, max_seq_len=256)
    ids = np.random.default_rng(1).integers(0, 512, (3, 72))

    def logits(*rows_and_ends):
        fresh = [Sequence_(ids[row][: ends[-1]], model.driver.table(ends[-1])) for row, ends in rows_and_ends]
        return computed(model, fresh, [ends for _, ends in rows_and_ends])

    single = [*range(1, 33)]
    for ends in ([32], [8, 24, 32]):
        np.testing.assert_allclose(logits((0, ends)), logits((0, single)), atol=TOLERANCE)
    single += range(33, 73)
    chunks = [24, 40, 41, 72]
    alone = np.concatenate([logits((0, chunks)), logits((1, single))])
    together = logits((2, [20, 40, 70, 71]), (0, chunks), (1, single))
    np.testing.assert_allclose(together[1:], alone, atol=TOLERANCE)
    for row, ends in ((0, chunks), (1, single)):
        starts = np.concatenate([[0], ends[:-1]])
        wanted = model.logits(ids[row], np.repeat(ends, ends - starts))[-1]
        np.testing.assert_allclose(alone[row], wanted, atol=TOLERANCE)
    assert np.abs(logits((0, single)) - alone[0]).max() > 10 * TOLERANCE


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "not valid JSON"),
        ("[]", "no JSON object"),
        ("x" * 1025, "1024"),
        ('{"plugin_type": "mtp"}', "plugin_type"),
        ('{"plugin_type": "la", "level": 2, "window": 1, "guess_set_size": 1}', "level"),
        ('{"plugin_type": "la"}', "level"),
        ('{"plugin_type": "memory_decoding", "decoding_length": 0}', "decoding_length"),
        ('{"plugin_type": 3}', "plugin_type"),
    ],
)
def test_plugin_params_are_refused(text, problem):
    with pytest.raises(InputError, match=problem):
        parse_plugin_params(text)


def test_plugin_params():
    assert parse_plugin_params(None) == {} == parse_plugin_params('{"plugin_type": null}')
    both = '{"plugin_type": "prefix_cache,la", "level": 4, "window": 5, "guess_set_size": 5}'
    assert parse_plugin_params(both)["level"] == 4
