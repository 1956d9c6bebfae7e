"""`build`: a complete directory, or a one-line refusal and nothing left behind."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers.checkpoints import MOE, make_checkpoint
from helpers.tiny_tokenizer import train_tiny_tokenizer
from safetensors.numpy import load_file, save_file

from telechat_mindie.backend.model_config import ModelConfig
from telechat_mindie.errors import ModelDirError, OutputError, TokenizerError
from telechat_mindie.model_dir import build as build_module
from telechat_mindie.model_dir.build import BuildOptions, build
from telechat_mindie.model_dir.inspect import inspect
from telechat_mindie.model_dir.layout import MANIFEST, ModelDir
from telechat_mindie.model_dir.modes import User
from telechat_mindie.reading import LFS_POINTER
from telechat_mindie.staging import StagedDirectory
from telechat_mindie.text.settings import read_settings
from telechat_mindie.text.tokenizer import TelechatTokenizer

LAST_SHARD = "model-00002-of-00002.safetensors"


INJECTED = "hide\nmodel:\n  arch:\n    type: evil"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    root = tmp_path_factory.mktemp("pristine") / "ckpt"
    make_checkpoint(root, "float32")
    return root


@pytest.fixture
def checkpoint(pristine, tmp_path):
    """A fresh copy, free to be damaged."""
    return Path(shutil.copytree(pristine, tmp_path / "ckpt"))


def run(*arguments, **options):
    command = [sys.executable, "-m", "telechat_mindie", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def test_the_directory_is_complete(checkpoint, tmp_path):
    target = tmp_path / "model"
    old = os.umask(0o077)
    try:
        build(target, checkpoint)
    finally:
        os.umask(old)
    names = sorted(str(path.relative_to(target)) for path in target.rglob("*"))
    assert names == [
        "config.json",
        "generation_config.json",
        "manifest.json",
        "predict_telechat2_1m.yaml",
        "rank_0",
        "rank_0/model-00001-of-00001.safetensors",
        "telechat.py",
        "telechat_config.py",
        "telechat_tokenizer.py",
        "tokenizer.model",
        "tokenizer_config.json",
    ]
    for path in [target, *target.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o750 if path.is_dir() else 0o640), path
        assert not path.is_symlink()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["ckpt", "model"]


def test_files_say_what_was_built(checkpoint, tmp_path):
    target = tmp_path / "model"
    (checkpoint / "generation_config.json").write_text(
        json.dumps({"top_k": 5, "top_p": 0.85, "repetition_penalty": 1.03})
    )
    build(target, checkpoint, BuildOptions(max_seq_len=256, block_size=16, bare_prompt="raw"))
    config = json.loads((target / "config.json").read_text())
    assert (config["torch_dtype"], config["model_type"], config["vocab_size"]) == ("float16", "telechat", 512)
    assert config["n_layer"] == 2 and "auto_map" not in config
    # In MindIE this caps every request's top_k, so the published 5 would be a trap.
    assert json.loads((target / "generation_config.json").read_text())["top_k"] == 512
    described = yaml.safe_load(next(target.glob("*.yaml")).read_text())
    model = described["model"]["model_config"]
    assert described["model"]["arch"]["type"] == "telechat_mindie.backend.model_runner"
    assert (model["seq_length"], model["block_size"], model["num_blocks"]) == (256, 16, 16)
    assert (model["compute_dtype"], model["qkv_concat"]) == ("float16", True)
    assert (model["top_k"], model["top_p"], model["repetition_penalty"]) == (5, 0.85, 1.03)
    assert model["auto_map"]["AutoTokenizer"] == ["telechat_tokenizer.TelechatTokenizer", None]
    assert json.loads((target / "tokenizer_config.json").read_text())["bare_prompt"] == "raw"
    manifest = json.loads((target / MANIFEST).read_text())
    assert (manifest["tp"], manifest["dtype"], manifest["qkv_concat"]) == (1, "float16", True)
    files = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()} - {MANIFEST}
    assert set(manifest["files"]) == files
    for name, entry in manifest["files"].items():
        data = (target / name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry["nbytes"], entry["sha256"])


def test_modules_import_in_a_clean_process(checkpoint, tmp_path):
    build(tmp_path / "model", checkpoint)
    code = "import telechat_config, telechat_tokenizer, telechat; print(telechat.ParallelTelechatForCausalLM.__name__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "model", capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "TelechatForCausalLM", done.stderr


@pytest.mark.parametrize(
    ("stored", "moe", "asked", "expected"),
    [
        ("float32", False, "auto", "float16"),
        ("float32", True, "auto", "bfloat16"),
        ("float16", True, "auto", "float16"),
        ("bfloat16", False, "auto", "bfloat16"),
        ("bfloat16", False, "float32", "float32"),
    ],
)
def test_dtype(tmp_path, stored, moe, asked, expected):
    make_checkpoint(tmp_path / "ckpt", stored, **(MOE if moe else {}))
    plan = build(tmp_path / "model", tmp_path / "ckpt", BuildOptions(dtype=asked))
    assert plan.dtype == expected
    header = next((tmp_path / "model" / "rank_0").iterdir()).read_bytes()[:3000]
    assert {"float16": b'"F16"', "bfloat16": b'"BF16"', "float32": b'"F32"'}[expected] in header


def test_values_are_cast_once_and_nothing_else(checkpoint, tmp_path):
    build(tmp_path / "model", checkpoint, BuildOptions(qkv_concat=False))
    built = load_file(next((tmp_path / "model" / "rank_0").iterdir()))
    source = {}
    for file in checkpoint.glob("*.safetensors"):
        source |= load_file(file)
    stem = "transformer.h.1."
    for name, target in (
        (stem + "self_attention.key_value.weight", "model.layers.1.attention.wk_v.weight"),
        (stem + "mlp.down_proj.bias", "model.layers.1.feed_forward.w2.bias"),
        ("transformer.word_embeddings.weight", "model.tok_embeddings.embedding_weight"),
        ("lm_head.weight", "lm_head.weight"),
    ):
        np.testing.assert_array_equal(built[target], source[name].astype(np.float16))
    assert len(built) == len(source)


def drop_tensor(checkpoint):
    file = checkpoint / LAST_SHARD
    arrays = load_file(file)
    del arrays["lm_head.weight"]
    save_file(arrays, file)
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    del index["weight_map"]["lm_head.weight"]
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))


def reshape_tensor(checkpoint):
    file = checkpoint / LAST_SHARD
    arrays = load_file(file)
    arrays["lm_head.weight"] = arrays["lm_head.weight"][:-2].copy()
    save_file(arrays, file)


def set_value(value):
    def change(checkpoint):
        file = checkpoint / "model-00001-of-00002.safetensors"
        arrays = load_file(file)
        arrays["transformer.word_embeddings.weight"][3, 5] = value
        save_file(arrays, file)

    return change


def truncate(checkpoint):
    file = checkpoint / LAST_SHARD
    os.truncate(file, file.stat().st_size - 1)


def point_outside(checkpoint):
    path = checkpoint / "model.safetensors.index.json"
    path.write_text(path.read_text().replace("model-00002-of-00002", "../model-00002-of-00002"))


def link_outside(checkpoint):
    file = checkpoint / LAST_SHARD
    file.rename(checkpoint.parent / "elsewhere.safetensors")
    file.symlink_to(checkpoint.parent / "elsewhere.safetensors")


def make_fifo(checkpoint):
    file = checkpoint / LAST_SHARD
    file.unlink()
    os.mkfifo(file)


def write(name, **content):
    return lambda checkpoint: (checkpoint / name).write_text(json.dumps(content))


def edit_config(checkpoint, **changes):
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def template(source):
    return lambda checkpoint: (checkpoint / "chat_template.jinja").write_text(source)


def larger_tokenizer(checkpoint):
    train_tiny_tokenizer(checkpoint, vocab_size=530)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "config.json").unlink(), "config.json: file is missing"),
        (lambda path: (path / "config.json").write_text("{"), "config.json:1:2: is not valid JSON"),
        (truncate, LAST_SHARD),
        (lambda path: (path / LAST_SHARD).unlink(), f"{LAST_SHARD}: file is missing"),
        (drop_tensor, "1 of 23 weights are missing: lm_head.weight"),
        (reshape_tensor, "wrong shape: lm_head.weight"),
        (set_value(np.nan), "1 NaN or infinite values in transformer.word_embeddings.weight"),
        (set_value(np.inf), "1 NaN or infinite values in transformer.word_embeddings.weight"),
        (set_value(70000.0), "1 values do not fit float16 in transformer.word_embeddings.weight"),
        (point_outside, "names a file outside its folder"),
        (link_outside, "symbolic link"),
        (make_fifo, "not a regular file"),
        (lambda path: (path / "tokenizer.model").unlink(), "tokenizer.model: file is missing"),
        (lambda path: (path / "tokenizer.model").write_bytes(LFS_POINTER), "tokenizer.model: is a Git LFS pointer"),
        (larger_tokenizer, "vocab"),
        (lambda path: [file.unlink() for file in path.glob("model*")], "holds no weights"),
        (lambda path: (path / "generation_config.json").write_text('{"top_k": "5"}'), "top_k: has the wrong type"),
        (write("generation_config.json", max_new_tokens="many"), "max_new_tokens: has the wrong type"),
        (write("generation_config.json", max_new_tokens=0), "max_new_tokens: must be positive"),
        (write("generation_config.json", temperature=float("nan")), "NaN"),
        (write("generation_config.json", eos_token_id=[2, 512]), "eos_token_id: id lies outside the vocabulary"),
        (write("generation_config.json", eos_token_id=[]), "eos_token_id: has the wrong type"),
        (write("generation_config.json", user_token_id=-1), "user_token_id: id lies outside the vocabulary"),
        (lambda path: edit_config(path, eos_token_id=[2, "5"]), "eos_token_id: has the wrong type"),
        (lambda path: edit_config(path, eos_token_id=[2, 512]), "eos_token_id: id lies outside the vocabulary"),
        (write("tokenizer_config.json", clean_up_tokenization_spaces=True), "clean_up_tokenization_spaces: would"),
        (write("tokenizer_config.json", turn_tokens=INJECTED), "turn_tokens: has an unknown value"),
        (write("tokenizer_config.json", control_tokens=INJECTED), "control_tokens: has an unknown value"),
        (write("tokenizer_config.json", chat_template="{% for"), "tokenizer_config.json: "),
        (template("{% for"), "chat_template.jinja: makes no prompt of a question: "),
        (write("tokenizer_config.json", chat_template=[{"name": "tools", "template": ""}]), "names no default"),
        (lambda path: edit_config(path, n_layer=10**9), "n_layer: is out of range"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_leaves_nothing(checkpoint, tmp_path, damage, message):
    damage(checkpoint)
    before = sorted(tmp_path.iterdir())
    done = run("build", tmp_path / "model", "--checkpoint", checkpoint)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")
    assert message in done.stderr and "Traceback" not in done.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_null_counts_as_absent(checkpoint, tmp_path):
    nothing = dict.fromkeys(("max_new_tokens", "top_k", "top_p", "temperature", "do_sample", "eos_token_id"))
    write("generation_config.json", **nothing)(checkpoint)
    write("tokenizer_config.json", turn_tokens=None, control_tokens=None, chat_template=None)(checkpoint)
    build(tmp_path / "model", checkpoint)
    serving = ModelDir.open(tmp_path / "model").serving
    assert (serving.max_new_tokens, serving.top_k, serving.do_sample) == (512, 0, False)
    assert "eos_token_id" not in json.loads((tmp_path / "model" / "generation_config.json").read_text())


@pytest.mark.parametrize(
    ("config", "generation", "ends"),
    [
        ({}, {}, 2),
        ({"eos_token_id": 5}, {}, 5),
        ({"eos_token_id": [2, 5]}, {}, [2, 5]),
        ({"eos_token_id": [2, 5]}, {"eos_token_id": None}, [2, 5]),
        ({"eos_token_id": 2}, {"eos_token_id": [5, 2, 5]}, [5, 2]),
        ({"eos_token_id": [2, 5]}, {"eos_token_id": [5]}, 5),
    ],
)
def test_what_ends_an_answer(checkpoint, tmp_path, config, generation, ends):
    """generation_config.json's eos_token_id goes before config.json's, as in transformers; MindIE reads the yaml's."""
    edit_config(checkpoint, **config)
    write("generation_config.json", **generation)(checkpoint)
    build(tmp_path / "model", checkpoint)
    directory = ModelDir.open(tmp_path / "model")
    assert yaml.safe_load(directory.yaml_path.read_text())["model"]["model_config"]["eos_token_id"] == ends
    assert json.loads((tmp_path / "model" / "config.json").read_text())["eos_token_id"] == ends
    assert ModelConfig(directory).eos_token_id == ends
    assert run("verify", tmp_path / "model", "--against", checkpoint).returncode == 0


