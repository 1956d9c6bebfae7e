"""`check`: each failure staged, found with its advice, repaired, clean."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from helpers.checkpoints import MOE, make_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from telechat_mindie.findings import Report
from telechat_mindie.kv_budget import DEFAULT_CARD_GB
from telechat_mindie.mindie import GENERATIONS
from telechat_mindie.model_dir.build import BuildOptions, build
from telechat_mindie.model_dir.layout import ModelDir
from telechat_mindie.model_dir.parts import Parts
from telechat_mindie.nano import write_checkpoint
from telechat_mindie.service import ports, schema
from telechat_mindie.service.check import CheckOptions, check, isolated
from telechat_mindie.service.facts import model_facts
from telechat_mindie.service.options import ServiceOptions
from telechat_mindie.service.render import render_service_config

OWNER = 4321  # MindIE's user; the tests themselves may run as root, which is exempt from most file rules
YAML = "predict_telechat2_1m.yaml"
SHARD = "model-00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of two ranks."""
    root = tmp_path_factory.mktemp("built")
    make_checkpoint(root / "ckpt", "float16")
    build(root / "telechat", root / "ckpt", BuildOptions(tp=2, block_size=16))
    return root / "telechat"


@pytest.fixture
def model(built: Path, tmp_path: Path) -> Path:
    """A copy, free to be damaged."""
    return Path(shutil.copytree(built, tmp_path / "telechat"))


@pytest.fixture
def config(model: Path, tmp_path: Path) -> Path:
    """Its service config."""
    return write_config(model, tmp_path / "conf.json")


@pytest.fixture
def options(monkeypatch: pytest.MonkeyPatch) -> CheckOptions:
    """MindIE's user owns the files, its environment is bare, and no modules are imported, which takes seconds."""
    monkeypatch.setattr(isolated, "_run", lambda *_: {"imports": {}, "tokenizer": {"error": "not run in this test"}})
    monkeypatch.setattr(isolated, "_tokenizer", lambda *_: iter(()))
    port = ports.free_run(38090, 2)
    environment = {"PATH": os.environ["PATH"], "MS_SCHED_PORT": str(port), "LCAL_IF_PORT": str(port + 1)}
    return CheckOptions(uid=os.geteuid() or OWNER, environment=environment, device_mem_gb=DEFAULT_CARD_GB)


