"""The files of a finetune by mindformers: keys, commands, data, and the way there and back."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from helpers import cli
from helpers.checkpoints import CONFIG, make_checkpoint
from helpers.strategies import write_ckpt

from telechat_mindie.checkpoint.formats.mindspore import read_mindspore_ckpt
from telechat_mindie.checkpoint.formats.tensors import TensorReader
from telechat_mindie.commands.finetune_render import render_mindformers
from telechat_mindie.data.mindrecord import RowWriter
from telechat_mindie.errors import ConfigError, InputError, OutputError, TelechatMindieError
from telechat_mindie.training.mindformers.layout import Cluster, Layout, Lora, Work, adaptable
from telechat_mindie.training.mindformers.memory import estimate
from telechat_mindie.training.mindformers.propose import Choice, Proposal, propose
from telechat_mindie.training.mindformers.render import Run, render_run
from telechat_mindie.training.mindformers.rows import count_rows
from telechat_mindie.variants import VARIANTS

KNOWN = (Path(__file__).parent / "mindformers_1_6_0_keys.txt").read_text().split()
"""Keys of the four finetune yamls of mindformers 1.6.0's research/telechat2."""

OTHERS = {
    "model.model_config.theta",
    "model.model_config.qkv_concat",
    "model.model_config.embedding_init_type",
    "model.model_config.qkv_has_bias",
    "model.model_config.out_proj_has_bias",
    "model.model_config.pet_config",
    *(
        f"model.model_config.pet_config.{name}"
        for name in (
            "pet_type", "lora_rank", "lora_alpha", "lora_dropout", "param_init_type", "compute_dtype", "target_modules",
        )
    ),
}  # fmt: skip
"""Arguments of its TelechatConfig and LoraConfig that those leave at their defaults."""

SIZES = {"7b": (1, 8), "35b": (2, 8), "115b": (8, 8), "39b-a12b": (16, 8)}


def rendered(name: str, lora: bool = False, layout: Layout | None = None, **options: Any) -> dict[str, str]:
    config, cluster = VARIANTS[name], Cluster(*SIZES[name], 64)
    work = Work(config, 8192, Lora(targets=adaptable(config)) if lora else None, rows=options.pop("rows", None))
    proposal = Proposal(layout, tuple(estimate(layout, work))) if layout else propose(Choice(), work, cluster)[0]
    return render_run(Path("/train/run"), Run(Path("/data/rows"), **options), proposal, work, cluster)


def keys(value: Any, here: tuple[str, ...] = ()) -> set[str]:
    if isinstance(value, list):
        return set().union(*(keys(item, (*here, "[]")) for item in value if isinstance(item, dict)))
    if not isinstance(value, dict):
        return set()
    return {".".join((*here, key)) for key in value}.union(*(keys(item, (*here, key)) for key, item in value.items()))


INTERLEAVED = Layout(tp=8, pp=8, micro_batches=8, interleave=2, recompute="select")


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("name", SIZES)
def test_every_key_is_mindformers_own(name, lora):
    assert keys(yaml.safe_load(rendered(name, lora)["finetune.yaml"])) <= {*KNOWN, *OTHERS}


def test_the_yaml_says_what_the_model_and_the_layout_are():
    config = VARIANTS["115b"]
    made = yaml.safe_load(rendered("115b", layout=INTERLEAVED)["finetune.yaml"])
    model = made["model"]["model_config"]
    assert (model["num_layers"], model["n_kv_heads"], model["intermediate_size"]) == (96, 8, config.ffn_size)
    assert (model["qkv_concat"], model["param_init_type"], model["compute_dtype"]) == (False, "float32", "bfloat16")
    assert (model["pp_interleave_num"], model["offset"]) == (2, 0)
    assert made["parallel"]["pipeline_config"] == {"pipeline_interleave": True, "pipeline_scheduler": "1f1b"}
    parallel = made["parallel_config"]
    assert (parallel["data_parallel"], parallel["model_parallel"], parallel["pipeline_stage"]) == (1, 8, 8)
    assert (parallel["use_seq_parallel"], parallel["micro_batch_num"], parallel["vocab_emb_dp"]) == (True, 8, False)
    assert made["recompute_config"]["select_recompute"] is True
    assert made["recompute_config"]["recompute"] is False
    assert made["auto_trans_ckpt"] is True
    assert made["context"]["max_device_memory"] == "57GB"
    assert "moe_config" not in made
    assert made["train_dataset_task"]["dataset_config"] == made["train_dataset"]


