"""`build --backend atb`: what MindIE >= 3.0 loads, made from a checkpoint, or passed on as msmodelslim left it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.atb import SHARD, faults
from helpers.checkpoints import MOE, make_checkpoint
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from telechat_mindie.checkpoint.formats.safetensors import read_safetensors
from telechat_mindie.checkpoint.mapping import weights
from telechat_mindie.cli import app
from telechat_mindie.config import TelechatConfig
from telechat_mindie.errors import CheckpointError, ConfigError, InputError, ModelDirError, TelechatMindieError
from telechat_mindie.model_dir.atb import build as building
from telechat_mindie.model_dir.atb.build import build_atb
from telechat_mindie.model_dir.atb.generation import complete
from telechat_mindie.model_dir.atb.layout import AtbDir
from telechat_mindie.model_dir.atb.plan import AtbOptions
from telechat_mindie.model_dir.build import build
from telechat_mindie.model_dir.layout import ModelDir
from telechat_mindie.model_dir.verify import check_against, check_files

SMALL: dict[str, Any] = {
    "n_layer": 30,
    "hidden_size": 32,
    "n_head": 4,
    "num_key_value_heads": 2,
    "ffn_hidden_size": 48,
    "base_seqlen": 256,
    "training_seqlen": 256,
}
FILES = {
    *("config.json", "configuration_telechat2.py", "generation_config.json", "manifest.json", "modeling_telechat2.py"),
    *(SHARD, "model.safetensors.index.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "ckpt"
    make_checkpoint(path, "float32", **SMALL)
    return path


@pytest.fixture(scope="module")
def built(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("atb") / "model"
    before = os.umask(0)
    try:
        build_atb(path, checkpoint, AtbOptions(tp=2))
    finally:
        os.umask(before)
    return path


# The directory


def test_the_files_and_their_modes(built: Path) -> None:
    assert {entry.name for entry in built.iterdir()} == FILES
    assert {entry.stat().st_mode & 0o777 for entry in built.iterdir()} == {0o640}
    assert built.stat().st_mode & 0o777 == 0o750
    assert faults(built, full=True) == []
    manifest = json.loads((built / "manifest.json").read_text())
    assert manifest["backend"] == "atb" and manifest["dtype"] == "float16" and manifest["tp"] == 2
    assert manifest["files"].keys() == FILES - {"manifest.json"}


def test_what_config_json_says(built: Path) -> None:
    """All that atb_llm reads, in the one spelling that it reads; each has another model's default."""
    config = json.loads((built / "config.json").read_text())
    assert config["model_type"] == "telechat" and config["architectures"] == ["TeleChat2ForCausalLM"]
    assert all(isinstance(value, str) and "telechat2" in value.lower() for value in config["auto_map"].values())
    assert {key: config[key] for key in ("vocab_size", "hidden_size", "n_layer", "n_head", "num_key_value_heads")} == {
        "vocab_size": 512,
        "hidden_size": 32,
        "n_layer": 30,
        "n_head": 4,
        "num_key_value_heads": 2,
    }
    assert (config["ffn_hidden_size"], config["layer_norm_epsilon"], config["seq_length"]) == (48, 1e-5, 512)
    assert config["torch_dtype"] == "float16"


def test_what_generation_config_json_says(built: Path) -> None:
    generation = json.loads((built / "generation_config.json").read_text())
    ids = {key: generation[f"{key}_token_id"] for key in ("user", "bot", "eos", "system")}
    assert ids == {"user": 4, "bot": 5, "eos": 2, "system": 6}
    assert type(generation["max_new_tokens"]) is int and generation["max_new_tokens"] <= 256
    assert generation["do_sample"] is False