@pytest.fixture(autouse=True)
def owned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of the user who runs the tests are MindIE's user's."""
    if os.geteuid() != 0:
        return
    real = Path.lstat

    def lstat(path: Path) -> os.stat_result:
        status = real(path)
        return os.stat_result((*status[:4], OWNER, *status[5:10])) if status.st_uid == 0 else status

    monkeypatch.setattr(Path, "lstat", lstat)


def write_config(model: Path, path: Path, **choices: Any) -> Path:
    base = choices.pop("port_base", 21025)
    chosen = ServiceOptions(insecure_http=True, port_base=base, **choices)
    path.write_text(render_service_config(model_facts(ModelDir.open(model)), chosen).text)
    path.chmod(0o640)
    return path


def ids(report: Report, severity: str = "error") -> set[str]:
    return {finding.id for finding in report.findings if finding.severity == severity}


def advice(report: Report, id: str) -> str:
    return next(finding.advice for finding in report.findings if finding.id == id and finding.severity != "ok")


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def substitute(path: Path, pattern: str, replacement: str) -> None:
    text, count = re.subn(pattern, replacement, path.read_text(), flags=re.MULTILINE)
    assert count, pattern
    path.write_text(text)


def edit_shard(path: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    path.chmod(0o640)


def test_a_fresh_directory_and_its_config_are_clean(model, config, options):
    report = check(model, replace(options, service_config=config, full=True))
    assert report.exit_code == 0, report.with_severity("error") + report.with_severity("warning")
    assert {"files", "contents", "weights", "modules", "hashes", "service-config"} <= ids(report, "ok")


def test_nano_in_a_clean_process(tmp_path):
    """`build`, `service-config`, `check`: what a person does first, nothing replaced."""
    write_checkpoint(tmp_path / "ckpt")
    build(tmp_path / "telechat2-nano", tmp_path / "ckpt")
    config = write_config(tmp_path / "telechat2-nano", tmp_path / "config.json", devices="0")
    user = os.geteuid() or OWNER
    chosen = CheckOptions(service_config=config, full=True, uid=user, environment={"PATH": os.environ["PATH"]})
    report = check(tmp_path / "telechat2-nano", chosen)
    assert report.exit_code == 0, report
    tokenizer = next(finding for finding in report.findings if finding.id == "tokenizer")
    assert "<_user>生抽与老抽的区别？<_bot>" in tokenizer.message
    assert not list(tmp_path.rglob("__pycache__"))


class TestFiles:
    """MindIE's file rules: pitfalls 1 and 2."""

    def test_modes_and_their_repair(self, model, options):
        (model / "config.json").chmod(0o644)
        (model / "tokenizer.model").chmod(0o755)
        (model / "rank_0").chmod(0o755)
        report = check(model, options)
        assert {"file-mode", "folder-mode"} <= ids(report) and report.exit_code == 2
        assert "config.json (0644)" in str(report) and "rank_0 (0755)" in str(report)
        assert f"find {model} -type d -exec chmod 750" in advice(report, "file-mode")

        report = check(model, replace(options, fix=True))
        assert report.exit_code == 0
        assert any("chmod 640" in line and "config.json (was 644)" in line for line in report.repairs)
        assert len(report.repairs) == 3
        modes = {stat.S_IMODE(path.stat().st_mode) for path in model.rglob("*")}
        assert modes == {0o640, 0o750}
        assert check(model, replace(options, fix=True)).repairs == ()

    def test_the_printed_command_repairs_as_well(self, model, options):
        for path in model.rglob("*"):
            path.chmod(0o777)
        command = advice(check(model, options), "file-mode").partition("or: ")[2].partition(" (chmod -R")[0]
        subprocess.run(["bash", "-c", command], check=True)
        assert check(model, options).exit_code == 0

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [({"uid": 0}, "root"), ({"environment": {"MINDIE_CHECK_INPUTFILES_PERMISSION": "0"}}, "PERMISSION=0")],
    )
    def test_exemptions_are_told_as_such(self, model, options, changes, reason):
        (model / "config.json").chmod(0o666)
        report = check(model, replace(options, **changes))
        assert report.exit_code == 1 and "file-mode" in ids(report, "warning")
        assert reason in next(finding.message for finding in report.findings if finding.id == "file-mode")

    def test_fix_gives_the_owner_back_what_he_needs_and_follows_no_link(self, model, options, tmp_path):
        other = tmp_path / "other"
        other.write_text("mine")
        other.chmod(0o666)
        (model / "link").symlink_to(other)
        (model / "telechat.py").chmod(0)
        assert "unreadable" in ids(check(model, options))
        report = check(model, replace(options, fix=True))
        assert len(report.repairs) == 1 and "telechat.py" in report.repairs[0]
        assert stat.S_IMODE(other.stat().st_mode) == 0o666

    def test_links_in_and_to_the_directory(self, model, options, tmp_path):
        shard = model / "rank_0" / SHARD
        shard.rename(tmp_path / "blob")
        shard.symlink_to(tmp_path / "blob")
        report = check(model, options)
        assert "link" in ids(report)
        subprocess.run(["bash", "-c", advice(report, "link").partition(": ")[2]], check=True)
        assert check(model, options).exit_code == 0

    def test_a_linked_directory_is_judged_by_what_it_names(self, model, options, tmp_path):
        """MindIE resolves modelWeightPath first: safe_path.cpp."""
        link = tmp_path / "模型"  # a name that MindIE takes in a link alone
        link.symlink_to(model)
        assert check(link, options).exit_code == 0
        model.chmod(0o755)
        assert ids(check(link, options)) == {"folder-mode"}
        assert check(link, replace(options, fix=True)).exit_code == 0
        model.rename(tmp_path / "模")
        link.unlink()
        link.symlink_to(tmp_path / "模")
        assert ids(check(link, options)) == {"path"}

    @pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
    def test_a_linked_json_is_judged_by_what_it_names(self, model, options, tmp_path, name):
        file = model / name
        file.rename(tmp_path / name)
        file.symlink_to(tmp_path / name)
        assert check(model, options).exit_code == 0
        (tmp_path / name).chmod(0o644)
        assert ids(check(model, options)) == {"file-mode"}
        (tmp_path / name).unlink()
        assert "link" in ids(check(model, options))

    def test_what_is_too_deep_is_dropped(self, model, options):
        edit(model / "config.json", lambda data: data.update(extra=[[[[[[[[[[[1]]]]]]]]]]]))
        report = check(model, options)
        assert not ids(report) and "config-depth" in ids(report, "warning")

    def test_foreign_owner(self, model, options):
        report = check(model, replace(options, uid=options.uid + 1))
        assert "owner" in ids(report)
        assert advice(report, "owner") == f"As root: chown -R {options.uid + 1} {model}"

    def test_path_characters(self, model, options, tmp_path):
        odd = model.rename(tmp_path / "my model")
        assert "path" in ids(check(odd, options))
        assert check(odd.rename(model), options).exit_code == 0

    def test_names_that_a_terminal_would_obey(self, model, options):
        (Path(os.fsdecode(os.fsencode(model) + b"/bad\xff\x1b[31m"))).touch()
        report = check(model, options)
        assert "path" in ids(report)
        assert str(report).isprintable() and json.dumps(report.as_dict(), ensure_ascii=False).encode()

    def test_a_fifo_does_not_hang_it(self, model, options):
        (model / "config.json").unlink()
        os.mkfifo(model / "config.json", 0o640)
        assert {"special-file", "config-json"} <= ids(check(model, replace(options, full=True)))


