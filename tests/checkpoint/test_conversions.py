"""Every form into every other: bit-equal round trips, and what mindformers' own scripts do by their description."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT
from helpers.checkpoints import CONFIG, MOE, make_checkpoint
from helpers.torch_archive import write_torch_archive
from safetensors.numpy import load_file, save_file

from telechat_mindie.checkpoint.convert import MindSporeForm, OutputOptions, to_hugging_face, to_mindspore
from telechat_mindie.checkpoint.formats.mindspore import read_mindspore_ckpt
from telechat_mindie.checkpoint.formats.tensors import TensorReader
from telechat_mindie.checkpoint.source import open_checkpoint
from telechat_mindie.errors import CheckpointError
from telechat_mindie.model_dir.build import BuildOptions, build
from telechat_mindie.model_dir.layout import ModelDir
from telechat_mindie.text.settings import TEMPLATE_FILES

TOOLS = ROOT / "tools"
SHAPES = {"mha": {"num_key_value_heads": 8}, "gqa": {}, "moe": MOE, "tied": {"tie_word_embeddings": True}}


@pytest.fixture(scope="module", params=["mha", "gqa", "moe"])
def checkpoint(request, tmp_path_factory):
    """(directory, weights) of a bfloat16 checkpoint."""
    root = tmp_path_factory.mktemp(request.param) / "ckpt"
    return root, make_checkpoint(root, "bfloat16", **SHAPES[request.param])


def load_hugging_face(directory):
    import ml_dtypes  # noqa: F401 - makes numpy know bfloat16

    arrays = {}
    for file in directory.glob("*.safetensors"):
        arrays |= load_file(file)
    return arrays


def load_ckpt(path):
    with TensorReader() as reader:
        return {name: reader.load(tensor) for name, tensor in read_mindspore_ckpt(path).items()}


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype.name == array.dtype.name and found[name].shape == array.shape, name
        assert found[name].tobytes() == array.tobytes(), name


def digests(path):
    files = ModelDir.open(path).manifest["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name.startswith("rank_")}


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("qkv_concat", [True, False])
def test_hugging_face_to_ranks_and_back(checkpoint, tmp_path, tp, qkv_concat):
    root, weights = checkpoint
    build(tmp_path / "model", root, BuildOptions(tp=tp, qkv_concat=qkv_concat))
    to_hugging_face(open_checkpoint(tmp_path / "model"), tmp_path / "hf", OutputOptions())
    assert_same_bits(load_hugging_face(tmp_path / "hf"), weights)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == weights.keys()
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in weights.values())
    assert open_checkpoint(tmp_path / "hf").config == open_checkpoint(root).config


def test_what_stands_beside_the_weights_goes_along(tmp_path):
    root = tmp_path / "ckpt"
    make_checkpoint(root, "float16", auto_map={"AutoConfig": "configuration_telechat2.Telechat2Config"})
    beside = {
        "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["a.B", None]}, "chat_template": "{{ x }}", "n": "中"},
        "special_tokens_map.json": {"eos_token": "<_end>"},
        "generation_config.json": {"eos_token_id": [2, 5]},
        "chat_template.json": {"chat_template": "{{ x }}"},
    }
    for name, content in beside.items():
        (root / name).write_text(json.dumps(content))
    (root / "chat_template.jinja").write_text("{{ messages }}\n")
    (root / "modeling_telechat2.py").write_text("raise SystemExit\n")
    to_hugging_face(open_checkpoint(root), tmp_path / "hf", OutputOptions())
    for name in (*TEMPLATE_FILES, "tokenizer.model"):
        assert (tmp_path / "hf" / name).read_bytes() == (root / name).read_bytes()
    written = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert written["chat_template"] == "{{ x }}" and written["n"] == "中" and "auto_map" not in written
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text())["eos_token_id"] == [2, 5]
    # The code of others, and what would say the same of tokens a second time, does not.
    assert (tmp_path / "hf" / "modeling_telechat2.py").read_text() != "raise SystemExit\n"
    assert not (tmp_path / "hf" / "special_tokens_map.json").exists()
    # Weights that lie alone have it beside their config.json; what is beside themselves comes first.
    (tmp_path / "alone").mkdir()
    whole = tmp_path / "alone" / "whole.ckpt"
    to_mindspore(open_checkpoint(root), whole, MindSporeForm(container="ckpt"))
    (whole.parent / "chat_template.json").write_text("{}")
    to_hugging_face(open_checkpoint(whole, root), tmp_path / "again", OutputOptions())
    for file in (tmp_path / "hf").iterdir():
        other = (tmp_path / "again" / file.name).read_bytes()
        assert other == (b"{}" if file.name == "chat_template.json" else file.read_bytes()), file.name


def test_nothing_beside_the_weights_is_read_through_a_link(tmp_path):
    make_checkpoint(tmp_path / "ckpt", "float16")
    (tmp_path / "secret").write_text("{}")
    (tmp_path / "ckpt" / "generation_config.json").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="symbolic link"):
        to_hugging_face(open_checkpoint(tmp_path / "ckpt"), tmp_path / "hf", OutputOptions())
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("tp", [1, 2])
def test_a_tied_head_is_stored_of_its_own(tmp_path, tp):
    """Whether the published file has it or not, a model directory and what is made of it hold both."""
    root = tmp_path / "ckpt"
    weights = make_checkpoint(root, "bfloat16", **SHAPES["tied"])
    weights["lm_head.weight"] = weights["transformer.word_embeddings.weight"]
    for file in (*root.glob("*.safetensors"), root / "model.safetensors.index.json"):
        file.unlink()
    save_file(weights, root / "model.safetensors")
    build(tmp_path / "both", root, BuildOptions(tp=tp))
    save_file({name: array for name, array in weights.items() if name != "lm_head.weight"}, root / "model.safetensors")
    build(tmp_path / "one", root, BuildOptions(tp=tp))
    assert digests(tmp_path / "one") == digests(tmp_path / "both")
    to_hugging_face(open_checkpoint(tmp_path / "one"), tmp_path / "hf", OutputOptions())
    assert_same_bits(load_hugging_face(tmp_path / "hf"), weights)
    assert open_checkpoint(tmp_path / "hf").config.tie_word_embeddings


def test_another_tp_from_a_model_directory(tmp_path):
    make_checkpoint(tmp_path / "ckpt", "float16", n_head=16, num_key_value_heads=8, hidden_size=128)
    for tp in (1, 8):
        build(tmp_path / f"tp{tp}", tmp_path / "ckpt", BuildOptions(tp=tp))
    build(tmp_path / "8to4", tmp_path / "tp8", BuildOptions(tp=4))
    build(tmp_path / "4to1", tmp_path / "8to4", BuildOptions(tp=1))
    assert digests(tmp_path / "4to1") == digests(tmp_path / "tp1")
    build(tmp_path / "direct", tmp_path / "ckpt", BuildOptions(tp=4))
    assert digests(tmp_path / "8to4") == digests(tmp_path / "direct")


def test_packed_to_unpacked_and_back(checkpoint, tmp_path):
    build(tmp_path / "on", checkpoint[0], BuildOptions(tp=2))
    build(tmp_path / "off", tmp_path / "on", BuildOptions(tp=2, qkv_concat=False))
    build(tmp_path / "again", tmp_path / "off", BuildOptions(tp=2))
    assert digests(tmp_path / "on") == digests(tmp_path / "again") != digests(tmp_path / "off")


def test_torch_archives_give_the_same_hashes(checkpoint, tmp_path):
    root, weights = checkpoint
    other = tmp_path / "bin"
    other.mkdir()
    for name in ("config.json", "tokenizer.model"):
        (other / name).write_bytes((root / name).read_bytes())
    names = list(weights)
    for number, half in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        write_torch_archive(other / f"pytorch_model-0000{number}-of-00002.bin", {name: weights[name] for name in half})
    build(tmp_path / "a", root, BuildOptions(tp=2))
    build(tmp_path / "b", other, BuildOptions(tp=2))
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def by_the_published_description(weights, head_dim, qkv_concat=False, rank=None):
    """mindformers r1.6.0 research/telechat2/convert_weight.py, in numpy, one replacement after the other."""
    found, experts = {}, {}
    for name, array in weights.items():
        renamed = name.replace("transformer.word_embeddings.weight", "model.tok_embeddings.embedding_weight")
        for old, new in (
            (".input_layernorm", ".attention_norm"),
            (".self_attention.dense.", ".attention.wo."),
            (".self_attention.query.", ".attention.wq."),
            (".self_attention.key_value.", ".attention.wk_v."),
            (".mlp.gate_proj.", ".feed_forward.w1."),
            (".mlp.down_proj.", ".feed_forward.w2."),
            (".mlp.up_proj.", ".feed_forward.w3."),
            (".mlp.router.", ".feed_forward.router.dense."),
            (".post_attention_layernorm.", ".ffn_norm."),
            ("transformer.ln_f.", "model.norm_out."),
            ("transformer.h.", "model.layers."),
        ):
            renamed = renamed.replace(old, new)
        if ".local_experts." in renamed:
            stem, _, rest = renamed.partition(".mlp.local_experts.")
            expert, _, kind = rest.partition(".")
            kind = kind.replace("gate_proj", "w1").replace("up_proj", "w3").replace("down_proj", "w2")
            experts.setdefault(f"{stem}.feed_forward.ffn.{kind}", {})[int(expert)] = array
        else:
            found[renamed] = array
    for name, parts in experts.items():
        stack = np.stack([parts[expert] for expert in sorted(parts)])
        found[name] = stack[None, :, None] if name.endswith("bias") else stack
    if qkv_concat:
        for name in [name for name in found if name.endswith("attention.wq.weight")]:
            stem = name[: -len("attention.wq.weight")]
            key_value = found.pop(stem + "attention.wk_v.weight")
            pieces = np.split(key_value, len(key_value) // head_dim)
            found[stem + "attention.w_qkv.weight"] = np.concatenate([found.pop(name), *pieces[::2], *pieces[1::2]])
            if stem + "feed_forward.w1.weight" in found:
                gate, up = (found.pop(f"{stem}feed_forward.{part}.weight") for part in ("w1", "w3"))
                found[stem + "feed_forward.w_gate_hidden.weight"] = np.concatenate([gate, up])
    return found


def tool(name, *arguments, cwd=None):
    command = [sys.executable, str(TOOLS / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd)


def checked(*arguments, **options):
    done = tool(*arguments, **options)
    assert done.returncode == 0, done.stderr
    return done


def test_convert_weight_as_published(checkpoint, tmp_path):
    root, weights = checkpoint
    checked("convert_weight.py", "--torch_path", root, "--mindspore_path", tmp_path / "whole.ckpt")
    assert_same_bits(load_ckpt(tmp_path / "whole.ckpt"), by_the_published_description(weights, 8))
    checked("convert_weight.py", "--torch_path", root, "--mindspore_path", tmp_path / "f32.ckpt", "--dtype", "float32")
    wide = {name: array.astype(np.float32) for name, array in weights.items()}
    assert_same_bits(load_ckpt(tmp_path / "f32.ckpt"), by_the_published_description(wide, 8))


def test_mindspore_loads_what_convert_weight_writes(checkpoint, tmp_path):
    import mindspore

    root, weights = checkpoint
    for suffix in ("ckpt", "safetensors"):
        target = tmp_path / f"whole.{suffix}"
        checked("convert_weight.py", "--torch_path", root, "--mindspore_path", target)
        loaded = mindspore.load_checkpoint(str(target), format=suffix)
        expected = by_the_published_description(weights, 8)
        assert loaded.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(loaded[name].asnumpy().view(np.uint16), array.view(np.uint16), name)


def test_qkv_concat_of_a_whole_checkpoint(checkpoint, tmp_path):
    root, weights = checkpoint
    whole = tmp_path / "whole.ckpt"
    checked("convert_weight.py", "--torch_path", root, "--mindspore_path", whole)
    arguments = ("--model_name", "telechat_7B", "--qkv_concat", "True", "--config", root)
    checked("convert_weight.py", *arguments, "--pre_ckpt_path", whole, "--mindspore_ckpt_path", tmp_path / "qkv.ckpt")
    assert_same_bits(load_ckpt(tmp_path / "qkv.ckpt"), by_the_published_description(weights, 8, qkv_concat=True))


def test_qkv_concat_of_rank_folders(checkpoint, tmp_path):
    """The published script packs each rank's own tensors, which is what splitting the packed roles must give too."""
    root, _ = checkpoint
    form = MindSporeForm(container="ckpt", tp=2, ranks=True)
    to_mindspore(open_checkpoint(root), tmp_path / "ranks", form)
    arguments = ("--qkv_concat", "True", "--config", root, "--pre_ckpt_path", tmp_path / "ranks")
    checked("convert_weight.py", *arguments, "--mindspore_ckpt_path", tmp_path / "packed")
    for rank in range(2):
        before = load_ckpt(tmp_path / "ranks" / f"rank_{rank}" / f"checkpoint_{rank}.ckpt")
        after = load_ckpt(tmp_path / "packed" / f"rank_{rank}" / f"checkpoint_{rank}.ckpt")
        assert_same_bits(after, by_the_published_description(before, 8, qkv_concat=True))


