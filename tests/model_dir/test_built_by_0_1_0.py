"""A directory as 0.1.0 built it, text by text: it opens, checks clean, imports and answers."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.tiny_tokenizer import train_tiny_tokenizer
from safetensors.numpy import save_file

from telechat_mindie.model_dir.layout import ModelDir
from telechat_mindie.model_dir.modules import EARLIER_MODULES
from telechat_mindie.service.check import CheckOptions, check

TEXTS = Path(__file__).parent / "built_by_0_1_0"
SHARD = "rank_0/model-00001-of-00001.safetensors"
LAYER = "model.layers.0."
SHAPES = {
    "model.tok_embeddings.embedding_weight": (512, 16),
    LAYER + "attention_norm.weight": (16,),
    LAYER + "attention.w_qkv.weight": (48, 16),
    LAYER + "attention.wo.weight": (16, 16),
    LAYER + "attention.wo.bias": (16,),
    LAYER + "ffn_norm.weight": (16,),
    LAYER + "feed_forward.w_gate_hidden.weight": (32, 16),
    LAYER + "feed_forward.w2.weight": (16, 16),
    LAYER + "feed_forward.w2.bias": (16,),
    "model.norm_out.weight": (16,),
    "lm_head.weight": (512, 16),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The texts as they were, with weights and a tokenizer made here; only these two entries of the manifest change."""
    path = Path(shutil.copytree(TEXTS, tmp_path_factory.mktemp("old") / "telechat2"))
    (path / "rank_0").mkdir()
    rng = np.random.default_rng(0)
    tensors = {name: rng.standard_normal(shape).astype(np.float16) for name, shape in SHAPES.items()}
    save_file(tensors, path / SHARD)
    train_tiny_tokenizer(path)
    manifest = json.loads((path / "manifest.json").read_text())
    for name in (SHARD, "tokenizer.model"):
        data = (path / name).read_bytes()
        manifest["files"][name] = {"nbytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))
    for entry in (path, *path.rglob("*")):
        entry.chmod(0o750 if entry.is_dir() else 0o640)
    return path


def run(*arguments: object, cwd: Path | None = None) -> str:
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_texts_are_those_that_were_built():
    files = json.loads((TEXTS / "manifest.json").read_text())["files"]
    for name in files.keys() - {SHARD, "tokenizer.model"}:
        assert hashlib.sha256((TEXTS / name).read_bytes()).hexdigest() == files[name]["sha256"], name
    for digest, module in EARLIER_MODULES.items():
        assert files[f"{module}.py"]["sha256"] == digest


def test_it_opens(model):
    directory = ModelDir.open(model)
    assert (directory.tp, directory.serving.dtype, directory.serving.max_new_tokens) == (1, "float16", 8)
    assert directory.rank_bytes == (model / SHARD).stat().st_size


def test_it_checks_clean_and_its_modules_are_run(model):
    environment = {"PATH": os.environ["PATH"]}
    report = check(model, CheckOptions(full=True, uid=0, environment=environment))
    assert report.exit_code == 0, report.with_severity("error") + report.with_severity("warning")
    modules = next(finding for finding in report.findings if finding.id == "modules")
    assert modules.message.startswith("3 modules and the runner")
    assert run("-m", "telechat_mindie", "verify", model)


def test_its_modules_import_in_a_clean_process(model):
    code = (
        "import telechat, telechat_config, telechat_tokenizer, telechat_mindie.backend.model_runner as runner\n"
        "print(telechat.ParallelTelechatForCausalLM.__name__, telechat_config.TelechatConfig.__name__,"
        " telechat_tokenizer.TelechatTokenizer.__name__, runner.MindIEModelRunner.__name__)"
    )
    names = run("-B", "-c", code, cwd=model).split()
    assert names == ["TelechatForCausalLM", "TelechatConfig", "TelechatTokenizer", "MindIEModelRunner"]


def test_it_answers(model):
    answer = json.loads(run("-m", "telechat_mindie", "generate", model, "北京", "--json"))
    assert answer["generated_tokens"] <= 8, answer
