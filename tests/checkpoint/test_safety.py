"""The result is right or absent: kills, full disks, damage after the fact, hostile trees; and what `plan` foretells."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers.checkpoints import CONFIG, MOE, make_checkpoint
from helpers.tiny_tokenizer import train_tiny_tokenizer

from telechat_mindie.checkpoint.estimate import source_facts
from telechat_mindie.checkpoint.mapping import weights
from telechat_mindie.checkpoint.source import open_checkpoint
from telechat_mindie.config import TelechatConfig
from telechat_mindie.errors import CheckpointError, InputError, OutputError
from telechat_mindie.model_dir.build import BuildOptions, build
from telechat_mindie.model_dir.layout import ModelDir
from telechat_mindie.model_dir.verify import check_against, check_files

SHARD = "model-00001-of-00001.safetensors"

# A build in a process of its own, with shards small enough that a kill finds some finished and some not.
SMALL_SHARDS = (
    "import sys, telechat_mindie.checkpoint.plan as plan; plan.SHARD_BYTES = 2_000_000\n"
    "from telechat_mindie.__main__ import main; sys.argv[0] = 'telechat-mindie'; main()"
)


def command(*arguments):
    return [sys.executable, "-c", SMALL_SHARDS, *map(str, arguments)]


def run(*arguments, **options):
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=300, **options)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A checkpoint of 50 MB, enough to be killed in the middle of."""
    root = tmp_path_factory.mktemp("large") / "ckpt"
    make_checkpoint(root, "float32", hidden_size=512, n_head=16, num_key_value_heads=8, ffn_hidden_size=1536, n_layer=4)
    return root


@pytest.fixture
def built(tmp_path):
    make_checkpoint(tmp_path / "ckpt", "float32", **MOE)
    build(tmp_path / "model", tmp_path / "ckpt", BuildOptions(tp=2))
    return tmp_path / "model"


def digests(path):
    return {name: entry["sha256"] for name, entry in ModelDir.open(path).manifest["files"].items()}


def wait_for_shards(process, partial, count):
    """Until the journal of a running build names `count` files, or the build is over."""
    journal = partial / ".journal"
    while process.poll() is None:
        with contextlib.suppress(OSError):
            if journal.read_text().count("\n") > count:
                return
        time.sleep(0.001)


@pytest.mark.slow
def test_kill_at_random_moments_then_resume(large, tmp_path):
    arguments = ("--checkpoint", large, "--tp", 2)
    undisturbed = tmp_path / "undisturbed"
    begin = time.monotonic()
    assert run("build", undisturbed, *arguments).returncode == 0
    duration = time.monotonic() - begin
    expected = digests(undisturbed)
    rng = random.Random(0)
    resumed = 0
    for number in range(20):
        target = tmp_path / "model"
        process = subprocess.Popen(command("build", target, *arguments), stderr=subprocess.DEVNULL)
        if number % 2:
            time.sleep(rng.uniform(0.3, 1.0) * duration)
        else:
            wait_for_shards(process, tmp_path / ".model.partial", rng.randint(1, 8))
            time.sleep(rng.uniform(0, 0.01))
        process.kill()
        process.wait()
        partial = tmp_path / ".model.partial"
        if partial.exists():
            assert not target.exists()
            journal = partial / ".journal"
            resumed += journal.exists() and journal.read_text().count("\n") > 1
            done = run("build", target, *arguments, "--resume")
            assert done.returncode == 0, done.stderr
        elif not target.exists():
            assert run("build", target, *arguments).returncode == 0
        assert digests(target) == expected
        assert check_files(ModelDir.open(target)) == []
        shutil.rmtree(target)
    assert resumed > 0, "no kill fell between two shards: the test has lost its point"


def test_resume_does_not_write_finished_shards_again(large, tmp_path):
    target, partial = tmp_path / "model", tmp_path / ".model.partial"
    arguments = ("build", target, "--checkpoint", large)
    process = subprocess.Popen(command(*arguments), stderr=subprocess.DEVNULL)
    wait_for_shards(process, partial, 3)
    process.kill()
    process.wait()
    (partial / ".config.json.123.tmp").write_text("a write that a kill cut short")
    finished = [json.loads(line)["path"] for line in (partial / ".journal").read_text().splitlines()[1:4]]
    inodes = {name: ((partial / name).stat().st_ino, (partial / name).stat().st_mtime_ns) for name in finished}
    assert run(*arguments, "--resume").returncode == 0
    for name, (inode, mtime) in inodes.items():
        assert ((target / name).stat().st_ino, (target / name).stat().st_mtime_ns) == (inode, mtime)
    assert check_files(ModelDir.open(target)) == []


