"""Training against mindformers' own finetuning of telechat2-nano: losses, gradient norms and final weights."""

from __future__ import annotations

import json

import numpy as np
import pytest

from telechat_mindie import nano
from telechat_mindie.checkpoint.mapping import mindformers_targets
from telechat_mindie.checkpoint.source import open_checkpoint
from telechat_mindie.config import TelechatConfig
from telechat_mindie.training.lora import A, B, trained_modules
from telechat_mindie.training.rows import Batch
from telechat_mindie.training.settings import Computation, Lora, Optimization
from telechat_mindie.training.trainer import Trainer
from telechat_mindie.training.weights import array_weights, checkpoint_weights, decoder_targets, hugging_face_weights

STEPS_OF_AN_EPOCH = 9
ROWS = 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nano") / "nano"
    nano.write_checkpoint(folder)
    return open_checkpoint(folder)


@pytest.fixture(scope="module")
def dense(shared):
    return np.load(shared("training/finetune/dense.npz"))


def run(trainer, data, steps):
    """The results of steps over the fixture's rows, as mindformers read them: packed, and seeing each other."""
    results = []
    for step in range(steps):
        rows = slice(step % STEPS_OF_AN_EPOCH * ROWS, (step % STEPS_OF_AN_EPOCH + 1) * ROWS)
        trainer.accumulate(Batch(data["input_ids"][rows], data["labels"][rows]))
        results.append(trainer.update())
    return results


def optimization(steps, warmup):
    return Optimization(1e-4, steps, 1e-5, warmup)


@pytest.mark.slow
def test_dense(checkpoint, dense):
    weights = checkpoint_weights(checkpoint)
    trainer = Trainer(checkpoint.config, weights, optimization(18, 1), Computation(document_mask=False))
    results = run(trainer, dense, 18)
    np.testing.assert_allclose([result.loss for result in results], dense["loss"], atol=1e-3)
    np.testing.assert_allclose([result.grad_norm for result in results], dense["grad_norm"], atol=1e-3)
    targets = mindformers_targets(checkpoint.config, qkv_concat=False, transposed_experts=False)
    whole = dict(hugging_face_weights(decoder_targets(checkpoint.config), [trainer.trained()]))
    found = array_weights(whole, targets)
    assert set(found) == {name.removeprefix("final/") for name in dense.files if name.startswith("final/")}
    differences = np.concatenate([np.abs(found[name] - dense[f"final/{name}"]).reshape(-1) for name in found])
    # AdamW gives a gradient that is nothing but rounding the size of any other: a few elements of embeddings of tokens
    # that occur once or twice have such.
    assert (differences > 1e-6).sum() <= 10
    assert differences.max() < 1e-5


@pytest.mark.slow
def test_mixture_of_experts(checkpoint, dense, shared):
    """Routing with capacity, and the auxiliary loss, which is in mindformers' loss."""
    fixture = np.load(shared("training/finetune/moe.npz"))
    moe = {"num_local_experts": 4, "num_experts_per_tok": 2, "ffn_hidden_size": 128}
    config = TelechatConfig.from_dict(json.loads((checkpoint.path / "config.json").read_text()) | moe)
    stored = {name.removeprefix("init/"): fixture[name] for name in fixture.files if name.startswith("init/")}
    targets = mindformers_targets(config, qkv_concat=False, transposed_experts=False)
    weights = array_weights(dict(hugging_face_weights(targets, [stored])), decoder_targets(config))
    trainer = Trainer(config, weights, optimization(18, 1), Computation(document_mask=False))
    results = run(trainer, dense, 18)
    np.testing.assert_allclose([result.loss for result in results], fixture["loss"], atol=2e-3)
    # A choice between two experts that are nearly equal falls either way, and moves the norm of a step by a percent.
    norms = np.array([result.grad_norm for result in results])
    differences = np.abs(norms / fixture["grad_norm"] - 1)
    assert np.median(differences) < 1e-3 and differences.max() < 2e-2


@pytest.mark.slow
def test_lora(checkpoint, dense, shared):
    fixture = np.load(shared("training/finetune/lora.npz"))
    weights, lora = checkpoint_weights(checkpoint), Lora(rank=8, alpha=16)
    computation = Computation(document_mask=False)
    trainer = Trainer(checkpoint.config, weights, optimization(9, 0), computation, lora)
    begun = trainer.state()
    for name in trainer.trained():
        if name.endswith("lora_a"):  # stored after the first step, in which it only decayed
            begun[name] = fixture[f"init/{name}"] / np.float32(1 - 1e-4 * 0.1)
    trainer.load_state(begun)
    results = run(trainer, dense, 1)
    found = trainer.trained()
    for module in trained_modules(checkpoint.config, lora):
        rows = module.rows(0, 1)  # as they lie in the decoder's packed weights
        for side, order in ((A, slice(None)), (B, rows)):
            expected = fixture[f"init/{module.name}{side}"][order]
            np.testing.assert_allclose(found[module.name + side], expected, atol=2e-6, err_msg=module.name + side)
    results += run(trainer, {name: dense[name][ROWS:] for name in ("input_ids", "labels")}, 8)
    np.testing.assert_allclose([result.loss for result in results], fixture["loss"], atol=1e-3)
    np.testing.assert_allclose([result.grad_norm for result in results], fixture["grad_norm"], atol=1e-3)
