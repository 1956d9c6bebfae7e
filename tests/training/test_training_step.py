"""Steps of a tiny model: gradients against finite differences, batches against each other, states, dtypes."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from helpers.training import LENGTH, TinyRun, tiny_rows

from telechat_mindie.errors import CheckpointError, InputError
from telechat_mindie.training.rows import Batch
from telechat_mindie.training.settings import Computation, Lora

PLAIN = TinyRun()


@cache
def trainer(run):
    return run.trainer()


@pytest.fixture
def fresh():
    """A trainer as it begins; graphs are compiled once for each kind of run."""
    begun = {}

    def find(run=PLAIN):
        found = trainer(run)
        begun.setdefault(run, found.state())
        found.load_state(begun[run])
        return found

    yield find
    for run, state in begun.items():
        trainer(run).load_state(state)


def gradients(trained):
    return {name: total.asnumpy().copy() for name, total in trained._totals.items()}


def check_gradients(trained, batch):
    """Of every parameter, along its own gradient: what the loss changes by is what the gradient says."""
    trained.accumulate(batch)
    found, begun = gradients(trained), trained.state()
    for name, gradient in found.items():
        norm = float(np.linalg.norm(gradient))
        if norm < 1e-3:
            continue
        direction = gradient / norm
        losses = []
        for side in (1, -1):
            trained.load_state(begun | {name: begun[name] + side * 1e-2 * direction})
            losses.append(trained.evaluate(batch)[0])
        assert (losses[0] - losses[1]) / 2e-2 == pytest.approx(norm, rel=2e-2), name
    return found


def test_gradients_are_those_of_the_loss(fresh):
    found = check_gradients(fresh(), tiny_rows(4))
    assert all(np.abs(gradient).max() > 0 for gradient in found.values())


def test_a_step_is_adamw(fresh):
    """The update against AdamW in numpy, clipped, without decay of vectors."""
    trained = fresh()
    before, batch = trained.state(), tiny_rows(4)
    loss, tokens = trained.accumulate(batch)
    totals = {name: total / tokens for name, total in gradients(trained).items()}
    norm = np.sqrt(sum((gradient.astype(np.float64) ** 2).sum() for gradient in totals.values()))
    result = trained.update()
    after, chosen = trained.state(), trained.optimization
    assert (result.step, result.tokens, result.loss) == (1, tokens, loss / tokens)
    assert result.grad_norm == pytest.approx(norm, rel=1e-5) and norm > chosen.clip_norm
    for name, gradient in totals.items():
        gradient = gradient * chosen.clip_norm / norm
        first, second = (1 - chosen.beta1) * gradient, (1 - chosen.beta2) * gradient**2
        direction = first / (1 - chosen.beta1) / (np.sqrt(second / (1 - chosen.beta2)) + chosen.epsilon)
        if gradient.ndim > 1:
            direction += chosen.weight_decay * before[name]
        np.testing.assert_allclose(after[f"adam_m.{name}"], first, atol=1e-7)
        np.testing.assert_allclose(after[f"adam_v.{name}"], second, atol=1e-7)
        np.testing.assert_allclose(
            after[name], before[name] - result.learning_rate * direction, atol=1e-6, err_msg=name
        )


def test_accumulated_batches_are_one_large_batch(fresh):
    """Also where the batches have different numbers of labels: each label counts alike."""
    batch = tiny_rows(4)
    batch.labels[0] = -100
    whole = fresh()
    whole.accumulate(batch)
    expected = whole.update()
    weights = whole.trained()
    parts = fresh()
    for index in range(2):
        parts.accumulate(batch.part(index, 2))
    found = parts.update()
    assert found.loss == pytest.approx(expected.loss, abs=1e-5)
    assert found.grad_norm == pytest.approx(expected.grad_norm, abs=1e-5)
    for name, array in parts.trained().items():
        np.testing.assert_allclose(array, weights[name], atol=1e-5, err_msg=name)


def test_a_resumed_run_is_the_same_to_the_bit(fresh):
    trained = fresh()
    states = []
    for step in range(2):
        trained.accumulate(tiny_rows(4, step))
        trained.update()
        states.append(trained.state())
    trained.accumulate(tiny_rows(4, 5))  # is forgotten
    trained.load_state(states[0])
    trained.accumulate(tiny_rows(4, 1))
    trained.update()
    again = trained.state()
    assert again.keys() == states[1].keys() and again["global_step"] == 2
    for name, array in again.items():
        assert np.array_equal(array, states[1][name]), name


def test_what_is_written_at_once_is_not_held_twice(fresh):
    trained = fresh()
    copies, views = trained.state(), trained.state(copied=False)
    assert copies.keys() == views.keys() >= trained.trained(copied=False).keys()
    for name, array in (views | trained.trained(copied=False)).items():
        assert np.array_equal(array, copies[name]) and not np.shares_memory(array, copies[name]), name
        assert name == "global_step" or np.shares_memory(array, trained.state(copied=False)[name]), name


def test_a_document_does_not_see_its_neighbour(fresh):
    trained, batch = fresh(), tiny_rows(4)
    other = Batch(batch.input_ids.copy(), batch.labels.copy())
    other.input_ids[:, :6] = np.roll(other.input_ids[:, :6], 1, axis=0)  # the first document of each row
    other.input_ids[:, 2] = 9
    for rows in (batch, other):
        rows.labels[:, :7] = -100
    assert trained.evaluate(batch)[0] == pytest.approx(trained.evaluate(other)[0], abs=1e-5)
    alone = Batch(np.full_like(batch.input_ids, 3), np.full_like(batch.labels, -100))
    alone.input_ids[:, :7], alone.labels[:, :7] = batch.input_ids[:, 6:], batch.labels[:, 6:]
    assert trained.evaluate(alone)[0] == pytest.approx(trained.evaluate(batch)[0], abs=1e-5)
    seeing = fresh(TinyRun(Computation(document_mask=False)))
    assert abs(seeing.evaluate(batch)[0] - seeing.evaluate(other)[0]) > 1e-3


def test_padding_on_the_left_changes_nothing(fresh):
    trained, batch = fresh(), tiny_rows(4)
    right = Batch(np.full_like(batch.input_ids, 3), np.full_like(batch.labels, -100))
    left = Batch(right.input_ids.copy(), right.labels.copy())
    right.input_ids[:, :6], right.labels[:, :6] = batch.input_ids[:, :6], batch.labels[:, :6]
    left.input_ids[:, -6:], left.labels[:, -6:] = batch.input_ids[:, :6], batch.labels[:, :6]
    assert trained.evaluate(left)[0] == pytest.approx(trained.evaluate(right)[0], abs=1e-5)


def test_recompute_changes_nothing_but_memory(fresh):
    plain, saving = fresh(), fresh(TinyRun(Computation(recompute=True)))
    for trained in (plain, saving):
        trained.accumulate(tiny_rows(4))
    for (name, found), expected in zip(gradients(saving).items(), gradients(plain).values(), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6, err_msg=name)


def test_bfloat16_rounds_products_and_keeps_masters(fresh):
    plain, narrow = fresh(), fresh(TinyRun(Computation(dtype="bfloat16")))
    losses = [trained.accumulate(tiny_rows(4))[0] for trained in (plain, narrow)]
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=1e-2)
    for (name, found), expected in zip(gradients(narrow).items(), gradients(plain).values(), strict=True):
        assert np.abs(found - expected).max() < 0.1 * np.abs(expected).max(), name
    narrow.update()
    weight = narrow.trained()["lm_head.weight"]
    assert (weight.view(np.uint32) & 0xFFFF).any()  # more than a bfloat16 holds


def test_lora_trains_factors_alone(fresh):
    lora = Lora(rank=2, alpha=4, targets=("query", "up_proj", "dense"))
    trained = fresh(TinyRun(lora=lora))
    assert trained.evaluate(tiny_rows(4))[0] == pytest.approx(fresh().evaluate(tiny_rows(4))[0], abs=1e-5)
    stem, feed = "model.layers.0.attention", "model.layers.0.feed_forward"
    modules = (f"{stem}.wq", f"{stem}.wo", f"{feed}.w3")
    assert set(trained.trained()) == {f"{name}.mindpet_delta_lora_{side}" for name in modules for side in "ab"}
    begun = trained.state()
    random = np.random.default_rng(0)
    drawn = {name: random.standard_normal(begun[name].shape).astype(np.float32) * 0.1 for name in trained.trained()}
    trained.load_state(begun | drawn)
    check_gradients(trained, tiny_rows(4))


def test_experts_have_gradients(fresh):
    """With room for every choice, for a dropped one is a jump as well."""
    run = TinyRun(Computation(capacity_factor=4.0, balance_alpha=0.0), moe=True)
    check_gradients(fresh(run), tiny_rows(4))


def test_a_step_without_labels_is_refused(fresh):
    trained, batch = fresh(), tiny_rows(4)
    batch.labels[:] = -100
    assert trained.accumulate(batch) == (0.0, 0)
    with pytest.raises(InputError, match=r"step 1: has no label to learn from"):
        trained.update()


def test_another_runs_state_is_refused(fresh):
    trained = fresh()
    state = trained.state()
    del state["adam_v.lm_head.weight"]
    with pytest.raises(CheckpointError, match=r"that of another run: adam_v.lm_head.weight"):
        trained.load_state(state)


def test_rows_must_divide_and_match():
    rows = tiny_rows(3)
    with pytest.raises(InputError, match=r"expected a multiple of 2, found 3"):
        rows.part(0, 2)
    with pytest.raises(InputError, match=r"not rows of one length"):
        Batch(rows.input_ids, rows.labels[:, :LENGTH])