def test_resume_with_other_options_is_refused(large, tmp_path):
    partial = tmp_path / ".model.partial"
    partial.mkdir()
    (partial / ".journal").write_text('{"fingerprint": "of something else"}\n')
    done = run("build", tmp_path / "model", "--checkpoint", large, "--resume")
    assert done.returncode == 2 and "again without --resume" in done.stderr
    assert partial.exists()
    assert run("build", tmp_path / "model", "--checkpoint", large).returncode == 0
    assert not partial.exists()


def test_a_file_size_limit(large, tmp_path):
    limit = 1_000_000
    done = run(
        "build", tmp_path / "model", "--checkpoint", large,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "ulimit -f" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_not_enough_space_is_said_before_the_first_byte(large, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OutputError, match=r"not enough free space \(expected \d+ bytes, found 1000 bytes\)"):
        build(tmp_path / "model", large)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="mounting a small tmpfs takes root")
def test_a_full_disk(large, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=60m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("this machine does not let us mount a tmpfs")
    try:
        # The check of free space passes; then something else fills the disk.
        process = subprocess.Popen(command("build", disk / "model", "--checkpoint", large), stderr=subprocess.PIPE)
        (disk / "filler").write_bytes(bytes(45 << 20))
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 2, errors
        assert b"o space left" in errors or b"not enough free space" in errors
        assert [path.name for path in disk.iterdir()] == ["filler"]
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: flip(path / "rank_1" / SHARD), f"rank_1/{SHARD}: has another sha256"),
        (lambda path: os.truncate(path / "rank_0" / SHARD, 1000), f"rank_0/{SHARD}: has 1000 bytes"),
        (lambda path: (path / "rank_0" / SHARD).unlink(), f"rank_0/{SHARD}: is missing"),
        (lambda path: (path / "extra.txt").write_text("x"), "extra.txt: is not in the manifest"),
        (lambda path: flip(path / "tokenizer.model"), "tokenizer.model: has another sha256"),
        (lambda path: swap_for_link(path / "rank_0" / SHARD), "symbolic link"),
    ],
)  # fmt: skip
def test_verify_finds_damage(built, damage, message):
    assert check_files(ModelDir.open(built)) == []
    damage(built)
    problems = check_files(ModelDir.open(built))
    assert len(problems) == 1 and message in problems[0]
    done = run("verify", built)
    assert done.returncode == 2 and message in done.stdout


def flip(path):
    with open(path, "r+b") as file:
        file.seek(-100, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-101 + 1, os.SEEK_END)
        file.write(bytes([byte ^ 1]))


def swap_for_link(path):
    path.rename(path.with_name("moved"))
    path.with_name("moved").rename(path.parent.parent.parent / "moved")
    path.symlink_to(path.parent.parent.parent / "moved")


def test_verify_against_the_checkpoint(built):
    checkpoint = built.parent / "ckpt"
    assert check_against(ModelDir.open(built), checkpoint) == []
    # One element of one expert, changed in the directory together with its manifest's hash: only the checkpoint tells.
    flip(built / "rank_1" / SHARD)
    problems = check_against(ModelDir.open(built), checkpoint)
    assert problems == [f"rank_1/{SHARD}: lm_head.weight differs from the checkpoint"]
    done = run("verify", built, "--against", checkpoint, "--json")
    assert done.returncode == 2 and len(json.loads(done.stdout)["problems"]) == 2