def test_no_top_k_is_invented(checkpoint, tmp_path):
    """T1's README asks for top_p 0.95 and no top_k; MindIE's cap in generation_config.json stays."""
    write("generation_config.json", do_sample=True, top_p=0.95, temperature=0.6, max_length=300)(checkpoint)
    build(tmp_path / "model", checkpoint)
    serving = ModelDir.open(tmp_path / "model").serving
    assert (serving.top_k, serving.top_p, serving.do_sample, serving.max_new_tokens) == (0, 0.95, True, 300)
    assert json.loads((tmp_path / "model" / "generation_config.json").read_text())["top_k"] == 512
    assert run("check", tmp_path / "model", "--json").returncode in (0, 1)


def test_the_directory_renders_what_the_checkpoint_renders(checkpoint, tmp_path):
    write("tokenizer_config.json", chat_template="config {{ messages | length }}")(checkpoint)
    (checkpoint / "chat_template.json").write_text('{"chat_template": "json {{ messages | length }}"}')
    template("jinja {{ messages | length }}\n")(checkpoint)
    target = tmp_path / "model"
    build(target, checkpoint)
    for name in ("chat_template.jinja", "chat_template.json"):
        assert (target / name).read_bytes() == (checkpoint / name).read_bytes()
        assert stat.S_IMODE((target / name).stat().st_mode) == 0o640
        assert name in json.loads((target / MANIFEST).read_text())["files"]
    for directory in (target, checkpoint):
        tokenizer = TelechatTokenizer.from_pretrained(directory)
        assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "jinja 1"


