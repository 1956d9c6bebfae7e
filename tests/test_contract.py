"""Every mode of MindIE's contract, mixed at random, against a plain recompute of the same tokens."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import reference
from helpers.checkpoints import CONFIG, MOE, make_checkpoint
from helpers.driver import Driver
from helpers.mindie_calls import MindIECalls, Sequence_
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from telechat_mindie.backend.plugins import parse_plugin_params
from telechat_mindie.build import BuildOptions, build
from telechat_mindie.config import TelechatConfig
from telechat_mindie.errors import InputError

BLOCK, NUM_BLOCKS, LONGEST, TOLERANCE = 16, 40, 48, 5e-4
MODELS = {"mha": {"num_key_value_heads": 8}, "gqa": {}, "moe": MOE}
MODES = ("prefill", "decode", "splitfuse", "prefix_hit", "la", "memory_decoding", "tree")


class Model:
    """A random model, its runner, and what numpy says of any tokens."""

    def __init__(self, root, kernels, changes, monkeypatch, external=False):
        import mindspore as ms

        from telechat_mindie import ModelRunner

        self.weights = make_checkpoint(root / "ckpt", "float32", **changes)
        self.config = TelechatConfig.from_dict(CONFIG | changes)
        build(root / "model", root / "ckpt", BuildOptions(dtype="float32", block_size=BLOCK))
        monkeypatch.setenv("TELECHAT_CPU_KERNELS", kernels)
        options = {"num_blocks": None if external else NUM_BLOCKS}
        self.runner = ModelRunner(str(root / "model"), -1 if external else 1, 0, BLOCK, **options)
        self.driver = Driver(self.runner, BLOCK, NUM_BLOCKS)
        self.caches = {}
        if external:
            shape = (NUM_BLOCKS, BLOCK, self.config.num_kv_heads, self.config.head_dim)
            sides = [[ms.ops.zeros(shape, ms.float32) for _ in range(self.config.num_layers)] for _ in range(2)]
            self.caches = {"key_cache": ms.mutable(sides[0]), "value_cache": ms.mutable(sides[1])}

    def logits(self, ids):
        return reference.logits(self.weights, self.config, np.asarray(ids))


@pytest.fixture(scope="module", params=["native", "mindspore"])
def kernels(request):
    from telechat_mindie.model.kernels.native_build import NativeUnavailable, library

    if request.param == "native":
        try:
            library()
        except NativeUnavailable as error:
            pytest.skip(f"no native kernels on this machine: {error}")
    return request.param


@pytest.fixture(scope="module", params=[*MODELS, "gqa, external caches"])
def model(request, kernels, tmp_path_factory):
    monkeypatch = pytest.MonkeyPatch()
    name, _, external = request.param.partition(", ")
    yield Model(tmp_path_factory.mktemp(name), kernels, MODELS[name], monkeypatch, bool(external))
    monkeypatch.undo()


class Scenario:
    """Up to four sequences that go on by whatever mode comes next."""

    def __init__(self, model, seed):
        self.model = model
        self.rng = np.random.default_rng(seed)
        self.calls = MindIECalls(model.driver, self.rng, **model.caches)
        self.sequences = []
        for _ in range(4):
            ids = self.rng.integers(0, model.config.vocab_size, LONGEST)
            self.sequences.append(Sequence_(ids, model.driver.table(LONGEST + 8)))
        self.expected = [model.logits(sequence.ids) for sequence in self.sequences]

    def close(self):
        for sequence in self.sequences:
            self.model.driver.release(sequence.table)

    def step(self, mode):
        waiting = [s for s in self.sequences if s.done == 0]
        running = [s for s in self.sequences if 0 < s.done < LONGEST - 10]
        if mode == "prefill" and waiting:
            chosen = self.some(waiting)
            lengths = self.rng.integers(1, 24, len(chosen)).tolist()
            self.check_last(chosen, lengths, self.calls.prefill(chosen, lengths))
        elif mode == "splitfuse" and (waiting or running):
            decoding = self.some(running) if running else []
            chunked = [s for s in self.some(waiting + running) if all(s is not other for other in decoding)]
            lengths = [1] * len(decoding) + self.rng.integers(2, 9, len(chunked)).tolist()
            chosen = decoding + chunked
            self.check_last(chosen, lengths, self.calls.splitfuse(chosen, lengths))
        elif running:
            chosen = self.some(running)
            getattr(self, mode if mode in ("decode", "prefix_hit", "tree") else "draft")(chosen, mode)

    def decode(self, chosen, _mode):
        self.check_last(chosen, [1] * len(chosen), self.calls.decode(chosen))

    def prefix_hit(self, chosen, _mode):
        lengths = self.rng.integers(1, 9, len(chosen)).tolist()
        self.check_last(chosen, lengths, self.calls.prefix_hit(chosen, lengths, self.model.config.seq_length))

    def draft(self, chosen, mode):
        """The true tokens guessed; the scheduler then accepts some of them, and the rest is overwritten later."""
        lengths = self.rng.integers(1, 6, len(chosen)).tolist()
        rows = self.calls.drafts(chosen, lengths, mode if mode == "la" else "memory_decoding")
        assert len(rows) == sum(lengths)
        row = 0
        for sequence, length in zip(chosen, lengths, strict=True):
            wanted = self.expected_of(sequence)[sequence.done : sequence.done + length]
            np.testing.assert_allclose(rows[row : row + length], wanted, atol=TOLERANCE)
            row += length
            sequence.done += int(self.rng.integers(1, length + 1))

    def tree(self, chosen, _mode):
        """The next token, then guesses that branch from it; only that token is accepted."""
        sequence, count = chosen[0], 6
        tokens = self.rng.integers(0, self.model.config.vocab_size, count)
        tokens[0] = sequence.ids[sequence.done]
        parents = [-1] + [int(self.rng.integers(0, row)) for row in range(1, count)]
        rows = self.calls.tree(sequence, tokens, parents, str(self.rng.choice(["la", "memory_decoding"])))
        for row in range(count):
            path = []
            at = row
            while at >= 0:
                path.insert(0, tokens[at])
                at = parents[at]
            wanted = self.model.logits([*sequence.ids[: sequence.done], *path])[-1]
            np.testing.assert_allclose(rows[row], wanted, atol=TOLERANCE)
        sequence.done += 1

    def check_last(self, chosen, lengths, rows):
        assert len(rows) == len(chosen)
        for sequence, length, row in zip(chosen, lengths, rows, strict=True):
            sequence.done += length
            np.testing.assert_allclose(row, self.expected_of(sequence)[sequence.done - 1], atol=TOLERANCE)

    def expected_of(self, sequence):
        return next(e for s, e in zip(self.sequences, self.expected, strict=True) if s is sequence)

    def some(self, sequences):
        """At least one of them, in any order."""
        order = self.rng.permutation(len(sequences))
        return [sequences[i] for i in order[: self.rng.integers(1, len(sequences) + 1)]]


@pytest.mark.slow
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.sampled_from(MODES), min_size=4, max_size=14), st.integers(0, 2**32 - 1))
def test_any_mix_of_modes(model, modes, seed):
    scenario = Scenario(model, seed)
    try:
        for mode in ["prefill", *modes]:
            scenario.step(mode)
    finally:
        scenario.close()


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_alone(model, mode):
    scenario = Scenario(model, 7)
    try:
        for step in ["prefill", mode, mode, "decode"]:
            scenario.step(step)
    finally:
        scenario.close()


def test_warm_up(model):
    """All ids 1, all sequences on block 0, one slot written: MindIE's first call, whose logits must be finite."""
    lengths = np.array([20, 12], np.int32)
    rows = model.driver.forward(
        input_ids=np.ones(32, np.int64),
        valid_length_each_example=lengths,
        block_tables=np.zeros((2, 2), np.int32),
        slot_mapping=np.array([0] + [-1] * 31, np.int32),
        prefill=True,
        position_ids=np.concatenate([np.arange(20), np.arange(12)]).astype(np.int32),
        adapter_ids=[None, None],
        prefill_head_indices=np.cumsum(lengths, dtype=np.int64) - 1,
        **({"key_cache": None, "value_cache": None} | model.caches),
        spec_mask=None,
        q_seq_lens=None,
    )
    # Without history attention is over the call's own tokens, so even these logits are the right ones.
    expected = model.logits(np.ones(20, int))
    np.testing.assert_allclose(rows, expected[[19, 11]], atol=TOLERANCE)


