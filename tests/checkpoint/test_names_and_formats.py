"""What people give as a checkpoint: names under any one prefix are taken, every other form is named and refused."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.checkpoints import CONFIG, MOE, make_checkpoint
from helpers.torch_archive import ordered_dict, pickle_state_dict, text, write_pickle_archive, write_torch_archive
from safetensors.numpy import load_file, save_file

from telechat_mindie.checkpoint.formats.torch import read_torch_bin
from telechat_mindie.checkpoint.source import open_checkpoint
from telechat_mindie.config import TelechatConfig
from telechat_mindie.errors import CheckpointError, ConfigError, TelechatMindieError
from telechat_mindie.model_dir.build import BuildOptions, build
from telechat_mindie.model_dir.layout import ModelDir

Arrays = dict[str, np.ndarray]
MODELS: dict[str, dict[str, Any]] = {"dense": {}, "moe": MOE}
SHARD = "model-00001-of-00001.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module", params=MODELS)
def plain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Arrays]:
    """(directory, weights) of a checkpoint of one shard."""
    root = tmp_path_factory.mktemp(request.param) / "ckpt"
    return root, make_checkpoint(root, "float16", shards=1, **MODELS[request.param])


@pytest.fixture(scope="module")
def plain_hashes(plain: tuple[Path, Arrays], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return built_hashes(plain[0], tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pristine") / "ckpt"
    make_checkpoint(root, "float16", shards=1)
    return root


@pytest.fixture
def checkpoint(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "ckpt"))


def built_hashes(checkpoint: Path, root: Path) -> dict[str, str]:
    build(root / "model", checkpoint, BuildOptions(tp=2))
    files = ModelDir.open(root / "model").manifest["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name.startswith("rank_")}


def renamed(
    plain: tuple[Path, Arrays], target: Path, rename: Callable[[str], str], extra: Arrays | None = None
) -> Path:
    """A copy of the checkpoint, its weights in one file under other names, with others beside them."""
    shutil.copytree(plain[0], target, ignore=shutil.ignore_patterns("*.safetensors*"))
    arrays = {rename(name): array for name, array in plain[1].items()} | (extra or {})
    save_file(arrays, target / "model.safetensors")
    return target


def bare(name: str) -> str:
    return name.removeprefix("transformer.")


PREFIXES = {
    "module.": lambda name: f"module.{name}",
    "model.": lambda name: f"model.{name}",
    "base_model.model.": lambda name: f"base_model.model.{name}",
    "_orig_mod.": lambda name: f"_orig_mod.{name}",
    "module._orig_mod.": lambda name: f"module._orig_mod.{name}",
    "without transformer.": bare,
    "model. without transformer.": lambda name: f"model.{bare(name)}",
}


@pytest.mark.parametrize("rename", PREFIXES.values(), ids=PREFIXES)
def test_one_prefix_for_all_gives_the_same_hashes(plain, plain_hashes, tmp_path, rename):
    assert built_hashes(renamed(plain, tmp_path / "ckpt", rename), tmp_path) == plain_hashes


def test_old_buffers_are_left_out(plain, plain_hashes, tmp_path):
    buffers: Arrays = {"transformer.rotary_emb.inv_freq": np.zeros(4, np.float32)}
    for layer in range(2):
        stem = f"transformer.h.{layer}."
        buffers |= {
            f"{stem}self_attention.rotary_emb.inv_freq": np.zeros(4, np.float32),
            f"{stem}self_attention.rotary_emb.cos_cached": np.zeros((8, 4), np.float16),
            f"{stem}attn.bias": np.ones((1, 1, 8, 8), bool),
            f"{stem}self_attention.masked_bias": np.zeros(1, np.float32),
        }
    other = renamed(
        plain, tmp_path / "ckpt", lambda name: f"module.{name}", {f"module.{n}": a for n, a in buffers.items()}
    )
    assert built_hashes(other, tmp_path) == plain_hashes


@pytest.mark.parametrize("wrappers", [("state_dict",), ("model",), ("module",), ("state_dict", "model")])
def test_nested_state_dicts(plain, plain_hashes, tmp_path, wrappers):
    root, weights = plain
    other = tmp_path / "ckpt"
    shutil.copytree(root, other, ignore=shutil.ignore_patterns("*.safetensors*"))
    pickle, storages = pickle_state_dict(weights)
    body = pickle[2:-1]
    for wrapper in reversed(wrappers):
        body = b"}(" + text("epoch") + b"K\x03" + text(wrapper) + body + text("optimizer") + ordered_dict() + b"u"
    write_pickle_archive(other / "pytorch_model.bin", b"\x80\x02" + body + b".", storages)
    assert built_hashes(other, tmp_path) == plain_hashes


def test_two_nested_state_dicts_are_refused(tmp_path):
    pickle, storages = pickle_state_dict({"w": np.zeros(2, np.float32)})
    body = b"}(" + b"".join(text(name) + pickle[2:-1] for name in ("model", "state_dict")) + b"u"
    write_pickle_archive(tmp_path / "a.bin", b"\x80\x02" + body + b".", storages)
    with pytest.raises(CheckpointError, match="several state dicts: 'model', 'state_dict'"):
        read_torch_bin(tmp_path / "a.bin")


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_weight_file_alone(plain, tmp_path, file):
    root, weights = plain
    shutil.copy(root / "config.json", tmp_path)
    save_file(weights, tmp_path / "model.safetensors")
    write_torch_archive(tmp_path / "pytorch_model.bin", weights)
    opened = open_checkpoint(tmp_path / file)
    assert opened.kind.startswith("Hugging Face") and opened.weights.keys() == weights.keys()


def test_an_adapter_beside_a_model_is_left_out(checkpoint, tmp_path):
    (checkpoint / INDEX).unlink()
    (checkpoint / "adapter_config.json").write_text("{}")
    save_file({"base_model.model.x.lora_A.weight": np.zeros(2, np.float32)}, checkpoint / "adapter_model.safetensors")
    assert built_hashes(checkpoint, tmp_path)


def test_a_missing_lm_head_follows_the_config(checkpoint, tmp_path):
    arrays = load_file(checkpoint / SHARD)
    del arrays["lm_head.weight"]
    save_file(arrays, checkpoint / SHARD)
    (checkpoint / INDEX).unlink()
    with pytest.raises(CheckpointError, match=r"missing: lm_head.weight.*does not say, which means tie.*false"):
        open_checkpoint(checkpoint)
    edit(checkpoint, tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"missing: lm_head.weight.*says tie_word_embeddings false"):
        open_checkpoint(checkpoint)
    edit(checkpoint, tie_word_embeddings=True)
    assert open_checkpoint(checkpoint).weights["lm_head.weight"].dtype == "float16"


def edit(checkpoint: Path, **changes: Any) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda checkpoint: edit(checkpoint, **changes)


def quantised(**keys: Any) -> Callable[[Path], None]:
    return config(quantization_config=keys)


def tensors(**arrays: np.ndarray) -> Callable[[Path], None]:
    """More tensors in the shard, whose `__` stands for a dot."""

    def add(checkpoint: Path) -> None:
        (checkpoint / INDEX).unlink()
        more = {name.replace("__", "."): array for name, array in arrays.items()}
        save_file(load_file(checkpoint / SHARD) | more, checkpoint / SHARD)

    return add


def only(*names: str) -> Callable[[Path], None]:
    """These entries in the place of the weights."""

    def replace(checkpoint: Path) -> None:
        for file in checkpoint.glob("*.safetensors*"):
            file.unlink()
        for name in names:
            (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
            (checkpoint / name).write_bytes(b"\0" * 64)

    return replace


def without_config(change: Callable[[Path], None]) -> Callable[[Path], None]:
    def both(checkpoint: Path) -> None:
        change(checkpoint)
        (checkpoint / "config.json").unlink()

    return both


def fp8(checkpoint: Path) -> None:
    (checkpoint / INDEX).unlink()
    header = json.dumps({"lm_head.weight": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]}}).encode()
    (checkpoint / SHARD).write_bytes(len(header).to_bytes(8, "little") + header + b"\0")


def renames(rename: Callable[[str], str]) -> Callable[[Path], None]:
    def change(checkpoint: Path) -> None:
        (checkpoint / INDEX).unlink()
        arrays = load_file(checkpoint / SHARD)
        save_file({rename(name): array for name, array in arrays.items()}, checkpoint / SHARD)

    return change


def rank_files(checkpoint: Path) -> None:
    for rank in range(2):
        only(f"telechat_rank_{rank}.ckpt")(checkpoint)


def pipeline_stages(checkpoint: Path) -> None:
    for file in checkpoint.glob("*.safetensors*"):
        file.unlink()
    for rank in range(2):
        (checkpoint / f"rank_{rank}").mkdir()
        name = f"model.layers.{rank}.attention_norm.weight"
        save_file({name: np.ones(64, np.float16)}, checkpoint / f"rank_{rank}" / "model.safetensors")


BYTES, FLOATS = np.zeros((64, 64), np.int8), np.zeros(64, np.float32)
STEM = "transformer__h__0__self_attention__dense__"
SIGNED_BY_CONFIG: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "GPTQ": (quantised(quant_method="gptq", bits=4), "quantised by GPTQ", "float16"),
    "AWQ": (quantised(quant_method="awq"), "quantised by AWQ", "float16"),
    "fp8": (quantised(quant_method="compressed-tensors-fp8"), "quantised to fp8", "float16"),
    "bitsandbytes": (quantised(load_in_4bit=True), "quantised by bitsandbytes", "float16"),
    "W8A8 of MindIE": (config(quantize="w8a8"), "msmodelslim", "float16"),
    "another quantisation": (quantised(quant_method="hqq"), "is quantised", "float16"),
    "TeleChat V1 7B": (config(vocab_size=160256, base_seqlen=None), "first generation", "Only TeleChat2"),
    "TeleChat V1 12B": (config(vocab_size=120000, base_seqlen=None), "first generation", "Only TeleChat2"),
    "TeleChat 52B": (config(use_mup=True, mup_scale_factor=32.0), "TeleChat-52B", "Only TeleChat2"),
    "TeleChat3": (config(model_type="telechat3"), "TeleChat3", "Only TeleChat2"),
    "TeleChat3 MoE": (config(architectures=["TeleChat3MoeForCausalLM"]), "TeleChat3", "Only TeleChat2"),
    "Llama": (config(model_type="llama"), "found llama", "Only TeleChat2"),
    "Qwen": (config(model_type="qwen2"), "found qwen2", "Only TeleChat2"),
}
SIGNED_BY_FILES: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "LoRA adapter": (without_config(only("adapter_config.json", "adapter_model.safetensors")), "LoRA", "--adapter"),
    "LoRA adapter with the model's config.json": (only("adapter_model.bin"), "LoRA adapter", "--adapter"),
    "LoRA adapter without weights": (without_config(only("adapter_config.json")), "LoRA adapter", "--adapter"),
    "LoRA weights": (tensors(**{STEM + "lora_A__default__weight": FLOATS}), "LoRA", "--adapter"),
    "GPTQ tensors": (tensors(**{STEM + "qweight": BYTES}), "GPTQ or AWQ", "float16"),
    "GPTQ alone": (only("quantize_config.json"), "GPTQ", "float16"),
    "AWQ alone": (only("quant_config.json"), "AWQ", "float16"),
    "W8A8": (tensors(**{STEM + "deq_scale": FLOATS}), "msmodelslim", "float16"),
    "W8A8 alone": (only("quant_model_description_w8a8.json"), "msmodelslim", "float16"),
    "fp8 tensors": (tensors(**{STEM + "weight_scale_inv": FLOATS}), "fp8", "float16"),
    "fp8 dtype": (fp8, "fp8", "float16"),
    "bitsandbytes tensors": (tensors(**{STEM + "SCB": FLOATS}), "bitsandbytes", "float16"),
    "bitsandbytes 4 bit": (tensors(**{STEM + "weight__quant_state__bitsandbytes__nf4": BYTES}), "bitsandb", "float16"),
    "GGUF": (only("telechat2-7b-q4_0.gguf"), "GGUF", "float16"),
    "DeepSpeed ZeRO": (only("bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"), "DeepSpeed", "zero_to_fp32.py"),
    "DeepSpeed ranks": (only("mp_rank_00_model_states.pt"), "DeepSpeed", "zero_to_fp32.py"),
    "DeepSpeed run": (only("global_step500/mp_rank_00_model_states.pt", "latest"), "DeepSpeed", "zero_to_fp32.py"),
    "Megatron run": (only("iter_0000100/mp_rank_00/model_optim_rng.pt"), "Megatron", "converter"),
    "Megatron rank": (only("model_optim_rng.pt"), "Megatron", "converter"),
    "Megatron names": (renames(lambda name: f"decoder.layers.{name}"), "Megatron", "converter"),
    "mcore names": (
        renames(lambda name: f"model.layers.0.self_attention.linear_qkv.{name}"),
        "mcore",
        "converter",
    ),
    "torch file": (only("model.pt"), "not named", "pytorch_model.bin"),
    "mindformers rank files": (rank_files, "several ranks", "strategy"),
    "mindformers pipeline": (pipeline_stages, "pipeline", "strategy"),
    "Llama names": (
        renames(lambda name: f"model.layers.0.self_attn.q_proj.{name}"),
        "layers of another family",
        "Only TeleChat2",
    ),
    "52B names": (renames(lambda name: f"transformer.h.0.attn.c_attn.{name}"), "TeleChat-52B", "Only TeleChat2"),
    "two prefixes": (
        tensors(module__lm_head__weight=FLOATS),
        "several prefixes",
        "lm_head.weight and module.lm_head.weight",
    ),
    "with and without transformer.": (
        tensors(ln_f__weight=FLOATS),
        "several prefixes",
        "innermost model",
    ),
}
FORMATS = SIGNED_BY_CONFIG | SIGNED_BY_FILES


@pytest.mark.parametrize(("change", "what", "advice"), FORMATS.values(), ids=FORMATS)
def test_other_forms_are_named_with_what_to_do(checkpoint, change, what, advice):
    change(checkpoint)
    with pytest.raises(TelechatMindieError) as refused:
        open_checkpoint(checkpoint)
    message = str(refused.value)
    assert what in message and advice in message and str(checkpoint) in message, message
    assert not re.search(r"tok_embeddings|attention\.w|feed_forward", message)


@pytest.mark.parametrize("name", ["model.gguf", "model_optim_rng.pt", "adapter_model.safetensors"])
def test_a_foreign_file_by_its_path(tmp_path, name):
    (tmp_path / name).write_bytes(b"\0" * 64)
    with pytest.raises(CheckpointError, match=r"GGUF|Megatron|LoRA"):
        open_checkpoint(tmp_path / name)


def test_the_command_says_it_in_a_line(checkpoint, tmp_path):
    only("telechat2-7b-q4_0.gguf")(checkpoint)
    command = [sys.executable, "-m", "telechat_mindie", "build", str(tmp_path / "m"), "--checkpoint", str(checkpoint)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "GGUF" in done.stderr, done.stderr
    assert not (tmp_path / "m").exists()


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.mark.parametrize(
    "name", ["config.json", INDEX, SHARD, "tokenizer.model", "tokenizer_config.json", "generation_config.json"]
)
def test_git_lfs_pointers_of_every_kind(checkpoint, tmp_path, name):
    (checkpoint / name).write_text(POINTER)
    with pytest.raises(TelechatMindieError, match=rf"{re.escape(name)}: is a Git LFS pointer.*git lfs pull"):
        build(tmp_path / "model", checkpoint)


def test_a_pointer_in_the_place_of_a_torch_file(checkpoint, tmp_path):
    only("pytorch_model.bin")(checkpoint)
    (checkpoint / "pytorch_model.bin").write_text(POINTER)
    with pytest.raises(CheckpointError, match="Git LFS pointer"):
        build(tmp_path / "model", checkpoint)


def test_the_vocabularies_of_the_first_generation_are_no_proof():
    config = TelechatConfig.from_dict(CONFIG | {"vocab_size": 160256})
    assert config.vocab_size == 160256
    with pytest.raises(ConfigError, match="first generation"):
        TelechatConfig.from_dict(
            {key: value for key, value in (CONFIG | {"vocab_size": 160256}).items() if key != "base_seqlen"}
        )