def test_a_model_with_experts_has_its_section():
    made = yaml.safe_load(rendered("39b-a12b")["finetune.yaml"])
    assert (made["moe_config"]["expert_num"], made["moe_config"]["num_experts_chosen"]) == (16, 4)
    assert made["parallel_config"]["expert_parallel"] == 4
    assert made["parallel"]["parallel_optimizer_config"]["optimizer_weight_shard_size"] == 4


def test_an_adapter_freezes_a_16_bit_model():
    files = rendered("7b", lora=True)
    model = yaml.safe_load(files["finetune.yaml"])["model"]["model_config"]
    pet = model["pet_config"]
    assert (pet["lora_rank"], pet["lora_alpha"], pet["param_init_type"]) == (8, 16, "float32")
    assert model["param_init_type"] == "bfloat16"
    for name in ("wq", "wk_v", "wo", "w1", "w2", "w3"):
        assert re.match(pet["target_modules"], name)
    assert not any(re.match(pet["target_modules"], name) for name in ("wq2", "attention", "lm_head", "w_qkv"))
    assert "--to ckpt --dtype bfloat16" in files["README.md"]


def test_accumulation_without_stages_goes_by_another_name():
    layout = Layout(dp=8, micro_batches=4, optimizer_shard=8, recompute="full")
    made = yaml.safe_load(rendered("7b", layout=layout)["finetune.yaml"])
    assert made["runner_config"]["gradient_accumulation_steps"] == 4
    assert made["parallel_config"]["micro_batch_num"] == 1


def test_steps_come_of_the_rows():
    files = rendered("7b", rows=100)
    assert "An epoch: 12 steps" in files["README.md"]
    assert yaml.safe_load(files["finetune.yaml"])["callbacks"][1]["save_checkpoint_steps"] == 12


def test_memory_is_shown_stage_by_stage():
    table = [line for line in rendered("115b")["README.md"].splitlines() if re.match(r"\| \d", line)]
    assert len(table) == 8
    for line in table:
        *parts, total = map(float, line.strip("| ").split(" | ")[2:])
        assert total == pytest.approx(sum(parts), abs=0.4)


@pytest.mark.parametrize(("name", "nodes", "cards"), [("115b", 8, 8), ("7b", 1, 8)])
def test_each_machine_starts_its_part(name, nodes, cards, tmp_path):
    files = rendered(name, master_addr="10.0.0.1" if nodes > 1 else None)
    assert [file for file in files if file.startswith("start")] == [f"start_node_{node}.sh" for node in range(nodes)]
    for node in range(nodes):
        done = start(files, f"start_node_{node}.sh", tmp_path / str(node), "--epochs", "2")
        words = done.stdout.split("\0")
        here = tmp_path / str(node)
        assert words[0] == "msrun"
        assert f"--worker_num={nodes * cards}" in words
        assert f"--local_worker_num={cards}" in words
        assert f"--node_rank={node}" in words
        assert f"--master_addr={'10.0.0.1' if nodes > 1 else '127.0.0.1'}" in words
        program = words.index(f"{here}/home/run_mindformer.py")
        assert words[program + 1 : -1] == [
            "--config", f"{here}/finetune.yaml", "--register_path", f"{here}/home/research/telechat2", "--epochs", "2",
        ]  # fmt: skip


def test_a_single_card_needs_no_msrun(tmp_path):
    work = Work(VARIANTS["3b"], 4096, Lora())
    proposal = propose(Choice(), work, Cluster(1, 1, 64))[0]
    files = render_run(tmp_path, Run(Path("rows")), proposal, work, Cluster(1, 1, 64))
    words = start(files, "start_node_0.sh", tmp_path / "run").stdout.split("\0")
    assert words[:2] == ["python", str(tmp_path / "run" / "home" / "run_mindformer.py")]
    assert yaml.safe_load(files["finetune.yaml"])["use_parallel"] is False