@pytest.fixture
def expert_ranks(tmp_path):
    """(checkpoint, rank folders alone, without a config.json) of a model whose head dimension is not 128."""
    make_checkpoint(tmp_path / "ckpt", "bfloat16", **MOE)
    form = MindSporeForm(container="ckpt", tp=2, ranks=True)
    to_mindspore(open_checkpoint(tmp_path / "ckpt"), tmp_path / "ranks", form)
    return tmp_path / "ckpt", tmp_path / "ranks"


def with_experts_turned(tensors):
    experts = ("ffn.w1.weight", "ffn.w2.weight", "ffn.w3.weight")
    return {name: array.transpose(0, 2, 1) if name.endswith(experts) else array for name, array in tensors.items()}


def test_gmm_transpose(expert_ranks, tmp_path):
    """By the experts' names alone, as the published script: of any hidden size, without a config.json."""
    checkpoint, ranks = expert_ranks
    checked("convert_gmm.py", "--ckpt_path", ranks, "--save_path", tmp_path / "gmm", "--rank", 2)
    for rank in range(2):
        before, after = (load_ckpt(root / f"rank_{rank}/checkpoint_{rank}.ckpt") for root in (ranks, tmp_path / "gmm"))
        assert_same_bits(after, with_experts_turned(before))
    # And back again, to the published format.
    arguments = ("--mindspore_path", tmp_path / "gmm", "--torch_path", tmp_path / "hf", "--config", checkpoint)
    checked("convert_reversed.py", *arguments)
    assert_same_bits(load_hugging_face(tmp_path / "hf"), load_hugging_face(checkpoint))
    done = tool("convert_gmm.py", "--ckpt_path", ranks, "--save_path", tmp_path / "x", "--rank", 4)
    assert done.returncode == 2 and "error: " in done.stderr


