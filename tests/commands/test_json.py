"""`--json` of every command: what its schema says, and nothing beyond it."""

from __future__ import annotations

import json
import re

import jsonschema_rs
import pytest
import typer
from helpers import ROOT
from helpers.atb import make_atb_directory, make_w8a8_directory
from helpers.fake_mindie import FakeMindie
from helpers.json_schemas import FOLDER, checked
from helpers.server import nano_directory
from helpers.stand_in_trainer import StandInTrainer
from typer.testing import CliRunner

from telechat_mindie.cli import app
from telechat_mindie.findings import Report, error
from telechat_mindie.service.launch.processes import Identity
from telechat_mindie.service.launch.rundir import LaunchPlan, RunDirectory

SCHEMAS = sorted(path.name.removesuffix(".schema.json") for path in FOLDER.glob("*.json"))


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "telechat-mindie"


def printed(*arguments, codes=(0,)):
    done = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert done.exit_code in codes, (done.exception, done.output)
    return json.loads(done.stdout)


def test_every_command_that_prints_json_has_a_schema():
    group = typer.main.get_command(app)
    commands = dict(group.commands.items())
    bench = commands.pop("bench")
    commands |= {f"bench-{name}": command for name, command in bench.commands.items()}
    with_json = {name for name, command in commands.items() if any("--json" in param.opts for param in command.params)}
    forms = {
        *("doctor-matrix", "finetune-dry-run", "finetune-render", "info-atb", "info-training-run", "launch-dry-run"),
        *("plan-atb", "service-config-explain"),
    }
    assert set(SCHEMAS) == with_json | forms


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_schema_is_one_and_is_documented(name):
    schema = json.loads((FOLDER / f"{name}.schema.json").read_text(encoding="utf-8"))
    jsonschema_rs.meta.validate(schema)
    text = (ROOT / "docs" / "json.md").read_text(encoding="utf-8")
    assert f"| `{schema['title'].removeprefix('telechat-mindie ')}` |" in text and f"(json/{name}.schema.json)" in text
    assert schema["description"] in text