def test_the_weights(built: Path, checkpoint: Path) -> None:
    """Published names, key_value as it was, both biases, every number rounded once."""
    stored = read_safetensors(built / SHARD)
    source = {name: array for file in checkpoint.glob("*.safetensors") for name, array in load_file(file).items()}
    assert stored.keys() == source.keys() == weights(TelechatConfig.from_directory(checkpoint)).keys()
    assert {tensor.dtype for tensor in stored.values()} == {"float16"}
    for name, array in load_file(built / SHARD).items():
        np.testing.assert_array_equal(array, source[name].astype(np.float16), name)
    index = json.loads((built / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == dict.fromkeys(stored, SHARD)


@pytest.mark.parametrize(
    ("layers", "heads", "kv_heads", "allowed"),
    [(30, 32, 32, (1, 2, 4, 8, 16, 32)), (64, 48, 48, (1, 2, 4, 8, 16)), (96, 64, 8, (1, 2, 4, 8))],
    ids=["7b", "35b", "115b"],
)
def test_shapes_of_the_released_sizes(
    tmp_path: Path, layers: int, heads: int, kv_heads: int, allowed: tuple[int, ...]
) -> None:
    """Layers, heads and their ratio as released, two elements a head: at every legal number of cards, and no other."""
    shape = {"n_layer": layers, "n_head": heads, "num_key_value_heads": kv_heads, "hidden_size": 2 * heads}
    make_checkpoint(tmp_path / "ckpt", "float16", **shape, ffn_hidden_size=64)
    build_atb(tmp_path / "model", tmp_path / "ckpt", AtbOptions(tp=allowed[-1]))
    directory = AtbDir.open(tmp_path / "model")
    assert directory.tp == allowed[-1] and directory.allowed_tp == allowed
    assert faults(tmp_path / "model", full=True) == []
    held = [directory.rank_bytes(tp) for tp in allowed]
    assert held == sorted(held, reverse=True)
    with pytest.raises(ConfigError, match="cannot be split into that many ranks"):
        build_atb(tmp_path / "other", tmp_path / "ckpt", AtbOptions(tp=2 * kv_heads))
    assert not (tmp_path / "other").exists()


def test_a_note_of_lengths_that_are_computed_wrong_and_of_a_place_that_mindie_refuses(
    checkpoint: Path, tmp_path: Path
) -> None:
    notes: list[str] = []
    build_atb(tmp_path / "model", checkpoint, on_note=notes.append)
    (note,) = notes
    assert "512" in note and "no dynamic NTK" in note and "256" in note
    build_atb(tmp_path / "模型", checkpoint, on_note=notes.append)
    assert notes[1].startswith(f"MindIE will refuse {tmp_path / '模型'}") and notes[2:] == [note]


# Refusals


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"n_layer": 24}, "24 layers: below 30.*vllm-ascend"),
        ({"rope_theta": 1e6}, r"1e\+06: atb_llm computes with 10000"),
        (MOE, "4 experts: atb_llm's TeleChat has none.*backendType ms"),
        ({"embed_layernorm": True}, "leaves that norm out"),
        ({"base_seqlen": 128}, "128, below training_seqlen 256"),
        ({"partial_rotary_factor": 0.5}, "would change what the model computes"),
    ],
)
def test_models_that_atb_computes_wrong(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    make_checkpoint(tmp_path / "ckpt", "float16", **(SMALL | changes))
    with pytest.raises(ConfigError, match=says):
        build_atb(tmp_path / "model", tmp_path / "ckpt")
    assert [entry.name for entry in tmp_path.iterdir()] == ["ckpt"]


def test_values_beyond_float16(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "ckpt", "float32", shards=1, **SMALL)
    (shard,) = (tmp_path / "ckpt").glob("*.safetensors")
    arrays = load_file(shard)
    arrays["lm_head.weight"][0, 0] = 70000
    save_file(arrays, shard)
    with pytest.raises(
        CheckpointError, match=r"1 values do not fit float16 in lm_head\.weight.*float16 alone"
    ) as refused:
        build_atb(tmp_path / "model", tmp_path / "ckpt")
    assert "Choose --dtype bfloat16" not in str(refused.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["ckpt"]
    build_atb(tmp_path / "model", tmp_path / "ckpt", AtbOptions(allow_overflow=True))
    assert json.loads((tmp_path / "model" / "manifest.json").read_text())["odd_values"]


def test_a_checkpoint_without_a_tokenizer(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "ckpt", "float16", **SMALL)
    (tmp_path / "ckpt" / "tokenizer.model").unlink()
    with pytest.raises(TelechatMindieError, match=r"tokenizer\.model"):
        build_atb(tmp_path / "model", tmp_path / "ckpt")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"eos_token_id": [2, 7]}, {"eos_token_id": 2, "max_new_tokens": 1}),
        ({"max_new_tokens": 4096}, {"max_new_tokens": 256}),
        ({"max_length": 100}, {"max_new_tokens": 100}),
        ({"user_token_id": 8, "do_sample": True}, {"user_token_id": 8, "do_sample": True}),
        ({"top_p": 0.5}, {"top_p": 0.5, "system_token_id": 6, "bot_token_id": 5}),
    ],
)
def test_a_generation_config_is_completed(given: dict[str, Any], expected: dict[str, Any]) -> None:
    made = complete(given, TelechatConfig(512, 32, 30, 4, 48, seq_length=512))
    assert expected.items() <= made.items() and "max_length" not in made