def test_gmm_transpose_keeps_each_dtype_and_whatever_else_is_in_the_file(expert_ranks, tmp_path):
    import mindspore

    _, ranks = expert_ranks
    for file in sorted(ranks.glob("rank_*/*.ckpt")):
        saved = []
        for name, tensor in mindspore.load_checkpoint(str(file)).items():
            array = tensor.float().asnumpy() if "router" in name else None
            saved.append({"name": name, "data": tensor if array is None else mindspore.Tensor(array)})
        saved.append({"name": "global_step", "data": mindspore.Tensor(np.array([7], np.int32))})
        mindspore.save_checkpoint(saved, str(file))
    checked("convert_gmm.py", "--ckpt_path", ranks, "--save_path", tmp_path / "gmm", "--rank", 2)
    before, after = (load_ckpt(root / "rank_1" / "checkpoint_1.ckpt") for root in (ranks, tmp_path / "gmm"))
    assert {array.dtype.name for array in after.values()} == {"bfloat16", "float32", "int32"}
    assert_same_bits(after, with_experts_turned(before))


def test_gmm_transpose_refuses_what_has_no_experts(tmp_path):
    make_checkpoint(tmp_path / "ckpt", "float16")
    form = MindSporeForm(container="ckpt", ranks=True)
    to_mindspore(open_checkpoint(tmp_path / "ckpt"), tmp_path / "ranks", form)
    done = tool("convert_gmm.py", "--ckpt_path", tmp_path / "ranks", "--save_path", tmp_path / "x", "--rank", 1)
    assert done.returncode == 2 and "no experts" in done.stderr and not (tmp_path / "x").exists()