def test_templates_in_a_folder_of_their_own(checkpoint, tmp_path):
    """As transformers 4.52 and later write named ones."""
    template("plain")(checkpoint)
    folder = checkpoint / "additional_chat_templates"
    folder.mkdir()
    (folder / "tool_use.jinja").write_text("with tools\n")
    target, name = tmp_path / "model", "additional_chat_templates/tool_use.jinja"
    build(target, checkpoint)
    assert (target / name).read_bytes() == (checkpoint / name).read_bytes()
    assert stat.S_IMODE((target / name).stat().st_mode) == 0o640
    assert stat.S_IMODE((target / name).parent.stat().st_mode) == 0o750
    assert name in json.loads((target / MANIFEST).read_text())["files"]
    assert run("verify", target).returncode == 0
    done = run("convert", checkpoint, tmp_path / "again", "--to", "hf")
    assert done.returncode == 0, done.stderr
    for directory in (target, checkpoint, tmp_path / "again"):
        tokenizer = TelechatTokenizer.from_pretrained(directory)
        turns = [{"role": "user", "content": "a"}]
        assert tokenizer.apply_chat_template(turns, tokenize=False) == "plain"
        assert tokenizer.apply_chat_template(turns, [{"name": "f"}], tokenize=False) == "with tools"
    (target / "additional_chat_templates" / "later.jinja").write_text("later")
    assert "extra-file" not in [finding.id for finding in inspect(target, User(0)).findings]
    (checkpoint / "chat_template.jinja").unlink()
    with pytest.raises(TokenizerError, match="additional_chat_templates: names no default chat_template"):
        read_settings(checkpoint)
    for number in range(32):
        (folder / f"{number}.jinja").write_text("a")
    with pytest.raises(TokenizerError, match=r"additional_chat_templates: holds too many templates .*found 33"):
        read_settings(checkpoint)