# Quantised


def hashes(path: Path) -> dict[str, str]:
    files = (file for file in path.rglob("*") if "quant_model" in file.name)
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_w8a8_is_passed_on_untouched(quantised: Path, compressed: Path, tmp_path: Path) -> None:
    for source, kind, count in ((quantised, "w8a8", 3), (compressed, "w8a8sc", 4)):
        target = tmp_path / kind
        made = build_atb(target, source)
        assert hashes(target) == hashes(source) and len(hashes(target)) == count
        assert made.kind == kind.upper() and made.output_bytes == sum(
            file.stat().st_size for file in source.rglob("*.safetensors")
        )
        assert json.loads((target / "config.json").read_text())["quantize"] == kind
        assert {entry.stat().st_mode & 0o777 for entry in target.rglob("*") if entry.is_file()} == {0o640}
        assert {entry.stat().st_mode & 0o777 for entry in target.rglob("*") if entry.is_dir()} <= {0o750}
        assert faults(target, full=True) == []
        assert check_files(AtbDir.open(target)) == [] and AtbDir.open(target).tp == made.tp


def test_w8a8_that_is_damaged_is_not_passed_on(quantised: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(quantised, tmp_path / "source"))
    for file in source.glob("*.safetensors"):
        arrays = load_file(file)
        arrays.pop("transformer.h.3.mlp.up_proj.deq_scale", None)
        save_file(arrays, file)
    with pytest.raises(
        CheckpointError, match=r"1 of 903 tensors are missing: transformer\.h\.3\.mlp\.up_proj\.deq_scale"
    ):
        build_atb(tmp_path / "model", source)
    assert not (tmp_path / "model").exists()