def test_a_dummy_batch_on_the_last_block_disturbs_nobody(model):
    scenario = Scenario(model, 3)
    try:
        scenario.step("prefill")
        running = [s for s in scenario.sequences if s.done]
        for _ in range(2):
            rows = model.driver.forward(
                input_ids=np.array([30], np.int64),
                valid_length_each_example=np.array([1], np.int32),
                block_tables=np.array([[NUM_BLOCKS - 1]], np.int32),
                slot_mapping=np.array([-1], np.int32),
                prefill=False,
                position_ids=np.array([0], np.int32),
                **model.caches,
            )
            assert np.isfinite(rows).all()
            scenario.decode(running, "decode")
    finally:
        scenario.close()


def test_the_model_config_is_overwritten_as_mindie_does(model):
    for key, value in {"block_size": 16, "top_k": 1000, "eos_token_id": [[2]], "rank": 0, "world_size": 1}.items():
        setattr(model.runner.model_config, key, value)
    scenario = Scenario(model, 11)
    try:
        scenario.step("prefill")
        scenario.step("decode")
    finally:
        scenario.close()
    np.testing.assert_array_equal(model.runner.generate_position_ids(np.array([9, 9, 9])), [0, 1, 2])


def test_dynamic_ntk_depends_on_the_sequence_alone(kernels, tmp_path, monkeypatch):
    """Beyond the trained length a key keeps the rotation of the call that wrote it; who shares the call, which blocks
    are used and how large they are must not matter."""
    from telechat_mindie import ModelRunner

    make_checkpoint(tmp_path / "ckpt", "float32", training_seqlen=32, base_seqlen=16, seq_length=32)
    build(tmp_path / "model", tmp_path / "ckpt", BuildOptions(dtype="float32", max_seq_len=256))
    monkeypatch.setenv("TELECHAT_CPU_KERNELS", kernels)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 512, length) for length in (5, 30, 45, 70)]
    tail = rng.integers(0, 512, (4, 30))
    alone = []
    runner = ModelRunner(str(tmp_path / "model"), 1, 0, 16, num_blocks=64)
    for prompt, tokens in zip(prompts, tail, strict=True):
        driver = Driver(runner, 16, 64)
        table = driver.table(len(prompt) + 31)
        rows = [driver.prefill([prompt], [table])[0]]
        rows += [driver.decode([token], [len(prompt) + i], [table])[0] for i, token in enumerate(tokens)]
        alone.append(rows)
    for block_size in (16, 128):
        runner = ModelRunner(str(tmp_path / "model"), 1, 0, block_size, num_blocks=32)
        driver = Driver(runner, block_size, 32, seed=block_size)
        tables = [driver.table(len(prompt) + 31) for prompt in prompts]
        together = [driver.prefill(prompts, tables)]
        for i in range(30):
            together.append(driver.decode(tail[:, i], [len(prompt) + i for prompt in prompts], tables))
        np.testing.assert_allclose(np.stack(together, 1), np.array(alone), atol=1e-4)


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