def test_memory_does_not_grow_with_the_model(tmp_path):
    """Peak memory of two builds, one four times the other; the bound is the documented constant."""
    peaks = []
    for number, layers in enumerate((4, 16)):
        root = tmp_path / str(number)
        make_checkpoint(root / "ckpt", "float16", hidden_size=1024, n_head=16, ffn_hidden_size=4096, n_layer=layers)
        code = (
            "from pathlib import Path; from telechat_mindie.model_dir.build import build\n"
            f"build(Path({str(root / 'model')!r}), Path({str(root / 'ckpt')!r}))\n"
            "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
        peaks.append(int(done.stdout) / 1024)
    assert peaks[1] < 350 and peaks[1] - peaks[0] < 50, peaks


def test_plan_of_the_published_115b(shared):
    done = run("plan", "--checkpoint", shared("telechat2-115b"), "--tp", 8, "--device-mem", 64, "--no-probe", "--json")
    facts = json.loads(done.stdout)
    assert facts["source"] == {"tensors": 963, "bytes": 453131665408, "dtype": "float32"}
    assert facts["dtype"] == "float16" and facts["kv_bytes_per_token"] == 49152
    config = TelechatConfig.from_directory(shared("telechat2-115b"))
    # Norms and biases are on every rank, all else is divided.
    replicated = sum(np.prod(w.shape) for w in weights(config).values() if w.role.axis is None)
    exact = 2 * (replicated + (config.parameter_count - replicated) / 8)
    headers = facts["rank_bytes"] - exact
    assert 0 < headers < 200_000 and sum(file["bytes"] for file in facts["files"]) == facts["rank_bytes"]
    assert facts["fit"]["sequences"] == facts["fit"]["kv_tokens"] // 8192 > 0


@pytest.mark.parametrize("variant", ["3b", "7b", "35b", "115b", "39b-a12b"])
def test_plan_of_every_variant(variant):
    facts = json.loads(run("plan", "--variant", variant, "--tp", 8, "--no-probe", "--json").stdout)
    assert facts["output_bytes"] >= facts["parameters"] * 2
    assert facts["peak_memory_bytes"] < 350 << 20


def test_plan_answers_where_nothing_fits():
    done = run("plan", "--variant", "115b", "--tp", 2, "--device-mem", 64)
    said = re.sub(r"[\s│]+", " ", done.stdout)  # without the table's lines
    assert done.returncode == 0 and "at least 1" in said and "Choose a larger --tp" in said
    assert "smallest that fits 8 x 64 GB: " in said and "GiB" in said and "bytes" not in said


def test_plan_foretells_the_build(tmp_path):
    make_checkpoint(tmp_path / "ckpt", "float32")
    facts = json.loads(
        run("plan", "--checkpoint", tmp_path / "ckpt", "--tp", 2, "--target", tmp_path, "--probe", "--json").stdout
    )
    assert run("build", tmp_path / "model", "--checkpoint", tmp_path / "ckpt", "--tp", 2).returncode == 0
    sizes = [(tmp_path / "model" / file["path"]).stat().st_size for file in facts["files"]]
    assert sizes == [file["bytes"] for file in facts["files"]]
    assert facts["disk_bytes_per_second"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt", "model"]


def test_an_index_alone_is_enough_to_plan(tmp_path):
    make_checkpoint(tmp_path / "ckpt", "float32")
    for shard in (tmp_path / "ckpt").glob("*.safetensors"):
        shard.unlink()
    facts = json.loads(run("plan", "--checkpoint", tmp_path / "ckpt", "--no-probe", "--json").stdout)
    assert facts["source"]["bytes"] == 4 * TelechatConfig.from_dict(CONFIG).parameter_count
    index = Path(tmp_path / "ckpt" / "model.safetensors.index.json")
    index.write_text(index.read_text().replace('"total_size": ', '"total_size": 1'))
    assert "total_size does not fit" in run("plan", "--checkpoint", tmp_path / "ckpt", "--no-probe").stderr


def index_only(folder, change=lambda index: None, **settings):
    """A checkpoint before its download: `change` is made to the index."""
    make_checkpoint(folder, "bfloat16", **settings)
    for shard in folder.glob("*.safetensors"):
        shard.unlink()
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    return folder


def with_buffers(index):
    index["metadata"]["total_size"] += 4 * 4 * 2
    index["weight_map"] |= {f"transformer.h.{layer}.self_attention.rotary_emb.inv_freq": "a" for layer in range(2)}


def without_head(index):
    del index["weight_map"]["lm_head.weight"]
    index["metadata"]["total_size"] -= 2 * CONFIG["vocab_size"] * CONFIG["hidden_size"]


@pytest.mark.parametrize("metadata", [None, [], "text", {}, {"total_size": "7"}, {"total_size": 10**400}])
def test_an_index_without_a_size_is_no_worse_than_a_config_json(tmp_path, metadata):
    folder = index_only(tmp_path / "ckpt", lambda index: index.update(metadata=metadata))
    with pytest.raises(CheckpointError, match="total_size does not fit") as refused:
        source_facts(folder)
    assert len(str(refused.value)) < 500
    facts = source_facts(index_only(folder, lambda index: index.update(metadata=metadata), torch_dtype="bfloat16"))
    assert (facts.dtype, facts.tensors) == ("bfloat16", 23) and "total_size fits no dtype" in facts.assumed


@pytest.mark.parametrize(
    ("change", "settings", "tensors"),
    [
        (with_buffers, {"torch_dtype": "bfloat16"}, 23),
        (lambda index: None, {"torch_dtype": "bfloat16", "tie_word_embeddings": True}, 23),
        (without_head, {"torch_dtype": "bfloat16", "tie_word_embeddings": True}, 22),
    ],
)
def test_what_an_index_may_list_as_build_takes_it(tmp_path, change, settings, tensors):
    """Buffers, whose bytes are in total_size; one of two tied weights, or both."""
    found = source_facts(index_only(tmp_path / "ckpt", change, **settings))
    elements = TelechatConfig.from_dict(CONFIG).parameter_count
    elements -= (tensors == 22) * CONFIG["vocab_size"] * CONFIG["hidden_size"]
    assert (found.dtype, found.tensors, found.nbytes) == ("bfloat16", tensors, 2 * elements)
    assert bool(found.assumed) == (change is with_buffers)


def test_an_index_beside_an_adapter_is_still_alone(tmp_path):
    folder = index_only(tmp_path / "ckpt", torch_dtype="bfloat16")
    (folder / "adapter_model.safetensors").write_bytes(bytes(64))
    assert source_facts(folder).tensors == 23


def test_what_is_neither_a_file_nor_a_folder(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    make_checkpoint(tmp_path / "ckpt")
    for path in (Path("/dev/null"), tmp_path / "pipe", tmp_path / "absent"):
        expected = "is not there" if path.name == "absent" else "is neither a folder nor a regular file"
        for read in (open_checkpoint, source_facts):
            with pytest.raises(InputError, match=f"^{path}: checkpoint {expected}$"):
                read(path)
        with pytest.raises(InputError, match=f"^{path}: adapter {expected}$"):
            open_checkpoint(tmp_path / "ckpt", adapters=[path])


def test_plan_says_that_build_would_refuse_the_length(tmp_path):
    scaled = {"rope_scaling": {"rope_type": "dynamic", "factor": 1.0}}
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | scaled))
    for length, refused in ((512, False), (513, True)):
        done = run("plan", "--checkpoint", tmp_path, "--max-seq-len", length, "--no-probe", "--json")
        facts = json.loads(done.stdout)
        assert ("--max-seq-len: is beyond max_position_embeddings" in facts.get("build_refusal", "")) is refused
    done = run("plan", "--variant", "7b", "--block-size", 4096, "--no-probe", "--json")
    assert "--block-size: is out of range" in json.loads(done.stdout)["build_refusal"]


def test_a_config_json_is_enough_to_plan(tmp_path):
    (tmp_path / "ckpt").mkdir()
    path = tmp_path / "ckpt" / "config.json"
    path.write_text(json.dumps(CONFIG))
    config = TelechatConfig.from_dict(CONFIG)
    planned = []
    for checkpoint in (tmp_path / "ckpt", path):
        facts = json.loads(run("plan", "--checkpoint", checkpoint, "--tp", 2, "--no-probe", "--json").stdout)
        assert facts["source"] == {"tensors": 23, "bytes": 4 * config.parameter_count, "dtype": "float32"}
        assert "names no dtype" in facts["assumed"] and not facts.get("tokenizer")
        planned.append(facts["files"])
    make_checkpoint(tmp_path / "ckpt", "float32")
    facts = json.loads(run("plan", "--checkpoint", tmp_path / "ckpt", "--tp", 2, "--no-probe", "--json").stdout)
    assert planned == [facts["files"], facts["files"]] and facts["tokenizer"] and "assumed" not in facts
    path.write_text(json.dumps(CONFIG | {"torch_dtype": "bfloat16"}))
    facts = json.loads(run("plan", "--checkpoint", path, "--no-probe", "--json").stdout)
    assert facts["dtype"] == "bfloat16" and facts["source"]["bytes"] == 2 * config.parameter_count


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.model", "version https://git-lfs.github.com/spec/v1\n", "tokenizer.model: is a Git LFS pointer"),
        ("tokenizer_config.json", '{"chat_template": "{% for"}', "tokenizer_config.json: "),
        ("generation_config.json", '{"eos_token_id": [512]}', "eos_token_id: id lies outside the vocabulary"),
        ("config.json", '{"model_type": "telechat3"}', "TeleChat3"),
        ("model.gguf", "GGUF", "GGUF"),
        ("pytorch_model.bin.index.json", '{"weight_map": {"w": "pytorch_model.bin"}}', "23 weights are missing"),
    ],
)
def test_plan_refuses_before_a_download_what_build_would_after(tmp_path, name, content, message):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    train_tiny_tokenizer(tmp_path)
    (tmp_path / name).write_text(content)
    done = run("plan", "--checkpoint", tmp_path, "--no-probe")
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_plan_of_every_published_config(shared, tmp_path):
    for name, config in json.loads(shared("published/configs.json").read_text()).items():
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(config))
        done = run("plan", "--checkpoint", path, "--no-probe", "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["dtype"] == config.get("torch_dtype", "float16")