class TestContents:
    """pitfalls 7, 8 and 18, and what else the daemon reads."""

    def test_two_yamls(self, model, options):
        (model / "old.yaml").write_text("model: {}")
        (model / "old.yaml").chmod(0o640)
        report = check(model, options)
        assert ids(report) == {"yaml-count"}
        assert advice(report, "yaml-count") == f"Move old.yaml out of the directory; build wrote {YAML}."
        (model / "old.yaml").unlink()
        assert check(model, options).exit_code == 0

    def test_no_yaml(self, model, options):
        (model / YAML).unlink()
        assert {"yaml-count", "missing-file"} <= ids(check(model, options))

    @pytest.mark.parametrize("name", ["telechat.py", "tokenizer.model", "config.json", f"rank_1/{SHARD}"])
    def test_missing_files(self, model, options, name):
        (model / name).unlink()
        report = check(model, options)
        assert report.exit_code == 2 and Path(name).name in str(report.with_severity("error"))
        assert "telechat-mindie build" in str(report)

    @pytest.mark.parametrize(
        ("change", "id"),
        [
            (lambda data: data.pop("torch_dtype"), "config-field"),
            (lambda data: data.update(model_type=7), "config-field"),
            (lambda data: data.pop("vocab_size"), "config-field"),
            (lambda data: data.update(vocab_size=-1), "config-field"),
            (lambda data: data.update(torch_dtype="float32"), "dtype"),
        ],
    )
    def test_config_json(self, model, options, change, id):
        edit(model / "config.json", change)
        assert id in ids(check(model, options))

    def test_top_k_limit(self, model, options):
        edit(model / "generation_config.json", lambda data: data.update(top_k=1000))  # of 512 tokens
        report = check(model, options)
        assert ids(report) == {"top-k"} and '"top_k" to 512' in advice(report, "top-k")
        edit(model / "generation_config.json", lambda data: data.update(top_k=512))
        assert check(model, options).exit_code == 0
        edit(model / "generation_config.json", lambda data: data.update(top_k=2))
        assert "top-k" not in ids(check(model, options), "warning")  # the yaml gives a request none
        substitute(model / YAML, "^    top_k: 0", "    top_k: 5")
        assert "top-k" in ids(check(model, options), "warning")

    def test_stray_files(self, model, options):
        save_file({"x": np.zeros(1, np.float16)}, model / "rank_0" / "more.safetensors")
        (model / "notes.txt").write_text("")
        report = check(model, options)
        assert {"extra-weights", "tensor-names"} <= ids(report) and "extra-file" in ids(report, "warning")

    def test_a_manifest_cannot_lead_out(self, model, options, tmp_path):
        (tmp_path / "secret").write_text("secret")
        entry = {"nbytes": 6, "sha256": "0"}
        edit(model / "manifest.json", lambda data: data["files"].update({"../secret": entry, "/etc/passwd": entry}))
        report = check(model, replace(options, full=True))
        assert ids(report) == {"manifest"} and len(report.with_severity("error")) == 2

    def test_hashes(self, model, options):
        with open(model / "rank_0" / SHARD, "r+b") as file:
            file.seek(-1, os.SEEK_END)
            last = file.read(1)[0]
            file.seek(-1, os.SEEK_END)
            file.write(bytes([last ^ 1]))
        substitute(model / YAML, "^    top_p:.*", "    top_p: 0.9")
        assert check(model, options).exit_code == 0
        seen: list[int] = []
        report = check(model, replace(options, full=True), lambda total: seen.append)
        assert ids(report) == {"hash"} and ids(report, "warning") == {"edited"}
        assert sum(seen) > 100_000


class TestWeights:
    """The yaml against the weights: pitfall 6, defects f to h of the manual recipe."""

    @pytest.mark.parametrize(
        ("pattern", "replacement", "id"),
        [
            ("qkv_concat: true", "qkv_concat: false", "qkv-concat"),
            ("model_parallel: 2", "model_parallel: 1", "yaml-tp"),
            ("use_parallel: true", "use_parallel: false", "yaml-tp"),
            ('param_init_type: "float16"', 'param_init_type: "bfloat16"', "dtype"),
            ('compute_dtype: "float16"', 'compute_dtype: "float32"', "dtype"),
            ("num_layers: 2", "num_layers: 3", "layers"),
            ("n_kv_heads: 4", "n_kv_heads: 8", "yaml-shape"),
            ("block_size: 16", "block_size: none", "yaml-value"),
            ("vocab_file: 'tokenizer.model'", "vocab_file: '/old/tokenizer.model'", "tokenizer-path"),
            ("AutoModel: .*", "Auto: x.Y", "auto-map"),
            ("type: telechat_mindie.backend.model_runner", "type: ParallelTelechatForCausalLM", "arch-type"),
        ],
    )
    def test_yaml(self, model, options, pattern, replacement, id):
        before = (model / YAML).read_text()
        substitute(model / YAML, pattern, replacement)
        report = check(model, options)
        assert id in ids(report), report
        assert advice(report, id)
        (model / YAML).write_text(before)
        assert check(model, options).exit_code == 0

    def test_a_missing_and_an_extra_rank(self, model, options):
        shutil.copytree(model / "rank_1", model / "rank_2")
        assert "rank-folders" in ids(check(model, options))
        shutil.rmtree(model / "rank_2")
        shutil.rmtree(model / "rank_1")
        report = check(model, options)
        assert {"rank-folders", "missing-file"} <= ids(report) and "rank_1" in str(report)

    @pytest.mark.parametrize(
        ("change", "id"),
        [
            (lambda tensors: tensors.pop("model.norm_out.weight"), "tensor-names"),
            (lambda tensors: tensors.update(more=np.zeros(1, np.float16)), "tensor-names"),
            (lambda tensors: tensors.update({"lm_head.weight": np.zeros((3, 64), np.float16)}), "shape"),
            (lambda tensors: tensors.update({"lm_head.weight": np.zeros((256, 64), np.float32)}), "dtype"),
            (lambda tensors: tensors.update({"model.layers.7.x": np.zeros(1, np.float16)}), "layers"),
            (
                lambda tensors: tensors.update(
                    {"model.tok_embeddings.embedding_weight": np.zeros((200, 64), np.float16)}
                ),
                "vocabulary",
            ),
        ],
    )
    def test_every_rank_is_looked_at(self, model, options, change, id):
        edit_shard(model / "rank_1" / SHARD, change)
        assert id in ids(check(model, options))

    def test_a_truncated_shard(self, model, options):
        with open(model / "rank_0" / SHARD, "r+b") as file:
            file.truncate(1000)
        assert {"weights", "size"} <= ids(check(model, options))

    def test_unpacked_and_moe_directories_are_clean(self, options, tmp_path):
        make_checkpoint(tmp_path / "dense")
        make_checkpoint(tmp_path / "moe", **MOE)
        build(tmp_path / "a", tmp_path / "dense", BuildOptions(qkv_concat=False, block_size=16))
        build(tmp_path / "b", tmp_path / "moe", BuildOptions(block_size=16))
        assert check(tmp_path / "a", options).exit_code == 0
        assert check(tmp_path / "b", options).exit_code == 0
        edit(tmp_path / "b" / "config.json", lambda data: data.update(num_local_experts=8))
        assert "experts" in ids(check(tmp_path / "b", options))
        edit(tmp_path / "b" / "config.json", lambda data: data.update(num_local_experts=2**30))
        assert "config-json" in ids(check(tmp_path / "b", options))


