"""The released models' own config.json, shrunk in width and otherwise as published: they build and check clean."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.checkpoints import CONFIG, MOE, make_checkpoint

from telechat_mindie.checkpoint.convert import OutputOptions, to_hugging_face
from telechat_mindie.checkpoint.estimate import source_facts
from telechat_mindie.checkpoint.source import open_checkpoint
from telechat_mindie.config import TelechatConfig
from telechat_mindie.errors import ConfigError, InputError
from telechat_mindie.model_dir.build import BuildOptions, build
from telechat_mindie.model_dir.inspect import inspect
from telechat_mindie.model_dir.layout import ModelDir
from telechat_mindie.service.check import CheckOptions, check
from telechat_mindie.variants import VARIANTS

LABELS = {"TeleChat2-3B": "3b", "TeleChat2-7B": "7b", "TeleChat2-115B": "115b"}
LONG = ("TeleChat2-7B-32K", "T1-35B")
HEAD_DIM = 8
NARROW = {"n_layer": 2, "ffn_hidden_size": 96, "vocab_size": 512}

PUBLISHED_FORM: dict[str, Any] = {
    "architectures": ["TeleChat2ForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_telechat2.Telechat2Config"},
    "n_inner": None,
    "offset_alibi": 100,
    "seq_length": 32768,
    "training_seqlen": 8192,
    "base_seqlen": 8192,
    "tie_word_embeddings": False,
    "transformers_version": "4.24.0",
    "slow_but_exact": False,
}
LONG_FORM: dict[str, Any] = PUBLISHED_FORM | {
    "training_seqlen": 32768,
    "base_seqlen": 32768,
    "max_position_embeddings": 32768,
    "torch_dtype": "bfloat16",
    "rope_scaling": {"factor": 1.0, "rope_type": "dynamic"},
    "rope_theta": 1000000,
    "embed_layernorm": False,
    "logn": True,
}
V5_FORM: dict[str, Any] = LONG_FORM | {
    "rope_scaling": None,
    "rope_theta": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
}


def built(root: Path, data: dict[str, Any], **options: Any) -> ModelDir:
    """The model directory of a checkpoint with this very config.json."""
    make_checkpoint(root / "ckpt", data.get("torch_dtype") or "float32", **data)
    (root / "ckpt" / "config.json").write_text(json.dumps(data))  # nulls as published, too
    build(root / "model", root / "ckpt", BuildOptions(**options))
    return ModelDir.open(root / "model")


def assert_clean(directory: ModelDir) -> None:
    report = check(directory.path, CheckOptions(full=True, uid=0, environment={"PATH": os.environ["PATH"]}))
    assert report.exit_code == 0, report.with_severity("error") + report.with_severity("warning")


def yaml_of(directory: ModelDir) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(directory.yaml_path.read_text())["model"]["model_config"]
    return found


@pytest.mark.parametrize("name", [*LABELS, *LONG])
def test_published(shared: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    published = json.loads((shared("published") / "configs.json").read_text())[name]
    data = published | NARROW | {"hidden_size": HEAD_DIM * published["n_head"]}
    directory = built(tmp_path, data)
    assert_clean(directory)
    theta = 1e6 if name in LONG else 1e4
    assert directory.config == TelechatConfig.from_dict(data)
    assert directory.config.rope_theta == yaml_of(directory)["theta"] == theta
    assert (directory.config.norm_eps, directory.serving.max_seq_len) == (1e-5, published["seq_length"])
    assert directory.serving.dtype == published.get("torch_dtype", "float16")
    if name in LABELS:
        assert TelechatConfig.from_dict(published) == VARIANTS[LABELS[name]]


@pytest.mark.parametrize("form", [PUBLISHED_FORM, LONG_FORM, LONG_FORM | MOE, V5_FORM], ids=["7b", "32k", "moe", "v5"])
def test_the_same_form(tmp_path: Path, form: dict[str, Any]) -> None:
    data = CONFIG | form
    directory = built(tmp_path, data, tp=2)
    assert_clean(directory)
    theta = 1e4 if form is PUBLISHED_FORM else 1e6
    assert directory.config.rope_theta == yaml_of(directory)["theta"] == theta
    # What the authors wrote of it is in config.json as they wrote it, and goes back with the weights.
    to_hugging_face(open_checkpoint(tmp_path / "model"), tmp_path / "hf", OutputOptions())
    for written in (tmp_path / "model", tmp_path / "hf"):
        keys = json.loads((written / "config.json").read_text())
        said = {key: value for key, value in form.items() if "rope" in key and value is not None}
        assert {key: keys.get(key) for key in said} == said


def test_base_of_config_json_and_yaml_must_agree(tmp_path: Path) -> None:
    directory = built(tmp_path, CONFIG | LONG_FORM)
    text = directory.yaml_path.read_text()
    assert "    theta: 1000000.0\n" in text
    for line in ("", "    theta: 10000.0\n", "    theta: null\n"):  # the first is how 0.1.0 wrote them
        directory.yaml_path.write_text(text.replace("    theta: 1000000.0\n", line))
        with pytest.raises(Exception, match=r"theta: contradicts config\.json"):
            ModelDir.open(directory.path)
        assert "yaml-shape" in {finding.id for finding in inspect(directory.path).findings}


def test_no_longer_than_dynamic_is_plain(tmp_path: Path) -> None:
    directory = built(tmp_path, CONFIG | LONG_FORM, max_seq_len=4096)
    with pytest.raises(InputError, match=r"--max-seq-len: .*max_position_embeddings.* 32768, found 32769"):
        build(tmp_path / "longer", tmp_path / "ckpt", BuildOptions(max_seq_len=32769))
    text = directory.yaml_path.read_text().replace("seq_length: 4096", "seq_length: 65536")
    directory.yaml_path.write_text(text)
    with pytest.raises(Exception, match=r"seq_length: .*max_position_embeddings"):
        ModelDir.open(directory.path)
    # Without it the published extension goes on beyond the trained length.
    built(tmp_path / "plain", CONFIG | PUBLISHED_FORM, max_seq_len=65536)


YARN = {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}}


def test_what_only_inference_needs_is_asked_by_build_alone(tmp_path: Path) -> None:
    weights = make_checkpoint(tmp_path / "ckpt", "float16", **YARN)
    with pytest.raises(ConfigError, match=r"ckpt/config.json: rope_scaling.rope_type: .*found 'yarn'"):
        build(tmp_path / "model", tmp_path / "ckpt")
    assert not (tmp_path / "model").exists()
    assert source_facts(tmp_path / "ckpt").tensors == len(weights)
    to_hugging_face(open_checkpoint(tmp_path / "ckpt"), tmp_path / "hf", OutputOptions())
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["rope_scaling"] == YARN["rope_scaling"]


def test_the_commands_say_that_build_would_refuse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    from telechat_mindie.commands.convert import convert
    from telechat_mindie.commands.plan import plan

    make_checkpoint(tmp_path / "ckpt", "float16", **YARN)
    shown: dict[str, Any] = {"variant": None, "tp": 1, "dtype": "auto", "max_seq_len": None, "block_size": 128}
    shown |= {"no_qkv_concat": False, "device_mem": None, "probe": False, "as_json": True}
    plan(tmp_path / "ckpt", target=tmp_path, **shown)
    assert "'yarn'" in json.loads(capsys.readouterr().out)["build_refusal"]
    caplog.set_level("INFO", "telechat_mindie")
    flags = ("qkv_concat", "gmm", "force", "resume", "allow_nonfinite", "allow_overflow")
    options: dict[str, Any] = {"to": "hf", "config": None, "dtype": "auto", "tp": None, "to_strategy": None}
    options |= dict.fromkeys((*flags, "keep_optimizer"), False)
    convert(tmp_path / "ckpt", tmp_path / "hf", **options)
    assert "'yarn'" in caplog.text


def test_a_directory_whose_config_json_asks_for_more_is_not_opened(tmp_path: Path) -> None:
    directory = built(tmp_path, CONFIG | PUBLISHED_FORM)
    path = directory.path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | YARN))
    with pytest.raises(ConfigError, match=r"rope_scaling.rope_type: .*found 'yarn'"):
        ModelDir.open(directory.path)