@pytest.mark.parametrize("shape", ["gqa", "moe"])
def test_float32_stays_float32_unless_asked(tmp_path, shape):
    """In every direction; what is served is another question, which `build` answers."""
    weights = make_checkpoint(tmp_path / "ckpt", "float32", **SHAPES[shape])
    config = ("--config", tmp_path / "ckpt")
    checked("convert_weight.py", "--torch_path", tmp_path / "ckpt", "--mindspore_path", tmp_path / "whole.ckpt")
    assert_same_bits(load_ckpt(tmp_path / "whole.ckpt"), by_the_published_description(weights, 8))
    arguments = ("--qkv_concat", "True", *config, "--pre_ckpt_path", tmp_path / "whole.ckpt")
    checked("convert_weight.py", *arguments, "--mindspore_ckpt_path", tmp_path / "packed.ckpt")
    arguments = ("--src_ckpt_dir", tmp_path / "packed.ckpt", "--dst_ckpt_dir", tmp_path / "ranks", "--tp", 2)
    checked("transform_ckpt.py", *arguments, *config)
    checked("convert_reversed.py", "--mindspore_path", tmp_path / "ranks", "--torch_path", tmp_path / "hf", *config)
    assert_same_bits(load_hugging_face(tmp_path / "hf"), weights)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == "float32"
    command = [sys.executable, "-m", "telechat_mindie", "convert", tmp_path / "ckpt", tmp_path / "out", "--to"]
    for form, load in (("hf", load_hugging_face), ("ckpt", load_ckpt)):
        subprocess.run([*command, form, "--force"], check=True, capture_output=True)
        expected = weights if form == "hf" else by_the_published_description(weights, 8)
        assert_same_bits(load(tmp_path / "out"), expected)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