class TestModules:
    """Imported in a fresh process; not run when they are not ours. Pitfall 8."""

    def test_a_module_of_the_mindformers_tree(self, model, options):
        (model / "telechat.py").write_text(
            "from research.telechat2.infer.telechat import X as ParallelTelechatForCausalLM"
        )
        report = check(model, options)
        assert "module" in ids(report) and "imports research" in str(report)

    @pytest.mark.parametrize("text", ["def (", "\0", "x = 1\n" * 200_000])
    def test_a_broken_module(self, model, options, text):
        (model / "telechat.py").write_text(text)
        assert "module" in ids(check(model, options))

    def test_a_foreign_module_is_not_run(self, model, tmp_path):
        canary = tmp_path / "canary"
        code = f"open({str(canary)!r}, 'w')\nclass TelechatConfig: pass\n"
        (model / "telechat_config.py").write_text(code)
        for shadow in ("numpy.py", "json.py", "mindspore.py", "sitecustomize.py"):
            (model / shadow).write_text(code)
        report = check(model, CheckOptions(uid=0, environment={"PATH": os.environ["PATH"]}))
        assert "module-changed" in ids(report, "warning") and "tokenizer" in ids(report, "ok")
        assert not canary.exists()

    def test_a_tokenizer_that_does_not_fit_or_is_none(self, model):
        """Pitfall 18, with the real process."""
        chosen = CheckOptions(uid=0, environment={"PATH": os.environ["PATH"]})
        edit(model / "config.json", lambda data: data.update(vocab_size=256, padded_vocab_size=256))
        report = check(model, chosen)
        assert "tokenizer" in ids(report) and "256" in str(report)
        (model / "tokenizer.model").write_bytes(b"nonsense")
        assert {"tokenizer", "size"} <= ids(check(model, chosen))

    def test_a_chat_template_without_turns(self, model):
        edit(model / "tokenizer_config.json", lambda data: data.update(chat_template="{{ messages[0].content }}"))
        report = check(model, CheckOptions(uid=0, environment={"PATH": os.environ["PATH"]}))
        assert "chat-prompt" in ids(report, "warning")
        assert "remove" not in str(report).lower()  # a model's own template is what it was trained on

    def test_a_thinking_template_and_one_without_tools(self, model):
        template = "{% if tools %}{{ tools[0].no.name }}{% endif %}<_user>{{ messages[0].content }}<_bot><think>\n"
        (model / "chat_template.jinja").write_text(template, encoding="utf-8")
        (model / "chat_template.jinja").chmod(0o640)
        report = check(model, CheckOptions(uid=0, environment={"PATH": os.environ["PATH"]}))
        assert "chat-tools" in ids(report, "warning") and "chat_template.jinja" in str(report)
        assert not {"chat-prompt", "extra-file"} & set(ids(report, "warning"))

    def test_time_out(self, model):
        chosen = CheckOptions(uid=0, environment={"PATH": os.environ["PATH"]}, timeout=0.01)
        assert "module-timeout" in ids(check(model, chosen))

    def test_a_python_without_the_package(self, model, monkeypatch, tmp_path):
        broken = tmp_path / "python"
        broken.write_text("#!/bin/sh\necho No module named telechat_mindie >&2\nexit 1\n")
        broken.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(broken))
        report = check(model, CheckOptions(uid=0, environment={"PATH": os.environ["PATH"]}))
        assert "module" in ids(report) and f"{broken} -m pip install " in str(report)


