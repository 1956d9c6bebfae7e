"""tools/first_npu_session: on a CPU from end to end, and what it sends back."""

from __future__ import annotations

import http.server
import importlib.util
import os
import socket
import subprocess
import sys
import tarfile
import threading
import time

import numpy as np
import pytest
from helpers import ROOT

SCRIPT = ROOT / "tools" / "first_npu_session.sh"


@pytest.fixture(scope="module")
def session():
    spec = importlib.util.spec_from_file_location("first_npu_session", SCRIPT.with_suffix(".py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_without_a_card_from_end_to_end(tmp_path):
    """Every step that needs no card runs, the others say why not, and one that fails stops none after it."""
    (tmp_path / "broken").mkdir()
    python = os.path.relpath(sys.executable, tmp_path)
    environment = os.environ | {"TELECHAT_DEVICE": "cpu", "PYTHON": python, "HF_TOKEN": "hf_notforanybody"}
    command = ["bash", str(SCRIPT), "--fast", "--output", "session", "--checkpoint", "broken", "--mindformers"]
    command.append("echo generate speed: 12.5 tokens/s with HF_TOKEN=$HF_TOKEN; exit 3")
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr
    steps = dict(line.split("\t")[:2] for line in (tmp_path / "session/steps.tsv").read_text().splitlines())
    doctor = steps.pop("doctor")
    assert doctor in ("ok", "exit code 1", "exit code 2")  # what this machine has is not this test's business
    assert steps.pop("model-build") == "exit code 2" and steps.pop("mindformers") == "exit code 3"
    assert {steps.pop(name) for name in ("npu-smi", "nano-compare", "kernels-raw")} == {"skipped: needs a card"}
    assert set(steps.values()) == {"ok"} and {"nano-calls", "tp2-compare", "nano-speed", "service"} <= set(steps)
    assert str(tmp_path / "broken") in (tmp_path / "session/model-build.log").read_text()
    with tarfile.open(tmp_path / "session.tar.gz") as archive:
        names = {member.name.partition("/")[2] for member in archive}
        texts = b"".join(archive.extractfile(member).read() for member in archive.getmembers()).decode()
    assert {"summary.md", "doctor.log", "nano-calls.log", "bench-serve.json", "mindformers-speed.txt"} <= names
    assert not [name for name in names if name.endswith((".npz", ".safetensors", ".model"))]
    assert "hf_notforanybody" not in texts and "12.5 tokens/s" in texts
    assert "prefix hit against prefill: at most" in texts and "host memory:" in texts


def test_secrets_and_names_stay_here(session, monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "node-17")
    monkeypatch.setenv("USER", "wangwu")
    monkeypatch.setenv("HOME", "/home/wangwu")
    text = (
        "node-17: wangwu ran it in /home/wangwu/models from 10.2.3.4, mac 00:1A:2B:3C:4D:5E\n"
        'HF_TOKEN=hf_abcdefgh "api_key": "sk-12345678" PASSWORD: hunter22222\n'
        "PASSWORD=abc123 https_proxy=http://bob:hunter22@proxy.corp:3128 Authorization: Bearer abcdefghijkl\n"
        "fe80::1ff:fe23:4567:890a peer:[2001:db8::17]:1025, at fd12::34: no route, 2001:db8:0:1:2:3:4:99\n"
        "output_tokens: 12345678, token_ids: 123456789, 127.0.0.1 and MindSpore 2.10.0, 0000:C1:00.0\n"
        "max token: 4096, 12:34:56, [::1]:1025, ge::Format::ND, http://127.0.0.1:1025/v1"
    )
    shown = session.scrub(text)
    for private in ("node-17", "wangwu", "10.2.3.4", "00:1A", "hf_abc", "sk-1", "hunter"):
        assert private not in shown
    for private in ("abc123", "bob", "abcdefghijkl", "fe80", "890a", "2001:db8", "::17", "fd12", "::34", ":99"):
        assert private not in shown
    for useful in ("12345678,", "123456789,", "127.0.0.1", "2.10.0", "0000:C1:00.0"):
        assert useful in shown
    for useful in ("://<removed>@proxy.corp:3128", "]:1025, at", ": no route", "token: 4096", "12:34:56", "[::1]:1025"):
        assert useful in shown
    assert shown.endswith("ge::Format::ND, http://127.0.0.1:1025/v1")


SERVICE = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path("ended").touch(), sys.exit()))
pathlib.Path("started").touch()
time.sleep(50)
"""


def test_a_service_that_takes_too_long_is_ended(tmp_path):
    """`timeout` signals its group, and the step dies of that without a word to the service."""
    (tmp_path / "telechat_mindie").mkdir()
    (tmp_path / "telechat_mindie" / "__main__.py").write_text(SERVICE)  # `python -m` finds it first
    command = ["timeout", "600", sys.executable, SCRIPT.with_suffix(".py"), "service", "model", "report.json"]
    with subprocess.Popen([*command, "--device", "ascend"], cwd=tmp_path) as step:
        wait_until((tmp_path / "started").exists)
        step.terminate()  # timeout does the same as at its limit
    wait_until((tmp_path / "ended").exists)


def wait_until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_service_is_asked_without_a_proxy(session, monkeypatch):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    class Ending:
        """A service that is gone when it is looked for again."""

        returncode = None

        def poll(self):
            before, self.returncode = self.returncode, 3
            return before

    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # which would refuse
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        session.wait_for(f"http://127.0.0.1:{server.server_port}", Ending())
        server.shutdown()


def test_another_token_is_a_fault(session, capsys):
    rows = np.array([[0.0, 5.0, 4.0]], np.float32)
    session.agree("same", rows, rows + 0.01)
    assert "at most 0.0100 apart" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="expected the same logits"):
        session.agree("other", rows, np.array([[6.0, 0.0, 4.0]], np.float32))


def test_an_unknown_option_shows_the_usage(tmp_path):
    done = subprocess.run(["bash", str(SCRIPT), "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "--checkpoint" in done.stdout and not list(tmp_path.iterdir())
