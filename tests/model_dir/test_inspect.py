"""One reading of a model directory: what `open` raises is the first thing that `inspect` lists."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.checkpoints import make_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from telechat_mindie.errors import ConfigError, ModelDirError, TelechatMindieError
from telechat_mindie.model_dir.build import BuildOptions, build
from telechat_mindie.model_dir.inspect import inspect
from telechat_mindie.model_dir.layout import MANIFEST, ModelDir
from telechat_mindie.model_dir.modes import User

YAML = "predict_telechat2_1m.yaml"
SHARD = "rank_0/model-00001-of-00001.safetensors"
ENTRY = {"nbytes": 1, "sha256": "0"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("built")
    make_checkpoint(root / "ckpt", "float16")
    build(root / "telechat", root / "ckpt", BuildOptions(tp=2, block_size=16))
    return root / "telechat"


@pytest.fixture
def model(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "telechat"))


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def problems(path: Path) -> list[str]:
    return [finding.message for finding in inspect(path, User(0)).findings if finding.severity == "error"]


def test_other_line_ends_are_another_module(model):
    module = model / "telechat.py"
    module.write_bytes(module.read_bytes().replace(b"\n", b"\r\n"))
    assert "module-changed" in [finding.id for finding in inspect(model, User(0)).findings]


def test_a_built_directory_has_no_problems(model):
    assert problems(model) == []
    directory = ModelDir.open(model)
    assert directory.files.keys() == directory.manifest["files"].keys()
    assert directory.rank_bytes == (model / SHARD).stat().st_size


@pytest.mark.parametrize(
    ("damage", "kind"),
    [
        (lambda path: shutil.rmtree(path), ModelDirError),
        (lambda path: (path / MANIFEST).unlink(), ModelDirError),
        (lambda path: (path / MANIFEST).write_text("{"), ConfigError),
        (lambda path: edit(path / MANIFEST, lambda data: data.pop("qkv_concat")), ModelDirError),
        (lambda path: edit(path / MANIFEST, lambda data: data.update(tp=0)), ModelDirError),
        (lambda path: edit(path / MANIFEST, lambda data: data.update(tp=3)), ModelDirError),
        (lambda path: edit(path / MANIFEST, lambda data: data.update(dtype="bfloat16")), ModelDirError),
        (lambda path: (path / "config.json").unlink(), ConfigError),
        (lambda path: edit(path / "config.json", lambda data: data.update(n_layer=10**9)), ConfigError),
        (lambda path: edit(path / "config.json", lambda data: data.update(ffn_hidden_size=97)), ModelDirError),
        (lambda path: (path / "second.yml").write_text("a: 1"), ModelDirError),
        (lambda path: (path / YAML).write_text("{}"), ModelDirError),
        (lambda path: (path / YAML).write_text("- a"), ConfigError),
        (lambda path: substitute(path / YAML, "seq_length: 512", "seq_length: 2000000"), ConfigError),
        (lambda path: substitute(path / YAML, "seq_length: 512", f"seq_length: 0x{'f' * 10_000}"), ConfigError),
        (lambda path: substitute(path / YAML, "top_p: 1.0", "top_p: {a: 1}"), ConfigError),
    ],
)  # fmt: skip
def test_open_raises_the_first_problem_of_the_same_reading(model, damage, kind):
    damage(model)
    with pytest.raises(kind) as raised:
        ModelDir.open(model)
    assert type(raised.value) is kind and str(model) in str(raised.value)
    assert any(" ".join(message.split()) in str(raised.value) for message in problems(model))


def substitute(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("tokenizer.model", None),
        ("tokenizer.model", []),
        ("tokenizer.model", {}),
        ("tokenizer.model", {"nbytes": 5}),
        ("tokenizer.model", {"sha256": "0"}),
        ("tokenizer.model", {"nbytes": -1, "sha256": "0"}),
        ("tokenizer.model", {"nbytes": 1.5, "sha256": "0"}),
        ("tokenizer.model", {"nbytes": 1 << 80, "sha256": "0"}),
        ("tokenizer.model", {"nbytes": 1, "sha256": None}),
        ("tokenizer.model", {"nbytes": 1, "sha256": "0", "self": 1}),
        ("../secret", ENTRY),
        ("/etc/passwd", ENTRY),
        ("rank_0//x", ENTRY),
        ("rank_0/./x", ENTRY),
        ("a\0b", ENTRY),
        ("", ENTRY),
    ],
)
def test_a_damaged_entry_is_one_sentence_that_names_it(model, name, entry):
    edit(model / MANIFEST, lambda data: data["files"].update({name: entry}))
    with pytest.raises(ModelDirError) as raised:
        ModelDir.open(model)
    assert repr(name) in str(raised.value)
    assert any(repr(name) in message for message in problems(model))


@pytest.mark.parametrize("command", ["verify", "info"])
def test_the_commands_say_it_in_a_line(model, command):
    edit(model / MANIFEST, lambda data: data["files"].update({"tokenizer.model": {"nbytes": "many"}}))
    arguments = [sys.executable, "-m", "telechat_mindie", command, str(model)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "manifest.json: files: 'tokenizer.model'" in done.stderr


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    key=st.sampled_from(["tp", "dtype", "qkv_concat", "files", "tokenizer.model", SHARD]),
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["nbytes", "sha256"]), inner),
        max_leaves=4,
    ),
)
def test_any_manifest_opens_or_is_refused(model, key, value):
    before = (model / MANIFEST).read_text()
    data = json.loads(before)
    (data["files"] if "." in key else data)[key] = value
    (model / MANIFEST).write_text(json.dumps(data))
    try:
        directory = ModelDir.open(model)
    except TelechatMindieError:
        assert problems(model)
    else:
        assert directory.rank_bytes >= 0
    finally:
        (model / MANIFEST).write_text(before)
