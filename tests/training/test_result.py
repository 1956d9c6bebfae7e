"""What a run leaves is what `build` takes: every rank's weights under published names, or an adapter that merges."""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers.checkpoints import MOE, make_checkpoint

from telechat_mindie.checkpoint.blocks import Block
from telechat_mindie.checkpoint.reader import BlockReader
from telechat_mindie.checkpoint.source import open_checkpoint
from telechat_mindie.checkpoint.tiles import as_matrix
from telechat_mindie.config import TelechatConfig
from telechat_mindie.errors import CheckpointError
from telechat_mindie.model_dir.build import BuildOptions, build
from telechat_mindie.training.lora import A, B, initial_factors, trained_modules
from telechat_mindie.training.result import Trained
from telechat_mindie.training.settings import TARGETS, Lora
from telechat_mindie.training.weights import checkpoint_weights


def stored(path, adapters=()):
    """Every weight of a checkpoint by its published name, as it is read for `build`."""
    checkpoint = open_checkpoint(path, adapters=adapters)
    reader = BlockReader(checkpoint.weights)
    found = {}
    for name, weight in checkpoint.weights.items():
        rows, columns = as_matrix(weight.shape)
        array = reader.read(Block(name, range(rows), range(columns), ()), np.empty(rows * columns * 8, np.uint8))
        found[name] = np.array(array, np.float32).reshape(rows, columns)
    return found


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("changes", [{}, MOE, {"tie_word_embeddings": True}])
def test_trained_weights_become_a_checkpoint_that_is_built(tmp_path, tp, changes):
    arrays = make_checkpoint(tmp_path / "base", **changes)
    base = open_checkpoint(tmp_path / "base")
    trained = Trained(tmp_path / "trained", tp)
    for rank in range(tp):
        trained.save(rank, {name: array + 1 for name, array in checkpoint_weights(base, rank, tp).items()})
    trained.write_model(base, tmp_path / "model", "auto")
    found = stored(tmp_path / "model")
    for name, array in stored(tmp_path / "base").items():
        assert np.array_equal(found[name], array + 1), name
    assert found.keys() == arrays.keys() | {"lm_head.weight"}
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    given = json.loads((tmp_path / "base" / "config.json").read_text())
    assert TelechatConfig.from_dict(config) == TelechatConfig.from_dict(given | {"torch_dtype": "float32"})
    build(tmp_path / "built", tmp_path / "model", BuildOptions())


def test_weights_have_the_dtype_that_is_asked_for_or_the_models(tmp_path):
    make_checkpoint(tmp_path / "base", "bfloat16")
    base = open_checkpoint(tmp_path / "base")
    trained = Trained(tmp_path / "trained", 1)
    trained.save(0, checkpoint_weights(base))
    for wanted, expected in (("auto", "bfloat16"), ("float32", "float32"), ("float16", "float16")):
        trained.write_model(base, tmp_path / wanted, wanted)
        assert open_checkpoint(tmp_path / wanted).dtype == expected


def test_weights_that_are_not_finite_are_refused(tmp_path):
    make_checkpoint(tmp_path / "base")
    base = open_checkpoint(tmp_path / "base")
    trained = Trained(tmp_path / "trained", 1)
    trained.save(0, {name: array * np.float32(np.nan) for name, array in checkpoint_weights(base).items()})
    with pytest.raises(CheckpointError, match="NaN"):
        trained.write_model(base, tmp_path / "model", "auto")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize(
    "changes, targets", [({}, TARGETS), ({}, ("query", "down_proj")), (MOE, ("query", "key_value", "dense"))]
)
def test_lora_factors_become_an_adapter_that_merges(tmp_path, tp, changes, targets):
    make_checkpoint(tmp_path / "base", **changes)
    base, lora, random = open_checkpoint(tmp_path / "base"), Lora(4, 6.0, targets), np.random.default_rng(0)
    whole, ranks = {}, [{} for _ in range(tp)]
    for module in trained_modules(base.config, lora):
        a, b = (random.standard_normal(shape, np.float32) for shape in ((4, module.shape[1]), (module.shape[0], 4)))
        whole[f"{module.source}.weight"] = (a, b)
        for rank, arrays in enumerate(ranks):
            arrays[module.name + A] = a[:, module.columns(rank, tp)]
            arrays[module.name + B] = b[module.rows(rank, tp)]
            expected = initial_factors(module, lora, rank, tp)
            assert [arrays[module.name + factor].shape for factor in (A, B)] == [array.shape for array in expected]
    trained = Trained(tmp_path / "trained", tp)
    for rank, arrays in enumerate(ranks):
        trained.save(rank, arrays)
    trained.write_adapter(base, lora, tmp_path / "adapter")
    found = stored(tmp_path / "base", [tmp_path / "adapter"])
    for name, array in stored(tmp_path / "base").items():
        a, b = whole.get(name, (np.zeros((1, array.shape[1])), np.zeros((array.shape[0], 1))))
        np.testing.assert_allclose(found[name], array + 1.5 * (b @ a), rtol=0, atol=2e-5, err_msg=name)
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["target_modules"]) == (4, 6.0, list(targets))
    assert settings["base_model_name_or_path"] == str(tmp_path / "base")