def test_options_that_are_not_for_quantised_ones(quantised: Path, compressed: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not quantised"):
        build_atb(tmp_path / "model", quantised, AtbOptions(adapters=("adapter",)))
    with pytest.raises(InputError, match="compressed for"):
        build_atb(tmp_path / "model", compressed, AtbOptions(tp=4))
    with pytest.raises(ConfigError, match="cannot be split"):
        build_atb(tmp_path / "model", quantised, AtbOptions(tp=3))


def test_a_killed_copy_is_resumed(quantised: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[str] = []
    real = building.copy_file

    def copy(source: Path, root: Path, name: str, progress: Any) -> Any:
        copied.append(name)
        if len(copied) == 3:
            raise KeyboardInterrupt
        return real(source, root, name, progress)

    monkeypatch.setattr(building, "copy_file", copy)
    with pytest.raises(KeyboardInterrupt):
        build_atb(tmp_path / "model", quantised)
    for name in (".config.json.new", copied[2]):  # half written
        (tmp_path / ".model.partial" / name).write_text("x")
    build_atb(tmp_path / "model", quantised, AtbOptions(resume=True))
    assert copied[3:] == copied[2:3] and len(copied) == 4
    assert faults(tmp_path / "model", full=True) == []  # nor anything left over
    assert hashes(tmp_path / "model") == hashes(quantised)


# Verify


def test_what_is_lost_is_built_again_for_the_same_backend(built: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(built, tmp_path / "model"))
    (copy / "modeling_telechat2.py").unlink()
    (item,) = (item for item in faults(copy) if item.severity == "error")
    assert item.id == "missing-file" and item.advice.endswith("--backend atb")


def test_verify(built: Path, checkpoint: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(built, tmp_path / "model"))
    directory = AtbDir.open(copy)
    assert check_files(directory) == [] and check_against(directory, checkpoint) == []
    arrays = load_file(copy / SHARD)
    arrays["lm_head.weight"][5, 5] += 1
    save_file(arrays, copy / SHARD)
    assert [problem for problem in check_files(directory) if SHARD in problem]
    other = Path(shutil.copytree(checkpoint, tmp_path / "ckpt"))
    file = next(file for file in other.glob("*.safetensors") if "lm_head.weight" in load_file(file))
    arrays = load_file(file)
    arrays["lm_head.weight"][5, 5] += 1
    save_file(arrays, file)
    (problem,) = check_against(AtbDir.open(built), other)
    assert problem == f"{SHARD}: lm_head.weight differs from the checkpoint"


def test_verify_of_quantised_ones(quantised: Path, tmp_path: Path) -> None:
    build_atb(tmp_path / "model", quantised)
    directory = AtbDir.open(tmp_path / "model")
    assert check_against(directory, quantised) == []
    with pytest.raises(InputError, match=r"--config, --strategy.*not quantised"):
        check_against(directory, quantised, config_dir=quantised)
    other = Path(shutil.copytree(quantised, tmp_path / "other"))
    first = sorted(other.glob("*.safetensors"))[0]
    first.write_bytes(first.read_bytes()[:-1] + b"\x7f")
    assert check_against(directory, other) == [f"{first.name}: differs from the checkpoint"]


# Commands, and what the other backend says


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    runner = CliRunner()

    def invoke(*arguments: object) -> dict[str, Any]:
        result = runner.invoke(app, [*map(str, arguments), "--json"], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        found: dict[str, Any] = json.loads(result.stdout)
        return found

    yield invoke


def test_the_commands(run: Any, checkpoint: Path, quantised: Path, tmp_path: Path) -> None:
    planned = run("plan", "--checkpoint", checkpoint, "--backend", "atb", "--tp", 2, "--device-mem", 1)
    made = run("build", tmp_path / "model", "--checkpoint", checkpoint, "--backend", "atb", "--tp", 2)
    assert made == {"model_path": str(tmp_path / "model"), "backend": "atb", "dtype": "float16", "tp": 2} | {
        "weight_bytes": planned["output_bytes"]
    }
    assert planned["files"] == [{"path": SHARD, "bytes": (tmp_path / "model" / SHARD).stat().st_size}]
    shown = run("info", tmp_path / "model")
    assert shown["backend"] == "atb" and shown["allowed_tp"] == [1, 2] and shown["plain_length"] == 256
    # The header of the file is no weight.
    assert shown["weight_bytes_per_rank"] == planned["rank_bytes"]
    config = run("service-config", tmp_path / "model", "--insecure-http", "--device-mem", 32)["config"]
    assert config["BackendConfig"]["npuDeviceIds"] == [[0, 1]]
    assert run("verify", tmp_path / "model", "--against", checkpoint)["problems"] == []

    planned = run("plan", "--checkpoint", quantised, "--backend", "atb")
    shown = run("info", quantised)
    assert planned["dtype"] == shown["quantised"] == "W8A8"
    assert planned["rank_bytes"] == shown["weight_bytes_per_rank"]
    assert shown["float_layers"] == ["lm_head", "mlp.down_proj", "word_embeddings"]
    with pytest.raises(ModelDirError, match=r"has no manifest\.json to prove it by"):
        run("verify", quantised)
    assert run("build", tmp_path / "q", "--checkpoint", quantised, "--backend", "atb")["dtype"] == "W8A8"


def test_a_plan_says_what_fits_as_for_ms(run: Any, compressed: Path) -> None:
    options = ("--variant", "115b", "--backend", "atb", "--tp", 2, "--device-mem", 24)
    planned = run("plan", *options)
    assert planned["fit"]["fits"] is False and "does not hold the weights" in planned["fit"]["refusal"]
    assert [(fit["tp"], fit["fits"]) for fit in planned["cards"]][-3:] == [(8, False), (8, False), (8, True)]
    assert planned["smallest"] == planned["cards"][-1] and planned["smallest"]["npu_mem_gb"] == -1
    ms = run("plan", *options[:2], *options[4:])
    assert ms["backend"] == "ms" and ms["fit"].keys() == planned["fit"].keys()
    # What was compressed for two cards has no other number of them.
    only = run("plan", "--checkpoint", compressed, "--backend", "atb")
    assert {fit["tp"] for fit in only["cards"]} == {2} == {only["tp"]}
    assert only["source"]["dtype"] == "W8A8SC"


def test_a_plan_probes_the_disk_where_that_is_asked(
    run: Any, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("telechat_mindie.checkpoint.estimate.probe_disk", lambda folder: 1000)
    options = ("plan", "--checkpoint", checkpoint, "--backend", "atb", "--target", tmp_path)
    planned = run(*options, "--probe")
    assert planned["estimated_seconds"] == round((planned["source"]["bytes"] + planned["output_bytes"]) / 1000) > 0
    assert "estimated_seconds" not in run(*options)


def test_a_plan_of_a_size(run: Any) -> None:
    planned = run("plan", "--variant", "7b", "--backend", "atb", "--tp", 2, "--device-mem", 64)
    assert planned["output_bytes"] > 15_234_000_000 and planned["plain_length"] == 8192
    assert planned["rank_bytes"] > planned["output_bytes"] // 2
    for label, says in (("3b", "24 layers"), ("39b-a12b", "16 experts")):
        with pytest.raises(ConfigError, match=says):
            run("plan", "--variant", label, "--backend", "atb")


@pytest.mark.parametrize(
    "option", [["--dtype", "bfloat16"], ["--max-seq-len", "64"], ["--no-qkv-concat"], ["--bare-prompt", "raw"]]
)
def test_options_of_ms(run: Any, checkpoint: Path, tmp_path: Path, option: list[str]) -> None:
    with pytest.raises(InputError, match=option[0]):
        run("build", tmp_path / "model", "--checkpoint", checkpoint, "--backend", "atb", *option)
    if option[0] != "--bare-prompt":
        with pytest.raises(InputError, match=option[0]):
            run("plan", "--checkpoint", checkpoint, "--backend", "atb", *option)
    with pytest.raises(InputError, match="expected ms or atb"):
        run("build", tmp_path / "model", "--checkpoint", checkpoint, "--backend", "torch")


def test_ms_says_what_it_is_and_how_to_serve_it(built: Path, quantised: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ModelDirError, match=f"built for backendType atb.*build OTHER --checkpoint {built}; .*serve OTHER"
    ):
        ModelDir.open(built)
    build_atb(tmp_path / "q", quantised)
    with pytest.raises(ModelDirError, match=r"W8A8 computes on NPUs alone.*checkpoint that was quantised"):
        ModelDir.open(tmp_path / "q")
    build(tmp_path / "ms", built)  # it is a Hugging Face checkpoint
    assert ModelDir.open(tmp_path / "ms").serving.dtype == "float16"