def test_a_machine_that_lacks_something_says_what(tmp_path):
    files = rendered("115b")
    done = start(files, "start_node_0.sh", tmp_path, MINDFORMERS_HOME=str(tmp_path / "nowhere"))
    assert (done.returncode, done.stdout) == (2, "")
    assert "MINDFORMERS_HOME: name the sources of mindformers 1.6.0" in done.stderr
    done = start(files, "start_node_0.sh", tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "MASTER_ADDR: name the first machine's address" in done.stderr
    words = start(files, "start_node_0.sh", tmp_path, MASTER_ADDR="10.0.0.9").stdout.split("\0")
    assert "--master_addr=10.0.0.9" in words


def start(files: dict[str, str], script: str, folder: Path, *arguments: str, **environment: str) -> Any:
    """Run a start script where msrun and python print their words."""
    (folder / "home" / "research" / "telechat2").mkdir(parents=True, exist_ok=True)
    (folder / "bin").mkdir(exist_ok=True)
    for name in ("msrun", "python"):
        (folder / "bin" / name).write_text(f"#!/bin/bash\nprintf '%s\\0' {name} \"$@\"\n")
        (folder / "bin" / name).chmod(0o755)
    for name, text in files.items():
        (folder / name).write_text(text)
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    values = {"PATH": path, "MINDFORMERS_HOME": str(folder / "home")} | environment
    return subprocess.run(
        ["bash", str(folder / script), *arguments], env=values, capture_output=True, text=True, timeout=60
    )


def write_rows(folder: Path, length: int = 33, count: int = 8, largest: int = 500) -> Path:
    folder.mkdir()
    writer = RowWriter(folder, None)
    rng = np.random.default_rng(0)
    for _ in range(count):
        token_ids = rng.integers(4, largest, length).astype(np.int32)
        writer.write(token_ids, np.where(token_ids % 2, token_ids, -100).astype(np.int32))
    writer.close()
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows")


def test_rows_are_counted_and_checked(rows, tmp_path):
    assert count_rows(rows, 32, 512) == count_rows(rows / "dataset.mindrecord", 32, 512) == 8
    with pytest.raises(InputError, match=r"row 0: input_ids: does not fit --max-length 64.*65 tokens, found 33"):
        count_rows(rows, 64, 512)
    with pytest.raises(InputError, match=r"row \d: input_ids: has an id that .*expected 0 to 99, found"):
        count_rows(rows, 32, 100)
    with pytest.raises(InputError, match="holds no mindrecord file"):
        count_rows(tmp_path, 32, 512)
    alone = tmp_path / "dataset.mindrecord"
    alone.write_bytes((rows / "dataset.mindrecord").read_bytes())
    with pytest.raises(InputError, match=r"is without its index .*dataset.mindrecord.db beside it"):
        count_rows(tmp_path, 32, 512)
    alone.write_bytes(b"not one")
    Path(f"{alone}.db").write_bytes(b"neither")
    with pytest.raises(InputError, match=r"dataset.mindrecord: cannot be read: "):
        count_rows(tmp_path, 32, 512)
    with pytest.raises(InputError, match="data is not there"):
        count_rows(tmp_path / "none", 32, 512)


SMALL: dict[str, Any] = {"nodes": 1, "cards": 1, "sequence_length": 32}


def test_the_command_proposes_without_writing(capsys):
    render_mindformers(None, None, None, variant="115b", nodes=8)
    printed = capsys.readouterr().out
    assert "least communication first" in printed
    assert "dp 2, tp 4, pp 8" in printed
    render_mindformers(None, None, None, variant="115b", nodes=8, as_json=True)
    found = json.loads(capsys.readouterr().out)
    first = found["proposals"][0]
    assert (first["dp"], first["tp"], first["pp"], first["global_batch"]) == (2, 4, 8, 64)
    assert max(sum(stage.values()) for stage in first["stage_bytes"]) == pytest.approx(first["peak_bytes"], abs=9)
    assert found["files"] == []


def test_the_command_writes_all_or_nothing(rows, tmp_path, capsys):
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt" / "config.json").write_text(json.dumps(CONFIG))  # which is all that is needed
    render_mindformers(tmp_path / "ckpt", rows, tmp_path / "run", **SMALL)
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == [
        "README.md", "environment.sh", "finetune.yaml", "start_node_0.sh",
    ]  # fmt: skip
    assert "8 rows, 8 steps an epoch" in capsys.readouterr().out
    render_mindformers(tmp_path / "ckpt" / "config.json", rows, tmp_path / "same", **SMALL)
    assert f"convert {tmp_path / 'ckpt'} " in (tmp_path / "same" / "README.md").read_text()
    with pytest.raises(OutputError, match="--force"):
        render_mindformers(tmp_path / "ckpt", rows, tmp_path / "run", **SMALL)
    render_mindformers(tmp_path / "ckpt", rows, tmp_path / "run", **SMALL, force=True, epochs=3)
    assert "epochs: 3" in (tmp_path / "run" / "finetune.yaml").read_text()
    (tmp_path / "run" / "checkpoint.ckpt").touch()  # what the first of its README's commands makes
    with pytest.raises(OutputError, match=r"checkpoint\.ckpt: would be deleted by --force"):
        render_mindformers(tmp_path / "ckpt", rows, tmp_path / "run", **SMALL, force=True)
    (tmp_path / "run" / "checkpoint.ckpt").unlink()
    (tmp_path / "run" / "output").mkdir()
    with pytest.raises(OutputError, match="holds what a run has trained"):
        render_mindformers(tmp_path / "ckpt", rows, tmp_path / "run", **SMALL, force=True)
    with pytest.raises(InputError, match="at least 9, found 8"):
        render_mindformers(tmp_path / "ckpt", rows, tmp_path / "no", **SMALL, batch_size=9)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"variant": None}, "CHECKPOINT, --variant: name one of the two"),
        ({"variant": "9b"}, "--variant: unknown size"),
        ({"output": Path("run")}, "DATA: is needed"),
        ({"offset": "a"}, "--offset: is no list of numbers"),
        ({"dtype": "float32"}, "--dtype: .*expected bfloat16, found float32"),
        ({"lora_rank": 8, "lora_targets": ("query",)}, "LoRA targets: .*found query"),
        ({"device_mem": 2}, "at most 1.8 GB of a card"),
    ],
)
def test_the_command_refuses_by_name(options, sentence):
    given = {"variant": "7b", "output": None} | options
    with pytest.raises(TelechatMindieError, match=sentence):
        render_mindformers(None, None, given.pop("output"), **given)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"epochs": 0}, "--epochs: is too small .*found 0"),
        ({"learning_rate": 0.0}, "--learning-rate: .*above 0, below 1, found 0.0"),
        ({"save_steps": 0}, "--save-every: is too small .*found 0"),
        ({"master_port": 80}, "--master-port: .*1024 to 65535, found 80"),
        ({"keep": 0}, "--keep: is too small"),
    ],
)
def test_a_run_refuses_by_name(options, sentence):
    with pytest.raises(InputError, match=sentence):
        Run(Path("rows"), **options)


