"""What a user types by mistake, and the sentence that answers it: what, where, expected and found, what to do next."""

from __future__ import annotations

import json
import shutil

import pytest
from helpers.checkpoints import make_checkpoint
from typer.testing import CliRunner

from telechat_mindie.cli import app
from telechat_mindie.errors import TelechatMindieError
from telechat_mindie.model_dir.build import build
from telechat_mindie.nano import write_checkpoint


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A folder with all that somebody may name by mistake."""
    root = tmp_path_factory.mktemp("shop")
    write_checkpoint(root / "ckpt")
    build(root / "model", root / "ckpt")
    (root / "q4.gguf").write_bytes(b"GGUF\3\0\0\0")
    (root / "gguf").mkdir()
    shutil.copy(root / "q4.gguf", root / "gguf")
    (root / "lora").mkdir()
    (root / "lora/adapter_config.json").write_text('{"peft_type": "LORA"}')
    shutil.copytree(root / "ckpt", root / "no-tokenizer", ignore=shutil.ignore_patterns("tokenizer*"))
    shutil.copytree(root / "ckpt", root / "no-config", ignore=shutil.ignore_patterns("config.json"))
    (root / "config-only").mkdir()
    shutil.copy(root / "ckpt/config.json", root / "config-only")
    shutil.copytree(root / "ckpt", root / "llama")
    llama = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_hidden_layers": 2}
    (root / "llama/config.json").write_text(json.dumps(llama))
    shutil.copytree(root / "ckpt", root / "pointer")
    (root / "pointer/model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    (root / "empty").mkdir()
    (root / "notes.txt").write_text("x")
    (root / "ckpt.zip").write_bytes(b"PK\3\4")
    make_checkpoint(root / "overflow", "float32")
    return root


HUB = "`hf download Tele-AI/TeleChat2-7B --local-dir TeleChat2-7B` from Hugging Face, or `modelscope download --model "
BUILD = ("build", "out", "--checkpoint")

MISTAKES = {
    # the checkpoint of a build
    "a model of a hub": ((*BUILD, "Tele-AI/TeleChat2-7B"), f"checkpoint is not there. Download the model first: {HUB}"),
    "its page": ((*BUILD, "https://huggingface.co/Tele-AI/TeleChat2-7B"), f"Download the model first: {HUB}"),
    "its page at ModelScope": (
        (*BUILD, "https://modelscope.cn/models/TeleAI/TeleChat2-7B"),
        "`modelscope download --model TeleAI/TeleChat2-7B --local_dir TeleChat2-7B` from ModelScope; then name",
    ),
    "a misspelt folder": ((*BUILD, "ckpf"), "ckpf: checkpoint is not there. Is it ckpt?"),
    "a GGUF file": ((*BUILD, "q4.gguf"), "is in llama.cpp's format GGUF (found q4.gguf). Take the float16"),
    "a folder with a GGUF file": ((*BUILD, "gguf"), "gguf: is in llama.cpp's format GGUF (found q4.gguf). Take the"),
    "a LoRA folder": ((*BUILD, "lora"), "is a LoRA adapter, not a model (found adapter_config.json). Name the model"),
    "config.json": ((*BUILD, "ckpt/config.json"), "is no file of weights (expected a folder, or a file *.safetensors"),
    "a text file": ((*BUILD, "notes.txt"), "notes.txt: is no file of weights"),
    "an archive": ((*BUILD, "ckpt.zip"), "ckpt.zip: is an archive (found ckpt.zip). Unpack it, and name the folder"),
    "an empty folder": ((*BUILD, "empty"), "config.json: file is missing"),
    "weights without config.json": ((*BUILD, "no-config"), "no-config/config.json: file is missing"),
    "weights without a tokenizer": (
        (*BUILD, "no-tokenizer"),
        "or name the folder that has it and config.json: --config",
    ),
    "config.json alone": ((*BUILD, "config-only"), "holds no weights that are recognised (expected *.safetensors"),
    "another family": ((*BUILD, "llama"), "llama"),
    "a pointer of Git LFS": ((*BUILD, "pointer"), "is a Git LFS pointer, not the file itself. Run `git lfs pull`"),
    # its options
    "--dtype int8": ((*BUILD, "ckpt", "--dtype", "int8"), "found int8). Nothing is quantised here"),
    "--dtype float8": ((*BUILD, "ckpt", "--dtype", "float8"), "found float8). Nothing is quantised here"),
    "--dtype float64": ((*BUILD, "ckpt", "--dtype", "float64"), "or float16 or bfloat16, found float64)"),
    "--block-size 7": (
        (*BUILD, "ckpt", "--block-size", "7"),
        "--block-size: is none that an NPU's PagedAttention takes (expected 16 or 32 or 64 or 128, found 7). 128 is",
    ),
    "--block-size 0": ((*BUILD, "ckpt", "--block-size", "0"), "--block-size: is out of range (expected 1 to 1024"),
    "--max-seq-len 0": ((*BUILD, "ckpt", "--max-seq-len", "0"), "--max-seq-len: is out of range (expected 1 to"),
    "--max-seq-len too long": ((*BUILD, "ckpt", "--max-seq-len", "9999999"), "--max-seq-len: is out of range"),
    "--tp 3": ((*BUILD, "ckpt", "--tp", "3"), "cannot be split into that many ranks (expected one of 1, 2, found 3)"),
    "--tp 0": ((*BUILD, "ckpt", "--tp", "0"), "(expected one of 1, 2, found 0)"),
    "--bare-prompt": ((*BUILD, "ckpt", "--bare-prompt", "yes"), "--bare-prompt: unknown choice (expected chat or raw"),
    "an adapter that is not there": (
        (*BUILD, "ckpt", "--adapter", "lorra"),
        "lorra: adapter is not there. Is it lora?",
    ),
    "a target that is there": (("build", "model", "--checkpoint", "ckpt"), "model: exists and is not empty. Choose"),
    "a target in no folder": (("build", "no/where", "--checkpoint", "ckpt"), "parent folder is missing. mkdir -p"),
    "--force on a checkpoint": (
        ("build", "ckpt", "--checkpoint", "ckpt", "--force"),
        "was not made by this program (it holds no manifest.json), so --force does not replace it. Remove it yourself",
    ),
    "--strategy": ((*BUILD, "ckpt", "--strategy", "nowhere"), "nowhere: strategy is not there"),
    # a model directory
    "generate: the checkpoint": (
        ("generate", "ckpt", "hi"),
        "ckpt: is not a model directory: it has no manifest.json, but a checkpoint's config.json and weights. Build a "
        "model directory of it: telechat-mindie build ckpt-mindie --checkpoint ckpt",
    ),
    "serve: the checkpoint": (("serve", "ckpt"), "telechat-mindie build ckpt-mindie --checkpoint ckpt"),
    "check: the checkpoint": (
        ("check", "ckpt"),
        "model directory of it: telechat-mindie build ckpt-mindie --checkpoint",
    ),
    "verify: the checkpoint": (("verify", "ckpt"), "telechat-mindie build ckpt-mindie --checkpoint ckpt"),
    "service-config: the checkpoint": (("service-config", "ckpt"), "build ckpt-mindie --checkpoint ckpt"),
    "launch: the checkpoint": (("launch", "ckpt", "--dry-run"), "build ckpt-mindie --checkpoint ckpt"),
    "generate: a model of a hub": (("generate", "Tele-AI/TeleChat2-7B", "hi"), f"Download the model first: {HUB}"),
    "serve: a GGUF file": (
        ("serve", "q4.gguf"),
        "is not a directory (found a file that is in llama.cpp's format GGUF)",
    ),
    "serve: a LoRA folder": (("serve", "lora"), "it has no manifest.json, and is a LoRA adapter, not a model"),
    "info: a misspelt folder": (("info", "modle"), "modle: is not a directory (found nothing). Is it model?"),
    "chat: an address without http": (
        ("chat", "localhost:1025"),
        "A service is asked by `telechat-mindie chat http://localhost:1025`.",
    ),
    "generate: a service": (
        ("generate", "http://localhost:1025", "hi"),
        "`telechat-mindie chat http://localhost:1025`",
    ),
    "generate: nothing": (("generate", "model", ""), "the prompt: is empty. Ask something, or name - and give it on"),
    "generate: --raw and --system": (("generate", "model", "hi", "--raw", "--system", "x"), "Leave out --raw."),
    "serve: --kv-gb 0": (("serve", "model", "--kv-gb", "0"), "--kv-gb: is out of range (expected above 0"),
    # the others
    "bench: an address without http": (
        ("bench", "serve", "--url", "localhost:1025"),
        "(expected http://HOST:PORT or https://HOST:PORT). Write http://localhost:1025",
    ),
    "plan: a size that is not": (("plan", "--variant", "8b"), "--variant: unknown size (expected 3b or 7b or 35b"),
    "plan: nothing": (("plan",), "--checkpoint, --variant: name one of the two"),
    "convert: --to gguf": (("convert", "ckpt", "out", "--to", "gguf"), "--to: unknown form (expected hf or"),
    "convert: --tp for hf": (("convert", "ckpt", "out", "--to", "hf", "--tp", "2"), "are for MindSpore files"),
    "nano: a target that is there": (("nano", "ckpt"), "ckpt: exists and is not empty. Choose another path, or"),
    "status: a name": (("logs", "nothing"), "nothing"),
}


def invoke(*arguments, **options):
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], **options)
    if isinstance(done.exception, TelechatMindieError):  # commands.ending prints it
        return 2, str(done.exception)
    assert done.exception is None or isinstance(done.exception, SystemExit), repr(done.exception)
    return done.exit_code, done.stderr + done.stdout


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_answered(shop, monkeypatch, tmp_path, name):
    arguments, sentence = MISTAKES[name]
    monkeypatch.chdir(shop)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    code, said = invoke(*arguments)
    assert code == 2 and sentence in " ".join(said.split()), said
    assert not (shop / "out").exists()


@pytest.mark.parametrize("dtype", ["fp16", "FP16", "half", "bf16", "fp32", "bfloat16"])
def test_short_names_of_dtypes(shop, tmp_path, dtype):
    code, said = invoke("build", tmp_path / "model", "--checkpoint", shop / "ckpt", "--dtype", dtype, "--json")
    assert code == 0
    wanted = {"fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp32": "float32"}
    assert json.loads(said)["dtype"] == wanted.get(dtype.lower(), dtype)


def test_sizes_in_capitals():
    assert invoke("plan", "--variant", "7B")[0] == 0


@pytest.mark.parametrize("name", ["模型", "my model", "model..v2"])
def test_a_path_that_mindie_refuses_is_told_before_the_work(shop, tmp_path, name):
    code, said = invoke("build", tmp_path / name, "--checkpoint", shop / "ckpt")
    assert code == 0 and said.startswith(f"MindIE will refuse {tmp_path / name} at this place, for a path may have")
    assert "rename or move it" in said.splitlines()[0]


def test_a_length_beyond_training_is_told(shop, tmp_path):
    code, said = invoke("build", tmp_path / "model", "--checkpoint", shop / "ckpt", "--max-seq-len", 100_000)
    assert code == 0 and said.startswith("--max-seq-len 100000 is beyond the ")
    code, said = invoke("build", tmp_path / "other", "--checkpoint", shop / "ckpt", "--max-seq-len", 128)
    assert code == 0 and "config.json gives" not in said


@pytest.mark.parametrize(
    ("typed", "sentence"),
    [("", "the prompt: is empty"), ("\n", "the prompt: is empty"), (b"\xff", "stdin: is not utf-8")],
)
def test_a_prompt_on_stdin_is_read(shop, typed, sentence):
    code, said = invoke("generate", shop / "model", "-", input=typed)
    assert code == 2 and sentence in said
