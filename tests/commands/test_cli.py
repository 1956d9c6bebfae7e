"""The command line: cheap to start, one line of error, output for people and for programs."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from telechat_mindie import __version__
from telechat_mindie.model_dir.build import build
from telechat_mindie.nano import write_checkpoint


def run(*arguments, **options):
    command = [sys.executable, "-m", "telechat_mindie", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    root = tmp_path_factory.mktemp("nano")
    write_checkpoint(root / "ckpt")
    build(root / "model", root / "ckpt")
    return root / "model"


def test_help_and_version():
    done = run("--help")
    assert done.returncode == 0 and "build" in done.stdout and "generate" in done.stdout
    assert run("--version").stdout.strip() == f"telechat-mindie {__version__}"
    done = run("no-such-command")
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_help_imports_nothing_heavy():
    code = (
        "import sys, telechat_mindie.cli\n"
        "heavy = {'mindspore', 'numpy', 'sentencepiece', 'jinja2', 'rich', 'pydantic', 'yaml'} & set(sys.modules)\n"
        "print(sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_building_imports_no_framework(nano, tmp_path):
    code = (
        "import sys; from pathlib import Path; from telechat_mindie.model_dir.build import build\n"
        f"build(Path({str(tmp_path / 'again')!r}), Path({str(nano.parent / 'ckpt')!r}))\n"
        "print('mindspore' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False False", done.stderr


def test_info(nano):
    facts = json.loads(run("info", nano, "--json").stdout)
    assert facts["parameters"] == 2497728
    assert (facts["dtype"], facts["tp"], facts["vocab_size"]) == ("bfloat16", 1, 2400)
    assert facts["kv_bytes_per_token_per_rank"] == 4 * 2 * 64 * 2
    assert facts["kv_tokens"] == ((8 << 30) // (1024 * 128) - 1) * 128  # the last block is reserved
    table = run("info", nano).stdout
    assert "2,497,728" in table and "bfloat16" in table


def test_generate(nano):
    done = run("generate", nano, "生抽与老抽的区别？")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("生抽和老抽都是酱油") and done.stdout.endswith("。\n")
    loading, figures = done.stderr.splitlines()
    assert loading == f"loading weights: {nano}" and "tokens/s" in figures
    assert run("generate", nano, "-q", "--max-new-tokens", 1, "hi").stderr == ""
    assert "debug: loaded in " in run("-v", "generate", nano, "--max-new-tokens", 1, "hi").stderr


def test_generate_options(nano):
    arguments = ("generate", nano, "<_start><_user>What is MindIE?<_bot>", "--raw", "--json", "--max-new-tokens", 5)
    answers = [json.loads(run(*arguments, "--temperature", 1.5, "--seed", seed).stdout) for seed in (1, 1, 2)]
    assert answers[0]["text"] == answers[1]["text"]
    assert answers[0]["generated_tokens"] == 5 and answers[0]["finish_reason"] == "length"
    greedy = json.loads(run(*arguments).stdout)
    assert greedy["text"].startswith("MindIE is")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "nowhere", "hi"), "nowhere: is not a directory"),
        (("info", "."), "is not a model directory"),
        (("generate", "{nano}", "hi", "--temperature", "-1"), "temperature"),
        (("generate", "{nano}", "hi", "--raw", "--system", "x"), "--system"),
        (("nano", "{nano}"), "exists and is not empty"),
        (("build", "x", "--checkpoint", "nowhere"), "nowhere"),
        (("plan", "--variant", "8b"), "--variant: unknown size (expected 3b or 7b"),
        (("export", "--variant", "8b"), "--variant: unknown size (expected 3b or 7b"),
        (("chat", "{nano}", "--cert", "own.pem", "--model", "m"), "--model, --client-cert: is for a service"),
    ],
)
def test_refusals(nano, tmp_path, arguments, message):
    done = run(*(str(argument).format(nano=nano) for argument in arguments), cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