SERVICE_FAULTS: list[tuple[str, str, Any, str]] = [
    # pitfall 3: worldSize, npuDeviceIds and modelInstanceNumber disagree
    ("BackendConfig.ModelDeployConfig.ModelConfig.0.worldSize", "tp", 1, "--tp 1"),
    ("BackendConfig.npuDeviceIds", "world-size", [[0]], "worldSize"),
    ("BackendConfig.modelInstanceNumber", "instances", 2, "modelInstanceNumber"),
    # 4: more KV cache than the card has, and too little for a request
    ("BackendConfig.ModelDeployConfig.ModelConfig.0.npuMemSize", "memory", 65, "npuMemSize"),
    # 5: what -1 may not be
    ("BackendConfig.ModelDeployConfig.ModelConfig.0.npuMemSize", "range", -2, "-1"),
    # 15: ranges
    ("ServerConfig.ipAddress", "all-zero-ip", "0.0.0.0", "allowAllZeroIpListening"),
    ("BackendConfig.ScheduleConfig.maxPrefillTokens", "prefill-tokens", 100, "maxInputTokenLen"),
    ("BackendConfig.ModelDeployConfig.ModelConfig.0.modelName", "pattern", "-x", "matches"),
    ("ServerConfig.port", "range", 80, "1024"),
    # the model
    ("BackendConfig.ModelDeployConfig.maxSeqLen", "model-length", 4096, "--max-seq-len"),
    ("BackendConfig.ModelDeployConfig.ModelConfig.0.modelWeightPath", "model-path", "/elsewhere", "Set it to"),
    ("BackendConfig.ModelDeployConfig.ModelConfig.0.backendType", "backend-type", "atb", "ms"),
]


