"""`service-config` as a command: what it writes, prints and refuses."""

from __future__ import annotations

import json
import os
import shutil
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.checkpoints import make_checkpoint
from typer.testing import CliRunner

from telechat_mindie.cli import app
from telechat_mindie.model_dir.build import BuildOptions, build
from telechat_mindie.model_dir.layout import ModelDir
from telechat_mindie.service import schema
from telechat_mindie.service.facts import model_facts, model_name

FREE = ("--port-base", "23025")  # others on this machine may hold MindIE's own


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Two ranks, 512 tokens."""
    root = tmp_path_factory.mktemp("service")
    make_checkpoint(root / "ckpt", "float16")
    build(root / "telechat2", root / "ckpt", BuildOptions(tp=2, block_size=16))
    return root / "telechat2"


@pytest.fixture(scope="module")
def odd(model):
    """The same under a name that MindIE refuses."""
    return Path(shutil.copytree(model, model.parent / "my model!"))


def run(model, *arguments, cwd):
    command = [sys.executable, "-m", "telechat_mindie", "service-config", str(model), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=cwd)


def test_facts(model, odd):
    facts = model_facts(ModelDir.open(model))
    assert (facts.tp, facts.max_seq_len, facts.block_size, facts.vocab_size) == (2, 512, 16, 512)
    assert facts.weight_bytes_per_rank == (model / "rank_0" / "model-00001-of-00001.safetensors").stat().st_size
    assert facts.kv_bytes_per_token_per_rank == 2 * 2 * 2 * 8 * 2  # layers, k and v, heads of a rank, head_dim, bytes
    assert (facts.model_name, facts.model_path) == ("telechat2", str(model))
    assert model_facts(ModelDir.open(odd)).model_name == "my-model"


@pytest.mark.parametrize(
    ("folder", "name"),
    [("TeleChat2-7B", "TeleChat2-7B"), ("星辰 7b", "7b"), ("_a_", "a"), ("星辰", "telechat2"), ("a" * 300, "a" * 256)],
)
def test_model_names_are_ones_that_mindie_takes(folder, name):
    assert model_name(folder) == name


def test_a_path_that_mindie_refuses(odd, tmp_path):
    done = run(odd, "--insecure-http", *FREE, cwd=tmp_path)
    assert done.returncode == 2 and "modelWeightPath" in done.stderr


def test_stdout(model, tmp_path):
    done = run(model, "--insecure-http", "--devices", "4-5", "--device-mem", "64", *FREE, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    config = json.loads(done.stdout)
    assert schema.validate(config, "3.0.0.beta") == []
    backend = config["BackendConfig"]
    assert backend["npuDeviceIds"] == [[4, 5]]
    assert backend["ModelDeployConfig"]["ModelConfig"][0]["modelWeightPath"] == str(model)
    assert done.stderr == ""


def test_a_file_is_written_whole_with_mode_0640(model, tmp_path):
    old = os.umask(0o000)
    try:
        done = run(model, "--insecure-http", "-o", "config.json", *FREE, cwd=tmp_path)
    finally:
        os.umask(old)
    assert done.returncode == 0 and done.stdout.startswith("config.json: for MindIE 3.0.0.beta")
    assert stat.S_IMODE((tmp_path / "config.json").stat().st_mode) == 0o640
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.json"]

    again = run(model, "--insecure-http", "-o", "config.json", *FREE, cwd=tmp_path)
    assert again.returncode == 2 and "--force" in again.stderr and "--template" in again.stderr
    assert run(model, "--insecure-http", "-o", "config.json", "--force", *FREE, cwd=tmp_path).returncode == 0


def test_patching_in_place_keeps_the_users_text(model, tmp_path):
    config = schema.default_config("2.0")
    config["mine"] = {"kept": True}
    (tmp_path / "c.json").write_text(json.dumps(config, indent="\t"))
    done = run(model, "--template", "c.json", "-o", "c.json", "--mindie", "2.0", "--insecure-http", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "warning: $.mine: unknown-key" in done.stderr
    text = (tmp_path / "c.json").read_text()
    patch = ("--template", "c.json", "--mindie", "2.0", "--insecure-http", "--json")
    (unknown,) = json.loads(run(model, *patch, cwd=tmp_path).stdout)["warnings"]
    assert set(unknown) == {"path", "rule", "expected", "found", "repair", "severity"}
    assert '\t"mine": {\n\t\t"kept": true\n\t}' in text and list(json.loads(text)) == list(config)


def test_explain(model, tmp_path):
    done = run(model, "--insecure-http", "--set", "maxBatchSize=7", "--explain", *FREE, cwd=tmp_path)
    lines = done.stdout.splitlines()
    batch = next(line for line in lines if "ScheduleConfig.maxBatchSize = 7" in line)
    assert batch.startswith("* ") and batch.endswith("flag            --set")
    as_json = json.loads(
        run(model, "--insecure-http", "--explain", "--json", "--max-seq-len", "256", *FREE, cwd=tmp_path).stdout
    )
    by_path = {row["path"]: row for row in as_json}
    assert by_path["$.BackendConfig.ModelDeployConfig.maxSeqLen"]["value"] == 256
    assert by_path["$.BackendConfig.ModelDeployConfig.maxInputTokenLen"]["origin"] == "computed"
    assert len(lines) == 1 + len(as_json)


def test_json_names_the_certificates(model, tmp_path):
    done = run(model, "--json", "--mindie-home", tmp_path, *FREE, cwd=tmp_path)
    result = json.loads(done.stdout)
    assert result["config"]["ServerConfig"]["httpsEnabled"] is True
    assert {item["present"] for item in result["certificates"]} == {False}
    keys = {"path", "file", "present", "role", "kind", "is_revocation"}
    assert all(set(item) == keys for item in result["certificates"])
    roles = {(item["role"], item["is_revocation"]) for item in result["certificates"]}
    assert roles == {("server", False), ("server key", False), ("authority", False), ("revoked", True)}
    assert "tlsPk" in done.stderr and "--insecure-http" in done.stderr


def test_certificates_that_mindie_would_refuse_are_warned_about(model, tmp_path):
    key = tmp_path / "security/keys/server.key.pem"
    key.parent.mkdir(parents=True)
    key.write_text("PEM")
    key.chmod(0o644)
    done = run(model, "--json", "--mindie-home", tmp_path, *FREE, cwd=tmp_path)
    assert "warning: $.ServerConfig.tlsPk: names security/keys/server.key.pem, which has mode 0644" in done.stderr
    assert "chmod 640" in done.stderr and "server_crl.pem (tlsCrlFiles)" in done.stderr


def test_certificates_are_made_and_looked_up_in_the_home_below_the_named_folder(model, tmp_path):
    daemon = tmp_path / "mindie/latest/mindie-service/bin/mindieservice_daemon"
    daemon.parent.mkdir(parents=True)
    daemon.touch(mode=0o750)
    for made in (("--make-test-certificates",), ()):
        done = run(model, "--json", "--mindie-home", tmp_path / "mindie", *made, *FREE, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert {item["present"] for item in json.loads(done.stdout)["certificates"]} == {True}
        assert "missing" not in done.stderr and "which is not in" not in done.stderr
    assert (daemon.parent.parent / "security/keys/server.key.pem").is_file()


def test_no_certificates_are_made_where_the_output_is_refused(model, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "link.json").symlink_to("config.json")
    for output in ("config.json", "link.json", "config.json/config.json"):
        made = ("--make-test-certificates", "--mindie-home", tmp_path)
        assert run(model, "-o", output, *made, *FREE, cwd=tmp_path).returncode == 2
        assert not (tmp_path / "security").exists(), output


def test_the_folder_of_the_output_is_made(model, tmp_path):
    done = run(model, "--insecure-http", "-o", "conf/of/it/config.json", *FREE, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    made = tmp_path / "conf/of/it/config.json"
    assert stat.S_IMODE(made.stat().st_mode) == 0o640 and stat.S_IMODE(made.parent.stat().st_mode) == 0o750


def test_certificates_belong_to_the_effective_user(model, tmp_path, monkeypatch):
    key = tmp_path / "security/keys/server.key.pem"
    key.parent.mkdir(parents=True)
    key.write_text("PEM")
    key.chmod(0o640)
    monkeypatch.setattr(os, "geteuid", lambda: key.stat().st_uid + 1)
    done = CliRunner().invoke(app, ["service-config", str(model), "--mindie-home", str(tmp_path), *FREE])
    assert f"MindIE runs as {key.stat().st_uid + 1}" in done.stderr


def test_log_settings_are_told_where_they_count(model, tmp_path):
    done = run(model, "--insecure-http", "--set", "LogConfig.dynamicLogLevel=debug", *FREE, cwd=tmp_path)
    assert done.returncode == 0 and "warning: $.LogConfig.dynamicLogLevel: other-file" in done.stderr


def test_instances(model, tmp_path):
    done = run(model, "--insecure-http", "--instances", 2, "--devices", "0,2,4,6", *FREE, cwd=tmp_path)
    backend = json.loads(done.stdout)["BackendConfig"]
    assert backend["modelInstanceNumber"] == 2 and backend["npuDeviceIds"] == [[0, 2], [4, 6]]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--devices", "0"), "--devices 0"),
        (("--devices", "0-3"), "--instances 2"),
        (("--max-seq-len", "4096"), "--max-seq-len"),
        (("--max-input-len", "512"), "--max-input-len"),
        (("--set", "maxBatchsize=1"), "maxBatchSize"),
        (("--set", "ServerConfig.port=80"), "1024 to 65535"),
        (("--port-base", "80"), "--port-base 80"),
        (("--device-mem", "0"), "--device-mem"),
        (("--mindie", "9"), "2.0"),
        (("--template", "nowhere.json"), "nowhere.json"),
        (("-o", "link.json/config.json"), "cannot be written"),
        (("-o", "link.json"), "symbolic link"),
        (("--mindie", "3.0"), "no MindSpore backend"),
        (("--make-test-certificates", "--mindie-home", "."), "httpsEnabled true"),
    ],
)
def test_refusals_are_one_line_and_write_nothing(model, tmp_path, arguments, words):
    (tmp_path / "link.json").symlink_to("config.json")
    done = run(model, "--insecure-http", *arguments, cwd=tmp_path)
    assert done.returncode == 2 and words in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["link.json"]


def test_ports_that_are_taken_here_do_not_reach_a_config_for_another_machine(model, tmp_path):
    with socket.socket() as other:
        other.bind(("", 0))
        port = min(other.getsockname()[1], 65533)
        done = run(model, "--insecure-http", "--port-base", port, cwd=tmp_path)
    assert json.loads(done.stdout)["ServerConfig"]["port"] == port, done.stderr