def test_the_tokenizer_that_was_tried_is_the_one_that_is_built(checkpoint, tmp_path, monkeypatch):
    tried = []

    def try_it(file, **arguments):
        tried.append((file.read_bytes(), arguments))
        return TelechatTokenizer(file, **arguments)

    monkeypatch.setattr("telechat_mindie.text.trial.TelechatTokenizer", try_it)
    write("tokenizer_config.json", chat_template="config", model_max_length=9, auto_map={"a": "b"})(checkpoint)
    (checkpoint / "chat_template.json").write_text('{"chat_template": "{{ messages | length }}"}')
    target = tmp_path / "model"
    build(target, checkpoint)
    assert tried == [((target / "tokenizer.model").read_bytes(), read_settings(target))]


def test_a_key_of_config_json_stands_once(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(build_module, "_kept", lambda config: config.raw)
    with pytest.raises(ValueError, match="stands twice"):
        build(tmp_path / "model", checkpoint)


def test_numbers_that_yaml_would_take_for_texts(checkpoint, tmp_path):
    write("generation_config.json", temperature=1e-05, repetition_penalty=1e16)(checkpoint)
    edit_config(checkpoint, layer_norm_epsilon=1.25e-06)
    build(tmp_path / "model", checkpoint)
    directory = ModelDir.open(tmp_path / "model")
    assert (directory.serving.temperature, directory.serving.repetition_penalty) == (1e-05, 1e16)
    assert yaml.safe_load(directory.yaml_path.read_text())["model"]["model_config"]["rms_norm_eps"] == 1.25e-06


def test_a_directory_that_would_not_open_never_appears(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(build_module, "label_for", lambda config: "x")
    monkeypatch.setattr(build_module, "_manifest", lambda *_: {"tp": 1})
    with pytest.raises(ModelDirError, match="lacks dtype"):
        build(tmp_path / "model", checkpoint)
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]


def test_odd_values_can_be_allowed(checkpoint, tmp_path):
    set_value(np.nan)(checkpoint)
    build(tmp_path / "model", checkpoint, BuildOptions(allow_nonfinite=True))
    odd = json.loads((tmp_path / "model" / MANIFEST).read_text())["odd_values"]
    assert odd == {"transformer.word_embeddings.weight": {"nan": 1, "infinite": 0, "overflow": 0}}
    set_value(1e9)(checkpoint)
    build(tmp_path / "model", checkpoint, BuildOptions(allow_overflow=True, force=True))
    odd = json.loads((tmp_path / "model" / MANIFEST).read_text())["odd_values"]
    assert odd == {"transformer.word_embeddings.weight": {"nan": 0, "infinite": 0, "overflow": 1}}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tp", 3), "one of 1, 2, 4"),
        (("--dtype", "int8"), "--dtype: unknown dtype"),
        (("--bare-prompt", "maybe"), "--bare-prompt"),
        (("--max-seq-len", 0), "--max-seq-len"),
        (("--block-size", 4096), "--block-size"),
    ],
)
def test_bad_options(checkpoint, tmp_path, options, message):
    done = run("build", tmp_path / "model", "--checkpoint", checkpoint, *options)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "model").exists()