def test_each_tensor_keeps_its_own_dtype(tmp_path):
    root = tmp_path / "ckpt"
    weights = make_checkpoint(root, "bfloat16")
    wide = ("mlp.gate_proj.weight", "layernorm.weight")
    weights = {name: array.astype(np.float32) if name.endswith(wide) else array for name, array in weights.items()}
    for file in root.glob("*.safetensors"):
        save_file({name: weights[name] for name in load_file(file)}, file)
    to_hugging_face(open_checkpoint(root), tmp_path / "hf", OutputOptions())
    assert_same_bits(load_hugging_face(tmp_path / "hf"), weights)
    to_mindspore(open_checkpoint(root), tmp_path / "x.ckpt", MindSporeForm(container="ckpt", qkv_concat=True))
    # Gate is float32 and up bfloat16: packed, they are what holds both.
    wide = {name: array.astype(np.float32) if "mlp.up" in name else array for name, array in weights.items()}
    assert_same_bits(load_ckpt(tmp_path / "x.ckpt"), by_the_published_description(wide, 8, qkv_concat=True))


def test_merge_and_split_without_strategy_files(checkpoint, tmp_path):
    root, weights = checkpoint
    to_mindspore(open_checkpoint(root), tmp_path / "ranks", MindSporeForm(container="ckpt", tp=4, ranks=True))
    arguments = ("--src_ckpt_dir", tmp_path / "ranks", "--config", root)
    checked("transform_ckpt.py", *arguments, "--dst_ckpt_dir", tmp_path / "merged", "--prefix", "telechat_x")
    merged = tmp_path / "merged" / "rank_0" / "telechat_x0.ckpt"
    assert_same_bits(load_ckpt(merged), by_the_published_description(weights, 8))
    arguments = ("--src_ckpt_dir", merged, "--config", root, "--tp", 4)
    checked("transform_ckpt.py", *arguments, "--dst_ckpt_dir", tmp_path / "split")
    for rank in range(4):
        name = f"rank_{rank}/checkpoint_{rank}.ckpt"
        assert (tmp_path / "split" / name).read_bytes() == (tmp_path / "ranks" / name).read_bytes()


