"""The schedule, rows and their documents, weights and factors by name, and what settings refuse."""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers.checkpoints import MOE, make_checkpoint, make_weights
from helpers.training import tiny_config, tiny_rows
from safetensors.numpy import save_file

from telechat_mindie.checkpoint.adapters.adapter import read_adapter
from telechat_mindie.checkpoint.formats.tensors import TensorReader
from telechat_mindie.checkpoint.mapping import weights
from telechat_mindie.checkpoint.source import open_checkpoint
from telechat_mindie.errors import InputError
from telechat_mindie.training.lora import A, B, initial_factors, peft_config, peft_tensors, trained_modules
from telechat_mindie.training.rows import documents, positions_within
from telechat_mindie.training.settings import Computation, Lora, Optimization, Place
from telechat_mindie.training.weights import (
    array_weights,
    checkpoint_weights,
    decoder_targets,
    hugging_face_weights,
)


def test_warm_up_begins_at_zero_and_the_cosine_ends_above_its_least():
    chosen = Optimization(1.0, 10, 0.1, 2)
    rates = [chosen.rate(step) for step in range(1, 11)]
    assert rates[:3] == [0.0, 0.5, 1.0]
    assert rates[6] == pytest.approx(0.55)  # half way
    assert rates == sorted(rates[:3]) + sorted(rates[3:], reverse=True)
    assert rates[-1] == pytest.approx(0.1 + 0.45 * (1 + np.cos(np.pi * 7 / 8)))
    assert Optimization(1.0, 10, schedule="constant").rate(10) == 1.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Optimization(1.0, 10, schedule="linear"), "schedule: is unknown"),
        (lambda: Optimization(-1.0, 10), "learning_rate: is out of range"),
        (lambda: Optimization(1.0, 10, 2.0), "min_learning_rate: is out of range .expected 0 to 1, found 2.0."),
        (lambda: Optimization(1.0, 10, warmup_steps=11), "warmup_steps: is out of range .expected 0 to 10"),
        (lambda: Optimization(1.0, 10, beta2=1.0), "beta2: is out of range"),
        (lambda: Optimization(float("nan"), 10), "learning_rate: is out of range"),
        (lambda: Lora(rank=0), "LoRA rank: is out of range"),
        (lambda: Lora(targets=("q_proj",)), "LoRA targets: .*some of query, key_value.*found q_proj"),
        (lambda: Computation(dtype="float16"), "dtype: cannot be trained in .expected float32 or bfloat16"),
        (lambda: Computation(dp=0), "dp: is out of range"),
    ],
)
def test_settings_refuse(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_ranks_of_a_tensor_parallel_group_lie_side_by_side():
    computation = Computation(dp=2, tp=2)
    assert [Place.of(rank, computation) for rank in range(4)] == [Place(0, 0), Place(0, 1), Place(1, 0), Place(1, 1)]


def test_where_documents_begin():
    rows = np.array(
        [
            [6, 9, 9, 6, 9, 9],  # conversations of the chat template
            [3, 3, 1, 1, 4, 9],  # the recipe: padding, then every <_start>
            [1, 6, 9, 1, 6, 9],  # a template with <_start>, in which a system text opens nothing
            [9, 9, 9, 9, 9, 9],  # the rest of an example
        ],
        np.int32,
    )
    numbers = documents(rows)
    assert numbers.tolist() == [[1, 1, 1, 2, 2, 2], [0, 0, 1, 1, 1, 1], [1, 1, 1, 2, 2, 2], [0] * 6]
    positions, lengths = positions_within(numbers)
    assert positions.tolist() == [[0, 1, 2, 0, 1, 2], [0, 1, 0, 1, 2, 3], [0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]]
    assert lengths.tolist() == [[3] * 6, [2] * 2 + [4] * 4, [3] * 6, [6] * 6]


def test_counted_predictions():
    batch = tiny_rows(1)
    assert np.flatnonzero(batch.counted(3)[0]).tolist() == [3, 4, 9, 10]
    assert batch.tokens(3) == 4


@pytest.mark.parametrize("moe", [{}, MOE], ids=["dense", "moe"])
@pytest.mark.parametrize("tp", [1, 2])
def test_weights_come_whole_again(moe, tp):
    config = tiny_config(**moe)
    targets, arrays = decoder_targets(config), make_weights(config, "float32")
    ranks = [dict(array_weights(arrays, targets, rank, tp)) for rank in range(tp)]
    assert {name: array.shape for name, array in ranks[0].items()} == {t.name: t.rank_shape(tp) for t in targets}
    found = dict(hugging_face_weights(targets, ranks))
    assert found.keys() == arrays.keys()
    for name, array in found.items():
        assert np.array_equal(array, arrays[name]), name


def test_weights_of_a_checkpoint_are_those_of_its_arrays(tmp_path):
    arrays = make_checkpoint(tmp_path, "bfloat16")
    checkpoint = open_checkpoint(tmp_path)
    found = checkpoint_weights(checkpoint, 1, 2)
    for name, array in array_weights(arrays, decoder_targets(checkpoint.config), 1, 2).items():
        assert found[name].dtype == np.float32 and np.array_equal(found[name], array), name


@pytest.mark.parametrize("tp", [1, 2])
def test_peft_reads_the_factors(tp, tmp_path):
    """Written as peft's files, each factor adds to the weight what the decoder's packed rows add."""
    arrays = make_checkpoint(tmp_path / "model")
    config, lora = open_checkpoint(tmp_path / "model").config, Lora(rank=2, alpha=6)
    random = np.random.default_rng(0)
    ranks, modules = [{} for _ in range(tp)], trained_modules(config, lora)
    whole = {
        m.name: (random.standard_normal((2, m.shape[1])), random.standard_normal((m.shape[0], 2))) for m in modules
    }
    for rank, factors in enumerate(ranks):
        for module in modules:
            a, b = whole[module.name]
            factors[module.name + A] = a[:, module.columns(rank, tp)].astype(np.float32)
            factors[module.name + B] = b[module.rows(rank, tp)].astype(np.float32)
            begun = initial_factors(module, lora, rank, tp)
            assert [array.shape for array in begun] == [factors[module.name + side].shape for side in (A, B)]
            assert not begun[1].any() and 0 < np.abs(begun[0]).max() <= module.shape[1] ** -0.5
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file(dict(peft_tensors(config, lora, ranks)), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(peft_config(lora)))
    adapter = read_adapter(folder, None, config, tmp_path / "model")
    names = {module.source + ".weight": module for module in modules}
    assert adapter.deltas.keys() == names.keys() and names.keys() <= arrays.keys()
    with TensorReader() as reader:
        for name, delta in adapter.deltas.items():
            assert delta.scale == 3.0
            a, b = whole[names[name].name]
            np.testing.assert_allclose(reader.load(delta.a), a, rtol=1e-6)
            np.testing.assert_allclose(reader.load(delta.b), b, rtol=1e-6)


def test_rows_of_packed_modules_lie_as_the_decoders():
    """Keys before values, where the published weight has them by head."""
    config = tiny_config()
    modules = {module.target: module for module in trained_modules(config, Lora())}
    head = config.head_dim
    expected = [*range(head), *range(2 * head, 3 * head), *range(head, 2 * head), *range(3 * head, 4 * head)]
    assert modules["key_value"].rows(0, 1).tolist() == expected
    assert modules["key_value"].rows(1, 2).tolist() == list(range(2 * head, 4 * head))
    assert [modules["query"].is_cut(side) for side in (A, B)] == [False, True]
    assert [modules["dense"].is_cut(side) for side in (A, B)] == [True, False]


def test_lora_leaves_stacks_of_experts_alone():
    config = tiny_config(**MOE)
    with pytest.raises(InputError, match=r"gate_proj, up_proj, down_proj\). Name query, key_value and dense"):
        trained_modules(config, Lora())
    names = {module.source for module in trained_modules(config, Lora(targets=("query", "dense")))}
    assert names == {"transformer.h.0.self_attention.query", "transformer.h.0.self_attention.dense"}
    assert {name + ".weight" for name in names} <= weights(config).keys()