def test_documentation_names_no_schema_that_is_not_there():
    text = (ROOT / "docs" / "json.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"\(json/(.*?)\.schema\.json\)", text)) == SCHEMAS


def test_a_key_too_many_or_too_few_is_noticed():
    data = {"model_path": "m", "backend": "ms", "dtype": "float16", "tp": 1, "weight_bytes": 1}
    checked("build", data)
    for wrong in ({**data, "new": 1}, {"model_path": "m"}, {**data, "tp": "1"}):
        with pytest.raises(AssertionError, match="build: "):
            checked("build", wrong)


def test_from_checkpoint_to_directory(tmp_path):
    checkpoint, model = nano_directory().parent / "checkpoint", tmp_path / "model"
    checked("build", printed("build", model, "--checkpoint", checkpoint))
    checked("verify", printed("verify", model))
    checked("info", printed("info", model))
    checked("manifests", printed("manifests", model, "--kind", "docker", "--insecure-http", "-o", tmp_path / "deploy"))
    (model / "tokenizer.model").chmod(0o600)
    (model / "tokenizer.model").write_bytes(b"x")
    problems = checked("verify", printed("verify", model, codes=(2,)))["problems"]
    assert problems


def test_from_checkpoint_to_directory_for_atb(tmp_path):
    checkpoint, model = tmp_path / "checkpoint", tmp_path / "model"
    make_atb_directory(checkpoint)
    options = ("--checkpoint", checkpoint, "--backend", "atb", "--tp", 2)
    assert checked("plan-atb", printed("plan", *options, "--target", tmp_path, "--device-mem", 1))["fit"]["sequences"]
    checked("build", printed("build", model, *options))
    checked("verify", printed("verify", model))
    assert "quantised" not in checked("info-atb", printed("info", model))
    checked("service-config", printed("service-config", model))


def test_w8a8_by_msmodelslim(tmp_path):
    source, model = tmp_path / "source", tmp_path / "model"
    make_w8a8_directory(source)
    shown = checked("info-atb", printed("info", source))
    assert shown["quantised"] == "W8A8" and shown["quantised_layers"] and shown["float_layers"]
    options = ("--checkpoint", source, "--backend", "atb")
    assert "fit" not in checked("plan-atb", printed("plan", *options, "--target", tmp_path))
    assert checked("build", printed("build", model, *options))["dtype"] == "W8A8"
    checked("verify", printed("verify", model, "--against", source))


def test_plan(tmp_path):
    checkpoint = nano_directory().parent / "checkpoint"
    options = ("--target", tmp_path, "--device-mem", 16)
    full = checked("plan", printed("plan", "--checkpoint", checkpoint, *options))
    assert full["tokenizer"] and full["fit"]["kv_tokens"] > 0
    assert full["smallest"] == full["fit"] == full["cards"][0]
    options = ("--tp", 2, "--max-seq-len", 10_000_000, "--target", tmp_path, "--device-mem", 8)
    long = checked("plan", printed("plan", "--variant", "7b", *options))
    assert long["build_refusal"] and long["smallest"] is None and long["fit"] in long["cards"]
    assert all(fit["refusal"] and not fit["fits"] for fit in long["cards"])


def test_configs():
    checked("service-config", printed("service-config", nano_directory()))
    checked("service-config-explain", printed("service-config", nano_directory(), "--explain"))


def test_reports(tmp_path):
    checked("doctor", printed("doctor", codes=(0, 1, 2)))
    checked("doctor-matrix", printed("doctor", "--matrix"))
    assert checked("check", printed("check", tmp_path, codes=(2,)))["findings"]
    checked("check", json.loads(json.dumps(Report.of([error("x", "w", "m")], ["r"]).as_dict())))


def test_generate():
    found = checked("generate", printed("generate", nano_directory(), "hi", "--max-new-tokens", 2))
    assert found["generated_tokens"] == 2


def test_launches_that_are_recorded(state):
    assert checked("status", printed("status")) == []
    urls = {"business": "http://127.0.0.1:1025", "management": "http://127.0.0.1:1026"}
    plan = LaunchPlan("a", "/m", "2.3", ("x",), {}, {"port": 1025}, urls, None, "nano", Identity(1, 1.0), cards=(0,))
    RunDirectory(state / "a").create(plan, "{}")
    (row,) = checked("status", printed("status", codes=(1,)))
    assert row["state"] == "not started" and row["pid"] is None
    assert checked("stop", printed("stop", "a"))["was_active"] is False
    assert checked("stop", printed("stop", "--all")) == []


def test_preprocess(tmp_path):
    (tmp_path / "data.jsonl").write_text('{"input": "甲", "output": "乙"}\n')
    arguments = (tmp_path / "data.jsonl", "-o", tmp_path / "rows", "--tokenizer", nano_directory(), "--max-length", 64)
    assert checked("preprocess", printed("preprocess", *arguments))["examples"] == 1


class Trainer(StandInTrainer):
    """As `finetune` makes one, without the seconds of a compiler."""

    def __init__(self, config, weights, optimization, computation, lora, *, rank, device):
        super().__init__(computation)
        self._given = dict(weights)

    def trained(self, *, copied=True):
        return self._given


def test_finetune(tmp_path, monkeypatch):
    monkeypatch.setattr("telechat_mindie.training.trainer.Trainer", Trainer)
    monkeypatch.setattr("telechat_mindie.training.curve.draw", lambda *_: True)
    monkeypatch.setenv("TELECHAT_DEVICE", "cpu")
    data, run = tmp_path / "data.jsonl", tmp_path / "run"
    data.write_text('{"input": "甲", "output": "乙"}\n' * 4)
    arguments = ("finetune", nano_directory().parent / "checkpoint", data, "-o", run, "--max-length", 63, "--steps", 1)
    dry = checked("finetune-dry-run", printed(*arguments, "--dry-run", "--eval-share", 0.25))
    assert (dry["lora"], dry["rows"], dry["held_out"]) == (None, 3, 1)
    assert checked("finetune-dry-run", printed(*arguments, "--dry-run", "--lora", "4,8"))["memory"]["weights"]
    done = checked("finetune", printed(*arguments))
    assert done["result"] == str(run / "model") and done["eval_loss"] is None
    (run / "loss.csv").unlink()
    assert "loss" not in checked("finetune", printed(*arguments, "--resume"))
    other = (*arguments[:4], tmp_path / "held-out", *arguments[5:], "--eval", data)
    assert checked("finetune", printed(*other))["eval_loss"] == 2.0


def test_finetune_by_mindformers(tmp_path):
    checkpoint, data, rows = nano_directory().parent / "checkpoint", tmp_path / "data.jsonl", tmp_path / "rows"
    data.write_text('{"input": "甲", "output": "乙"}\n' * 4)
    printed("preprocess", data, "-o", rows, "--tokenizer", checkpoint, "--max-length", 64)
    options = ("--render", "mindformers", "--cards", 1, "--max-length", 64)
    made = checked("finetune-render", printed("finetune", checkpoint, rows, "-o", tmp_path / "run", *options))
    assert made["rows"] == 4 and "finetune.yaml" in made["files"]
    options = ("--variant", "39b-a12b", "--nodes", 16, "--pp", 4, "--offset", "-1,1,1,1")
    proposed = checked("finetune-render", printed("finetune", "--render", "mindformers", *options))
    assert proposed["output"] is None and proposed["proposals"][0]["offset"] == [[-1, 1, 1, 1]]


def test_load_tests(tmp_path):
    report = tmp_path / "report.json"
    with FakeMindie() as fake:
        options = ("--url", fake.url, "--requests", 2, "--warm-up", 0, "--output", report)
        checked("bench-serve", printed("bench", "serve", *options))
        checked("bench-serve", json.loads(report.read_text()))
        fake.faults["/v1/chat/completions"] = (503, "{}")
        empty = checked("bench-serve", printed("bench", "serve", *options[:-1], tmp_path / "lost.json", codes=(1,)))
    assert empty["ttft_ms"] is None and empty["failed"] == {"HTTP 503": 2}
    checked("bench-compare", printed("bench", "compare", report, tmp_path / "lost.json"))