class TestServiceConfig:
    def set(self, path: Path, location: str, value: Any) -> None:
        def change(data: Any) -> None:
            *steps, last = (int(step) if step.isdigit() else step for step in location.split("."))
            for step in steps:
                data = data[step]
            data[last] = value

        edit(path, change)

    @pytest.mark.parametrize(("location", "id", "value", "words"), SERVICE_FAULTS)
    def test_faults(self, model, config, options, location, id, value, words):
        before = config.read_text()
        self.set(config, location, value)
        report = check(model, replace(options, service_config=config))
        assert id in ids(report), report.with_severity("error")
        assert words in advice(report, id)
        config.write_text(before)
        assert check(model, replace(options, service_config=config)).exit_code == 0

    def test_too_few_blocks_for_one_request(self, config, options, tmp_path):
        """Pitfall 4, at the size of the 7B: 16 GB of weights, 0.5 MB of cache a token."""
        from test_service_config import FACTS_7B

        from telechat_mindie.service.check import check_config

        rendered = render_service_config(FACTS_7B, ServiceOptions(insecure_http=True, port_base=22025)).config
        place = rendered["BackendConfig"]["ModelDeployConfig"]["ModelConfig"][0]
        assert place["npuMemSize"] > 30
        for size, id in ((1, "kv-blocks"), (60, "memory")):
            place["npuMemSize"] = size
            found = list(check_config(rendered, config, FACTS_7B, options))
            assert id in {finding.id for finding in found if finding.severity == "error"}
        place["npuMemSize"] = -1  # pitfall 5: this package's runner takes it
        assert not [
            finding for finding in check_config(rendered, config, FACTS_7B, options) if finding.severity != "ok"
        ]
        for card, id in ((16, "memory"), (20, "kv-blocks")):  # a fifth of it is kept free
            small = replace(options, device_mem_gb=card)
            assert [finding.id for finding in check_config(rendered, config, FACTS_7B, small)] == [id]

    def test_answers_cut_at_512_tokens(self, model, config, options):
        """Pitfall 11; the directory's 512 tokens leave 128 for an answer."""
        self.set(config, "BackendConfig.ScheduleConfig.maxIterTimes", 20)
        report = check(model, replace(options, service_config=config))
        assert ids(report, "warning") == {"answer-room"} and "Raise it" in advice(report, "answer-room")

    def test_block_size(self, model, config, options):
        self.set(config, "BackendConfig.ScheduleConfig.cacheBlockSize", 128)
        report = check(model, replace(options, service_config=config))
        assert ids(report, "warning") == {"model-block-size"}

    def test_a_port_in_use_names_its_holder(self, model, config, options):
        """Pitfall 12."""
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            port = listener.getsockname()[1]
            self.set(config, "ServerConfig.managementPort", port)
            report = check(model, replace(options, service_config=config))
            found = next(finding for finding in report.findings if finding.id == "port")
            assert found.severity == "warning" and f"(pid {os.getpid()})" in found.message
            write_config(model, config, port_base=port)
            assert check(model, replace(options, service_config=config)).exit_code == 0

    def test_a_wrong_address(self, model, config, options):
        self.set(config, "ServerConfig.ipAddress", "192.0.2.1")  # TEST-NET-1, no machine's
        report = check(model, replace(options, service_config=config))
        assert "address" in ids(report, "warning")
        environment = {**options.environment, "MIES_CONTAINER_IP": "127.0.0.1"}
        assert check(model, replace(options, service_config=config, environment=environment)).exit_code == 0

    def test_certificates(self, model, config, options, tmp_path):
        """Pitfall 15: https without certificates. `test_certificates.py` has each rule."""
        self.set(config, "ServerConfig.httpsEnabled", True)
        chosen = replace(options, service_config=config, mindie_home=tmp_path)
        report = check(model, chosen)
        assert "certificate" in ids(report) and "security/keys/server.key.pem" in str(report)
        for finding in report.findings:
            if finding.id == "certificate":
                file = tmp_path / finding.message.split()[1].rstrip(",")
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text("PEM")
                file.chmod(0o640)
        assert check(model, chosen).exit_code == 0

    def test_the_file_itself(self, model, config, options):
        config.chmod(0o644)
        chosen = replace(options, service_config=config)
        assert ids(check(model, chosen)) == {"file-mode"}
        assert check(model, replace(chosen, fix=True)).exit_code == 0
        for text in ("", "{", "[]", '{"a": 1, "a": 2}', "{}"):
            config.write_text(text)
            assert check(model, chosen).exit_code == 2
        config.unlink()
        assert "service-config" in ids(check(model, chosen))

    def test_root_is_not_exempt(self, model, config, options, monkeypatch):
        """Of the model directory it is; conf/config.json is judged by older code."""
        root = replace(options, uid=0, environment={**options.environment, "MINDIE_CHECK_INPUTFILES_PERMISSION": "0"})
        found = {finding.id: finding for finding in check(model, replace(root, service_config=config)).findings}
        assert found["owner"].severity == "error" and "not even root" in found["owner"].message  # OWNER's
        config.chmod(0o660)
        assert {"owner", "file-mode"} <= ids(check(model, replace(root, service_config=config)))
        closed = replace(root, service_config=config, generation="2.3")
        assert not {"owner", "file-mode"} & ids(check(model, closed))

    def test_its_path_may_hold_any_characters(self, model, config, options, tmp_path):
        odd = tmp_path / "配置 (1).json"
        config.rename(odd)
        assert check(model, replace(options, service_config=odd)).exit_code == 0

    def test_a_link_is_refused_by_the_environment_alone(self, model, config, options, tmp_path):
        link = tmp_path / "link.json"
        link.symlink_to(config)
        chosen = replace(options, service_config=link)
        report = check(model, chosen)
        assert report.exit_code == 1 and "--config-file" in advice(report, "link")
        named = {**options.environment, "MIES_CONFIG_JSON_PATH": str(link)}
        assert ids(check(model, replace(chosen, environment=named))) == {"link"}
        (tmp_path / "home/conf").mkdir(parents=True)
        own = tmp_path / "home/conf/config.json"
        own.symlink_to(config)
        home = replace(options, service_config=own, mindie_home=tmp_path / "home")
        assert ids(check(model, home)) == {"link"}
        config.chmod(0o644)  # the rules are for what it names
        assert ids(check(model, chosen)) == {"file-mode"}

    def test_log_settings_count_in_mindies_own_file_alone(self, model, config, options, tmp_path):
        own = tmp_path / "home/conf/config.json"
        own.parent.mkdir(parents=True)
        chosen = replace(options, service_config=config, mindie_home=tmp_path / "home")
        self.set(config, "LogConfig.dynamicLogLevel", "debug")
        report = check(model, chosen)
        assert ids(report, "warning") == {"other-file"} and not ids(report)
        shutil.copy(config, own)
        own.chmod(0o640)
        assert check(model, replace(chosen, service_config=own)).exit_code == 0
        self.set(config, "LogConfig.dynamicLogLevel", "")
        assert check(model, chosen).exit_code == 0
        for text, faults in (('{"LogConfig": {}}', {"home-log-config"}), ("{}", set()), ("{", set())):
            own.write_text(text)
            assert ids(check(model, chosen)) == faults, text
        own.write_text('{"LogConfig": {"dynamicLogLevel": ""}}')
        assert "dynamicLogLevelValidHours" in str(check(model, chosen))

    @pytest.mark.parametrize(
        "content",
        ["{", "[]", '{"a": 1}', '{"a": "/no/such/folder"}', '{"-a-": "HERE"}', '{"a": "HERE/模型"}'],
    )
    def test_a_broken_lora_adapter_json_keeps_the_service_down(self, model, config, options, tmp_path, content):
        (tmp_path / "模型").mkdir()
        file = model / "lora_adapter.json"
        file.write_text(content.replace("HERE", str(tmp_path)))
        file.chmod(0o640)
        report = check(model, replace(options, service_config=config))
        assert "lora-adapter" in ids(report) and "build --adapter" in advice(report, "lora-adapter")
        # With LoraModules the file is not read.
        self.set(config, "BackendConfig.ModelDeployConfig.LoraModules", [])
        assert "lora-adapter" not in ids(check(model, replace(options, service_config=config)))

    @pytest.mark.parametrize("odd", ["\0", "~nobody-of-that-name/x", "n" * 5000, "LOOP"])
    def test_odd_paths_are_findings(self, model, config, options, tmp_path, odd):
        (tmp_path / "loop").symlink_to(tmp_path / "loop")
        odd = odd.replace("LOOP", str(tmp_path / "loop"))
        (model / "lora_adapter.json").write_text(json.dumps({"a": odd}))
        (model / "lora_adapter.json").chmod(0o640)
        self.set(config, "ServerConfig.httpsEnabled", True)
        self.set(config, "ServerConfig.tlsCert", odd)
        self.set(config, "BackendConfig.multiNodesInferEnabled", True)
        environment = {**options.environment, "RANK_TABLE_FILE": odd}
        chosen = replace(options, service_config=config, mindie_home=tmp_path, environment=environment)
        assert {"lora-adapter", "certificate", "rank-table"} <= ids(check(model, chosen))
        assert check(tmp_path / "loop", replace(options, service_config=tmp_path / "loop", fix=True)).exit_code == 2

    def test_adapters_that_are_there_are_loaded_by_nobody(self, model, config, options, tmp_path):
        folder = tmp_path / "adapter"
        folder.mkdir(mode=0o750)
        (model / "lora_adapter.json").write_text(json.dumps({"a": str(folder)}))
        (model / "lora_adapter.json").chmod(0o640)
        chosen = replace(options, service_config=config)
        report = check(model, chosen)
        assert not ids(report) and "lora-adapter" in ids(report, "warning")
        folder.chmod(0o777)
        assert ids(check(model, chosen)) == {"folder-mode"}
        (model / "lora_adapter.json").unlink()
        (model / "lora_adapter.json").symlink_to(tmp_path / "elsewhere.json")
        (tmp_path / "elsewhere.json").write_text("{}")
        assert "lora-adapter" in ids(check(model, chosen))

    def test_lora_modules(self, model, config, options, tmp_path):
        entry = {"name": "a", "path": str(tmp_path / "none"), "baseModelName": "telechat"}
        self.set(config, "BackendConfig.ModelDeployConfig.LoraModules", [entry])
        chosen = replace(options, service_config=config)
        assert ids(check(model, chosen)) == {"lora-adapter"}
        (tmp_path / "none").mkdir(mode=0o750)
        report = check(model, chosen)
        assert not ids(report) and ids(report, "warning") == {"ms-lora"}

    @pytest.mark.parametrize("generation", [name for name, row in GENERATIONS.items() if row.ms_backend])
    def test_generations(self, model, config, options, generation):
        write_config(model, config, generation=generation)
        report = check(model, replace(options, service_config=config, generation=generation))
        assert report.exit_code == 0, report

    def test_everything_is_read_once(self, model, config, options, monkeypatch):
        read: list[Path] = []
        for owner, name in ((Parts, "read"), (schema, "load")):
            real = getattr(owner, name)
            monkeypatch.setattr(owner, name, lambda path, real=real: read.append(path) or real(path))
        assert check(model, replace(options, service_config=config)).exit_code == 0
        assert read == [model, config]

    def test_a_directory_that_cannot_be_read(self, model, config, options, monkeypatch):
        access = os.access
        monkeypatch.setattr(os, "access", lambda path, mode, **rest: path != model and access(path, mode, **rest))
        assert ids(check(model, replace(options, service_config=config))) == {"unreadable"}