def test_an_existing_target(checkpoint, tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    (target / "mine.txt").write_text("precious")
    done = run("build", target, "--checkpoint", checkpoint)
    assert done.returncode == 2 and "exists and is not empty" in done.stderr
    done = run("build", target, "--checkpoint", checkpoint, "--force")
    assert done.returncode == 2 and "was not made by this program" in done.stderr
    assert [path.name for path in target.iterdir()] == ["mine.txt"]
    (target / "mine.txt").unlink()
    build(target, checkpoint)  # an empty directory counts as absent
    before = ModelDir.open(target).manifest
    build(target, checkpoint, BuildOptions(dtype="bfloat16", force=True))
    assert ModelDir.open(target).manifest["dtype"] == "bfloat16" != before["dtype"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["ckpt", "model"]


def test_unwritable_targets(checkpoint, tmp_path):
    for target, message in (
        (tmp_path / "absent" / "model", "parent folder is missing"),
        (Path("/proc/model"), "cannot be written"),
        (checkpoint / "config.json", "is not a directory"),
    ):
        done = run("build", target, "--checkpoint", checkpoint)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "real")
    assert "symbolic link" in run("build", link, "--checkpoint", checkpoint).stderr


def test_two_builds_of_one_target(checkpoint, tmp_path):
    first = StagedDirectory(tmp_path / "model", replace=False, marker=MANIFEST)
    with first, pytest.raises(OutputError, match="another run"):
        build(tmp_path / "model", checkpoint)
    build(tmp_path / "model", checkpoint)


def test_relative_paths_and_another_working_directory(checkpoint, tmp_path):
    done = run("build", "model", "--checkpoint", "ckpt", "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["weight_bytes"] > 0, done.stderr
    assert ModelDir.open(tmp_path / "model").tp == 1


def test_checkpoint_and_target_may_not_be_the_same(checkpoint):
    done = run("build", checkpoint, "--checkpoint", checkpoint, "--force")
    assert done.returncode == 2 and "was not made by this program" in done.stderr
    assert (checkpoint / "config.json").exists()


def test_other_layouts_of_the_same_weights(checkpoint, tmp_path):
    """A single file without an index gives the very same shards as two files with one."""
    build(tmp_path / "a", checkpoint)
    arrays = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        arrays |= load_file(file)
        file.unlink()
    (checkpoint / "model.safetensors.index.json").unlink()
    save_file(arrays, checkpoint / "model.safetensors")
    build(tmp_path / "b", checkpoint)
    digests = [
        {name: entry["sha256"] for name, entry in ModelDir.open(tmp_path / side).manifest["files"].items()}
        for side in "ab"
    ]
    assert digests[0] == digests[1]


def test_the_hugging_face_cache_layout(checkpoint, tmp_path):
    """snapshots/REV/file -> ../../blobs/HASH is how the hub's cache looks; nothing else may leave the folder."""
    hub = tmp_path / "models--TeleAI--TeleChat2"
    snapshot = hub / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (hub / "blobs").mkdir()
    for number, file in enumerate(sorted(checkpoint.iterdir())):
        shutil.copy(file, hub / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    build(tmp_path / "model", snapshot)
    assert not any(path.is_symlink() for path in (tmp_path / "model").rglob("*"))