def test_what_mindformers_cannot_compute_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"hidden_act": "gelu"}))
    with pytest.raises(ConfigError, match=r"hidden_act: would change what the model computes"):
        render_mindformers(tmp_path, None, None)


@pytest.mark.parametrize("lora", [False, True])
def test_the_readme_leads_there_and_back(lora, rows, tmp_path, monkeypatch):
    """Its commands are run; the training between them is a checkpoint as mindformers leaves it."""
    arrays = make_checkpoint(tmp_path / "ckpt")
    render_mindformers(tmp_path / "ckpt", rows, tmp_path / "run", **SMALL, lora_rank=4 if lora else None)
    lines = [shlex.split(line, comments=True) for line in commands((tmp_path / "run" / "README.md").read_text())]
    ours = [line[1:] for line in lines if line and line[0] == "telechat-mindie"]
    run_command(ours[0], monkeypatch)
    made = yaml.safe_load((tmp_path / "run" / "finetune.yaml").read_text())
    whole = Path(made["load_checkpoint"])
    with TensorReader() as reader:
        stored = {name: reader.load(tensor) for name, tensor in read_mindspore_ckpt(whole, whole.parent).items()}
    dtypes = {array.dtype.name for array in stored.values()}
    assert dtypes == {made["model"]["model_config"]["param_init_type"]}
    assert any(name.endswith("attention.wk_v.weight") for name in stored)  # as qkv_concat false wants it
    trained = {name: array + np.float32(0.5) for name, array in stored.items()}
    name = "model.layers.0.attention.wq"
    if lora:
        trained |= {
            f"{name}.mindpet_delta_lora_a": np.ones((4, 64), np.float32),
            f"{name}.mindpet_delta_lora_b": np.ones((64, 4), np.float32),
        }
    state = {f"adam_{part}.{key}": np.zeros_like(array) for key, array in trained.items() for part in "mv"}
    folder = tmp_path / "run" / "output" / "checkpoint" / "rank_0"
    folder.mkdir(parents=True)
    write_ckpt(folder / "telechat2_1m_rank_0-1_8.ckpt", trained | state)
    for command in ours[1:]:
        run_command([word.replace("MODEL_PATH", str(tmp_path / "model")) for word in command], monkeypatch)
    run_command(
        ["convert", str(tmp_path / "model"), str(tmp_path / "back"), "--to", "hf", "--dtype", "float32"], monkeypatch
    )
    from safetensors.numpy import load_file

    back = {key: value for file in (tmp_path / "back").glob("*.safetensors") for key, value in load_file(file).items()}
    key = "transformer.h.0.self_attention.query.weight"
    added = 0.5 + (16 / 4 * 4 if lora else 0)  # alpha / rank times ones [64, 4] x [4, 64]
    np.testing.assert_allclose(back[key], arrays[key] + added, atol=0.1 if lora else 1e-3)


def commands(text: str) -> list[str]:
    return [line for part in text.split("```bash\n")[1:] for line in part.split("```")[0].splitlines()]


def run_command(words: list[str], monkeypatch) -> None:
    monkeypatch.setattr("sys.argv", ["telechat-mindie", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code, words