class TestEnvironment:
    """Pitfalls 13 and 17."""

    @pytest.mark.parametrize(
        ("variables", "id", "severity"),
        [
            ({"MINDIE_LLM_FRAMEWORK_BACKEND": "ATB"}, "framework-backend", "error"),
            ({"MINDIE_LLM_HOME_PATH": "/x"}, "framework-backend", "warning"),
            ({"MINDIE_ASYNC_SCHEDULING_ENABLE": "1"}, "async-scheduling", "error"),
            ({"MINDIE_CHECK_INPUTFILES_PERMISSION": "0"}, "permission-check", "warning"),
            ({"MS_ROLE": "MS_WORKER"}, "leftover", "warning"),
            ({"MS_SCHED_PORT": "port"}, "rank-port", "error"),
            ({"MS_SCHED_PORT": "80"}, "rank-port", "error"),
            ({"MS_SCHED_PORT": "{port}"}, "rank-port", "error"),
            ({"MS_SCHED_PORT": "9000", "LCAL_IF_PORT": "9000"}, "rank-port", "error"),
            ({"MS_SCHED_HOST": "192.0.2.1"}, "rank-port", "error"),
            ({"NPU_MEMORY_FRACTION": "1.5"}, "variable", "error"),
            ({"NPU_MEMORY_FRACTION": "nan"}, "variable", "error"),
            ({"RANK_TABLE_FILE": "/no/such/file"}, "rank-table", "warning"),
            ({"ASCEND_RT_VISIBLE_DEVICES": "3"}, "visible-devices", "error"),
            ({"ASCEND_RT_VISIBLE_DEVICES": "1,0"}, "visible-devices", "error"),
            ({"MIES_CONFIG_JSON_PATH": "/other.json"}, "config-path", "warning"),
        ],
    )
    def test_variables(self, model, config, options, variables, id, severity):
        port = json.loads(config.read_text())["ServerConfig"]["port"]
        filled = {name: value.format(port=port) for name, value in variables.items()}
        chosen = replace(options, service_config=config, environment={**options.environment, **filled})
        report = check(model, chosen)
        assert id in ids(report, severity), report
        assert advice(report, id)

    @pytest.mark.parametrize(
        "changes",
        [
            {"BackendConfig.multiNodesInferEnabled": True, "BackendConfig.interNodeTLSEnabled": False},
            {"BackendConfig.ScheduleConfig.distributedEnable": True},
            {
                "ServerConfig.layerwiseDisaggregatedRoleType": "slave",
                "BackendConfig.layerwiseDisaggregated": {
                    "layerwiseDisaggregatedMultiNodesInferEnabled": True,
                    "layerwiseDisaggregatedMultiNodesCtrlPort": 10003,
                },
            },
        ],
        ids=["multiNodes", "distributed", "layerwise"],
    )
    def test_several_machines_need_a_rank_table(self, model, config, options, tmp_path, changes):
        for location, value in changes.items():
            TestServiceConfig().set(config, location, value)
        chosen = replace(options, service_config=config)
        assert ids(check(model, chosen)) == {"rank-table"}
        table = tmp_path / "ranks.json"
        table.write_text('{"server_count": "2", "server_list": []}')
        table.chmod(0o640)
        chosen = replace(chosen, environment={**options.environment, "RANK_TABLE_FILE": str(table)})
        assert not ids(check(model, chosen))
        table.chmod(0o644)
        assert ids(check(model, chosen)) == {"file-mode"}
        table.chmod(0o640)
        for text in ("{", '{"server_count": 2}', '{"server_count": "1"}', '{"server_count": "61"}'):
            table.write_text(text)
            assert ids(check(model, chosen)) == {"rank-table"}, text
        table.rename(tmp_path / "real.json")
        table.symlink_to(tmp_path / "real.json")
        assert ids(check(model, chosen)) == {"rank-table"}

    def test_what_launch_would_set_is_clean(self, model, config, options):
        variables = {
            **options.environment,
            "MINDIE_LLM_HOME_PATH": "/x",
            "MINDIE_LLM_FRAMEWORK_BACKEND": "MS",
            "MS_SCHED_HOST": "127.0.0.1",
            "MIES_CONFIG_JSON_PATH": str(config),
            "ASCEND_RT_VISIBLE_DEVICES": "4,5",
        }
        report = check(model, replace(options, service_config=config, environment=variables))
        assert report.exit_code == 0, report

    def test_a_second_instance_on_the_same_scheduler_port(self, model, config, options):
        with socket.socket() as listener:
            listener.bind(("", 0))
            listener.listen()
            variables = {**options.environment, "MS_SCHED_PORT": str(listener.getsockname()[1])}
            report = check(model, replace(options, service_config=config, environment=variables))
        assert ids(report, "warning") == {"rank-port"} and "launch" in advice(report, "rank-port")

    def test_instances_of_one_daemon_share_the_port(self, model, options, tmp_path):
        config = write_config(model, tmp_path / "two.json", instances=2)
        report = check(model, replace(options, service_config=config))
        assert ids(report, "warning") == {"shared-scheduler"}