def test_a_missing_rank_is_noticed(checkpoint, tmp_path):
    root, _ = checkpoint
    to_mindspore(open_checkpoint(root), tmp_path / "ranks", MindSporeForm(container="ckpt", tp=4, ranks=True))
    for missing, message in ((1, "rank_1"), (3, "")):
        (tmp_path / "ranks" / f"rank_{missing}").rename(tmp_path / "away")
        done = tool("convert_reversed.py", "--mindspore_path", tmp_path / "ranks", "--torch_path", tmp_path / "hf")
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
        (tmp_path / "away").rename(tmp_path / "ranks" / f"rank_{missing}")


def test_sizes_are_inferred_without_a_config(tmp_path):
    """As the published converter is called: a MindSpore file alone, head dimension 128."""
    make_checkpoint(tmp_path / "ckpt", "float16", hidden_size=512, n_head=4, num_key_value_heads=2)
    (tmp_path / "alone").mkdir()
    whole = tmp_path / "alone" / "whole.ckpt"
    checked("convert_weight.py", "--torch_path", tmp_path / "ckpt", "--mindspore_path", whole)
    arguments = ("--qkv_concat", "True", "--pre_ckpt_path", whole)
    checked("convert_weight.py", *arguments, "--mindspore_ckpt_path", tmp_path / "alone" / "qkv.ckpt")
    weights = load_hugging_face(tmp_path / "ckpt")
    packed = load_ckpt(tmp_path / "alone" / "qkv.ckpt")
    assert_same_bits(packed, by_the_published_description(weights, 128, qkv_concat=True))
    found = open_checkpoint(tmp_path / "alone" / "qkv.ckpt").config
    assert (found.num_heads, found.num_kv_heads, found.ffn_size, found.num_layers) == (4, 2, 96, 2)


def test_get_config(tmp_path):
    make_checkpoint(tmp_path / "ckpt", "float16")
    build(tmp_path / "model", tmp_path / "ckpt")
    (tmp_path / "model" / "config.json").unlink()
    checked("get_config.py", cwd=tmp_path / "model")
    found = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (found["torch_dtype"], found["model_type"], found["vocab_size"]) == ("float16", "telechat", 512)
    assert ModelDir.open(tmp_path / "model").config.num_layers == CONFIG["n_layer"]
    (tmp_path / "model" / "second.yaml").write_text("a: 1")
    done = tool("get_config.py", cwd=tmp_path / "model")
    assert done.returncode == 2 and "exactly one yaml" in done.stderr


def test_optimizer_state_is_left_out(tmp_path):
    import mindspore

    make_checkpoint(tmp_path / "ckpt", "float16")
    whole = tmp_path / "ckpt" / "whole.ckpt"
    to_mindspore(open_checkpoint(tmp_path / "ckpt"), tmp_path / "x.ckpt", MindSporeForm(container="ckpt"))
    saved = [
        {"name": name, "data": tensor} for name, tensor in mindspore.load_checkpoint(str(tmp_path / "x.ckpt")).items()
    ]
    extra = {"adam_m.lm_head.weight": (512, 64), "global_step": (1,), "learning_rate": ()}
    saved += [{"name": name, "data": mindspore.Tensor(np.ones(shape, np.float32))} for name, shape in extra.items()]
    mindspore.save_checkpoint(saved, str(whole))
    assert (
        open_checkpoint(whole, tmp_path / "ckpt").weights.keys()
        == open_checkpoint(tmp_path / "x.ckpt", tmp_path / "ckpt").weights.keys()
    )


@pytest.mark.parametrize("turn_bytes", [1, 1 << 20])
def test_blocks_of_any_size_give_the_same_bytes(checkpoint, tmp_path, monkeypatch, turn_bytes):
    """Rows that do not fill a block, matrices turned in pieces, and rows wider than a block."""
    from telechat_mindie.checkpoint import reader

    root, _ = checkpoint
    build(tmp_path / "usual", root, BuildOptions(tp=2))
    monkeypatch.setattr(reader, "TURN_BYTES", turn_bytes)
    for size in (100, 1000, 5000):
        monkeypatch.setattr(reader, "BLOCK_BYTES", size)
        build(tmp_path / "small", root, BuildOptions(tp=2, force=True))
        assert digests(tmp_path / "small") == digests(tmp_path / "usual")