class TestDamage:
    """No damage gives a traceback, and none passes for clean."""

    def test_not_a_directory(self, options, tmp_path):
        assert ids(check(tmp_path / "nowhere", options)) == {"model-dir"}
        (tmp_path / "file").touch()
        assert ids(check(tmp_path / "file", options)) == {"model-dir"}
        (tmp_path / "empty").mkdir(mode=0o750)
        assert {"config-json", "manifest", "yaml-count", "missing-file"} <= ids(check(tmp_path / "empty", options))

    @pytest.mark.parametrize("name", ["config.json", "manifest.json", "generation_config.json", YAML])
    @pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b"{}", b"null", b"[" * 100_000])
    def test_every_file_may_be_nonsense(self, model, options, name, content):
        (model / name).write_bytes(content)
        report = check(model, replace(options, full=True))
        assert report.exit_code == 2 or (name == "generation_config.json" and content == b"{}")

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_any_value_may_be_anything(self, model, config, options, data):
        """One value of one of the four files becomes something else."""
        path = data.draw(st.sampled_from([model / "config.json", model / "manifest.json", model / YAML, config]))
        before = path.read_text()
        content = yaml.safe_load(before)  # JSON is YAML
        leaves = list(locations(content))
        *steps, last = data.draw(st.sampled_from(leaves))
        node = content
        for step in steps:
            node = node[step]
        odd = st.sampled_from([None, True, -1, 0, 2**40, 10**400, 1.5, "", "x", [], {}, [[1]], {"a": {"b": 1}}])
        node[last] = data.draw(odd)
        try:
            path.write_text(yaml.safe_dump(content) if path.suffix == ".yaml" else json.dumps(content))
            check(model, replace(options, service_config=config, full=True))
        finally:
            path.write_text(before)


def locations(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*here, key)
        yield from locations(item, (*here, key))


def test_the_command(model, config, tmp_path):
    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "telechat_mindie", "check", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    done = run(model, "--service-config", config, "--json")
    assert done.returncode == 0, done.stdout
    assert json.loads(done.stdout)["exit_code"] == 0
    (model / "old.yaml").write_text("model: {}")
    done = run(model)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    lines = done.stdout.splitlines()
    index = next(i for i, line in enumerate(lines) if line.startswith("error yaml-count:"))
    assert lines[index + 1].strip().startswith("Move old.yaml")
    assert run(model, "--mindie", "9").returncode == 2
