"""LoRA adapters merged on the way: W + scale * B A, whatever form the adapter, the model and the output have."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import sys
import tracemalloc

import numpy as np
import pytest
from helpers import cli
from helpers.checkpoints import CONFIG, MOE, make_checkpoint
from helpers.reference import logits
from helpers.torch_archive import write_torch_archive
from safetensors.numpy import load_file, save_file

from telechat_mindie.checkpoint import reader
from telechat_mindie.checkpoint.adapters import factors as adapter_factors
from telechat_mindie.checkpoint.convert import MindSporeForm, OutputOptions, to_hugging_face, to_mindspore
from telechat_mindie.checkpoint.deltas import LoadedDeltas, loading_bytes
from telechat_mindie.checkpoint.formats.tensors import TensorReader
from telechat_mindie.checkpoint.mapping import weights
from telechat_mindie.checkpoint.source import open_checkpoint
from telechat_mindie.config import TelechatConfig
from telechat_mindie.dtypes import DTYPES
from telechat_mindie.errors import CheckpointError, OutputError, TelechatMindieError
from telechat_mindie.model_dir.build import BuildOptions, build
from telechat_mindie.model_dir.layout import ModelDir
from telechat_mindie.model_dir.verify import check_against
from telechat_mindie.nano import write_checkpoint

LINEAR = ("query", "key_value", "dense", "gate_proj", "up_proj", "down_proj")
RANK, ALPHA = 4, 6
LAYER = "transformer.h.{}."
MINDFORMERS = {
    "self_attention.query": "attention.wq",
    "self_attention.key_value": "attention.wk_v",
    "self_attention.dense": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
}


def make_factors(modules=LINEAR, rank=RANK, seed=1, dtype="float32", **changes):
    """(A, B) by module of the Hugging Face model, of all weights whose module ends in one of `modules`."""
    rng = np.random.default_rng(seed)
    found = {}
    for weight in weights(TelechatConfig.from_dict(CONFIG | changes)).values():
        module = weight.name.removesuffix(".weight")
        if weight.name.endswith(".weight") and module.endswith(tuple(modules)):
            shapes = ((rank, weight.shape[1]), (weight.shape[0], rank))
            pair = (rng.standard_normal(shape, dtype=np.float32) * 0.3 for shape in shapes)
            found[module] = tuple(factor.astype(DTYPES[dtype].numpy) for factor in pair)
    return found


def peft_tensors(factors):
    return {
        f"base_model.model.{module}.lora_{side}.weight": factor
        for module, pair in factors.items()
        for side, factor in zip("AB", pair, strict=True)
    }


def write_peft(folder, factors, tensors=None, archive=False, **settings):
    folder.mkdir(parents=True)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "TeleAI/TeleChat2-7B",
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "lora_dropout": 0.05,
        "megatron_core": "megatron.core",
        "qalora_group_size": 16,
        "modules_to_save": None,
        "target_modules": sorted({module.rpartition(".")[2] for module in factors}),
        "r": RANK,
        "lora_alpha": ALPHA,
        "use_dora": False,
        "use_rslora": False,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config | settings))
    tensors = peft_tensors(factors) if tensors is None else tensors
    if archive:
        write_torch_archive(folder / "adapter_model.bin", tensors)
    else:
        save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def merged(arrays, *scaled_factors):
    """W + scale * B A in float64, rounded to float32 once; experts and the rest as they are."""
    found = {name: array.astype(np.float64) for name, array in arrays.items()}
    for scale, factors in scaled_factors:
        for module, (a, b) in factors.items():
            found[f"{module}.weight"] += scale * (b.astype(np.float64) @ a.astype(np.float64))
    return {name: array.astype(np.float32) for name, array in found.items()}


def write_merged(folder, checkpoint, arrays):
    folder.mkdir()
    for name in ("config.json", "tokenizer.model"):
        (folder / name).write_bytes((checkpoint / name).read_bytes())
    save_file(arrays, folder / "model.safetensors")
    return folder


def digests(path):
    files = ModelDir.open(path).manifest["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name.startswith("rank_")}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    root = tmp_path_factory.mktemp("base") / "ckpt"
    return root, make_checkpoint(root, "float32")


@pytest.fixture
def adapter(tmp_path):
    return write_peft(tmp_path / "lora", make_factors())


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("tp", "qkv_concat"), [(1, True), (2, True), (2, False)])
def test_merged_weights(tmp_path, stored, tp, qkv_concat):
    """The very bytes that a merged float32 checkpoint gives: one rounding to float32, one to the output's dtype."""
    arrays = make_checkpoint(tmp_path / "ckpt", stored)
    factors = make_factors(dtype=stored)
    direct = write_merged(tmp_path / "merged", tmp_path / "ckpt", merged(arrays, (ALPHA / RANK, factors)))
    options = {"tp": tp, "qkv_concat": qkv_concat, "dtype": stored}
    build(tmp_path / "a", direct, BuildOptions(**options))
    for archive in (False, True):
        lora = write_peft(tmp_path / f"lora{archive}", factors, archive=archive)
        build(tmp_path / "b", tmp_path / "ckpt", BuildOptions(**options, adapters=(lora,), force=True))
        assert digests(tmp_path / "b") == digests(tmp_path / "a")
        source = ModelDir.open(tmp_path / "b").manifest["source"]
        assert [(entry["name"], entry["scale"], entry["weights"]) for entry in source["adapters"]] == [
            (lora.name, ALPHA / RANK, 12)
        ]
    assert "adapters" not in ModelDir.open(tmp_path / "a").manifest["source"]


def test_convert_to_every_form(base, adapter, tmp_path):
    root, arrays = base
    expected = merged(arrays, (ALPHA / RANK, make_factors()))
    to_hugging_face(open_checkpoint(root, adapters=[adapter]), tmp_path / "hf", OutputOptions())
    found = load_file(next((tmp_path / "hf").glob("*.safetensors")))
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, name)
    to_mindspore(open_checkpoint(root, adapters=[adapter]), tmp_path / "a.ckpt", MindSporeForm(container="ckpt"))
    to_mindspore(open_checkpoint(tmp_path / "hf"), tmp_path / "b.ckpt", MindSporeForm(container="ckpt"))
    assert (tmp_path / "a.ckpt").read_bytes() == (tmp_path / "b.ckpt").read_bytes()


@pytest.mark.parametrize("size", [100, 1000, 5000])
def test_blocks_of_any_size_give_the_same_bytes(base, adapter, tmp_path, monkeypatch, size):
    build(tmp_path / "usual", base[0], BuildOptions(tp=2, adapters=(adapter,)))
    monkeypatch.setattr(reader, "BLOCK_BYTES", size)
    build(tmp_path / "small", base[0], BuildOptions(tp=2, adapters=(adapter,)))
    assert digests(tmp_path / "small") == digests(tmp_path / "usual")


def test_the_bytes_do_not_depend_on_the_ranks(tmp_path):
    """Matrices of several tiles, whose edges the ranks' and the heads' rows do not meet."""
    changes = {"hidden_size": 704, "n_head": 8, "num_key_value_heads": 2, "ffn_hidden_size": 1096, "n_layer": 1}
    make_checkpoint(tmp_path / "ckpt", "float32", **changes)
    lora = write_peft(tmp_path / "lora", make_factors(rank=37, **changes), r=37)
    build(tmp_path / "two", tmp_path / "ckpt", BuildOptions(tp=2, dtype="float32", adapters=(lora,)))
    build(tmp_path / "one", tmp_path / "two", BuildOptions(dtype="float32"))
    options = BuildOptions(dtype="float32", adapters=(lora,))
    build(tmp_path / "direct", tmp_path / "ckpt", options)
    assert digests(tmp_path / "one") == digests(tmp_path / "direct")


def test_experts_embeddings_and_the_head(tmp_path):
    """Experts as single linear layers, stored for the grouped matmul; an embedding's A and B lie the other way."""
    arrays = make_checkpoint(tmp_path / "ckpt", "float32", **MOE)
    factors = make_factors(("gate_proj", "down_proj", "router", "lm_head", "word_embeddings"), **MOE)
    a, b = factors["transformer.word_embeddings"]
    tensors = peft_tensors({name: pair for name, pair in factors.items() if "embeddings" not in name})
    stem = "base_model.model.transformer.word_embeddings.lora_embedding_"
    tensors |= {stem + "A": np.ascontiguousarray(b.T), stem + "B": np.ascontiguousarray(a.T)}
    lora = write_peft(tmp_path / "lora", factors, tensors)
    direct = write_merged(tmp_path / "merged", tmp_path / "ckpt", merged(arrays, (ALPHA / RANK, factors)))
    for name, source, adapters in (("a", direct, ()), ("b", tmp_path / "ckpt", (lora,))):
        build(tmp_path / name, source, BuildOptions(tp=2, adapters=adapters))
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def test_scales_and_several_adapters(base, tmp_path):
    """alpha / r, alpha / sqrt(r), patterns of rank and alpha, names as other versions of peft save them."""
    root, arrays = base
    plain, rs, wide = make_factors(), make_factors(("query",), seed=2), make_factors(("dense",), rank=8, seed=3)
    odd = make_factors(("gate_proj", "up_proj"), seed=4)
    renamed = {name.replace("base_model.model.transformer.", ""): t for name, t in peft_tensors(odd).items()}
    renamed = {name.replace(".weight", ".default.weight"): tensor for name, tensor in renamed.items()}
    adapters = [
        write_peft(tmp_path / "plain", plain, use_rslora=None),
        write_peft(tmp_path / "rs", rs, use_rslora=True),
        write_peft(tmp_path / "wide", wide, rank_pattern={"self_attention.dense": 8}),
        write_peft(tmp_path / "odd", odd, renamed, alpha_pattern={"h.1.mlp.up_proj": 32, "^h.0.mlp.gate_proj": 2}),
    ]
    by_alpha = {32: "h.1.mlp.up_proj", 2: "h.0.mlp.gate_proj"}
    scaled = [(ALPHA / RANK, plain), (ALPHA / math.sqrt(RANK), rs), (ALPHA / 8, wide)]
    for name, pair in odd.items():
        alpha = next((alpha for alpha, module in by_alpha.items() if name.endswith(module)), ALPHA)
        scaled.append((alpha / RANK, {name: pair}))
    source = open_checkpoint(root, adapters=adapters)
    assert source.adapters[3].describe()["scale"] == [0.5, 1.5, 8.0]
    to_hugging_face(source, tmp_path / "hf", OutputOptions())
    found = load_file(next((tmp_path / "hf").glob("*.safetensors")))
    for name, array in merged(arrays, *scaled).items():
        np.testing.assert_array_max_ulp(found[name], array, 1)


def scales(root, adapter):
    """The scale of each module that an adapter changes, by its path without the layers' prefix."""
    (read,) = open_checkpoint(root, adapters=[adapter]).adapters
    return {name.removeprefix("transformer.").removesuffix(".weight"): d.scale for name, d in read.deltas.items()}


def test_a_pattern_with_a_caret_is_the_whole_path(base, tmp_path):
    """As peft matches it, `(.*\\.)?(KEY)$`: all of a path in the model that was trained, and the first key wins."""
    factors = make_factors(("query",))
    patterns = [
        ({"^query": 8}, 6, 6),
        ({"^h.0.self_attention.query": 8}, 6, 6),
        ({"^transformer.h.0.self_attention.query": 8, "query": 32}, 8, 32),
        ({"self_attention.query": 8, "^transformer.h.0.self_attention.query": 32}, 8, 8),
        ({"attention.query": 8}, 6, 6),
    ]
    for number, (pattern, first, second) in enumerate(patterns):
        lora = write_peft(tmp_path / str(number), factors, alpha_pattern=pattern)
        expected = {f"h.{layer}.self_attention.query": alpha / RANK for layer, alpha in ((0, first), (1, second))}
        assert scales(base[0], lora) == expected, pattern


@pytest.mark.parametrize(
    "prefix",
    ["base_model.model.module.transformer.", "base_model.model._orig_mod.", "module.base_model.model.transformer.", ""],
)
def test_names_behind_what_training_leaves(base, tmp_path, prefix):
    factors = make_factors(("query", "down_proj"))
    tensors = {name.replace("base_model.model.transformer.", prefix): t for name, t in peft_tensors(factors).items()}
    lora = write_peft(tmp_path / "lora", factors, tensors)
    assert len(scales(base[0], lora)) == 4
    tensors |= peft_tensors(make_factors(("dense",)))
    with pytest.raises(CheckpointError, match="under several prefixes"):
        open_checkpoint(base[0], adapters=[write_peft(tmp_path / "mixed", factors, tensors)])


def test_the_sha256_is_of_the_factors(base, tmp_path):
    """Not of the file, which may have another order or form, or hold the model too."""
    factors = make_factors(("query", "dense"), dtype="bfloat16")
    tensors = peft_tensors(factors)
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].tobytes())
    found = set()
    for archive in (False, True):
        lora = write_peft(tmp_path / f"lora{archive}", factors, dict(reversed(tensors.items())), archive=archive)
        found.add(open_checkpoint(base[0], adapters=[lora]).adapters[0].describe()["sha256"])
    assert found == {digest.hexdigest()}
    both = tmp_path / "both.safetensors"
    to_mindspore(open_checkpoint(base[0]), both, MindSporeForm())
    tensors = mindformers_tensors(factors)
    save_file(tensors, tmp_path / "alone.safetensors")
    save_file(load_file(both) | tensors, both)
    alone = open_checkpoint(base[0], adapters=[f"{tmp_path / 'alone.safetensors'}=2"])
    (read,) = open_checkpoint(both, base[0], [f"{both}=2"]).adapters
    assert read.sha256 == alone.adapters[0].sha256


def mindformers_tensors(factors):
    found = {}
    for module, (a, b) in factors.items():
        layer, _, kind = module.removeprefix("transformer.h.").partition(".")
        stem = f"model.layers.{layer}.{MINDFORMERS[kind]}.mindpet_delta_lora_"
        found |= {stem + "a": a, stem + "b": b}
    return found


def packed_tensors(factors, head_dim):
    """The same for a model that was trained with qkv_concat: one A, and B of all rows in the packed order."""
    found = {}
    for layer in range(CONFIG["n_layer"]):
        stem = f"transformer.h.{layer}."
        (a, query), (_, key_value) = (factors[f"{stem}self_attention.{name}"] for name in ("query", "key_value"))
        heads = np.split(key_value, len(key_value) // head_dim)
        target = f"model.layers.{layer}.attention.w_qkv.mindpet_delta_lora_"
        found |= {target + "a": a, target + "b": np.concatenate([query, *heads[::2], *heads[1::2]])}
    return found


YAML = """
data: &data {{shuffle: False}}
again: *data
model:
  model_config:
    pet_config: {{pet_type: lora, lora_rank: {rank}, lora_alpha: {alpha}}}
"""


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_mindformers(base, tmp_path, suffix):
    root, arrays = base
    factors = make_factors()
    folder = tmp_path / "run"
    (folder / "rank_0").mkdir(parents=True)
    tensors = mindformers_tensors(factors)
    extra = {"adam_m." + next(iter(tensors)): np.zeros(3, np.float32), "global_step": np.zeros(1, np.int32)}
    file = folder / "rank_0" / f"telechat_rank_0-2_9.{suffix}"
    if suffix == "ckpt":
        import mindspore

        pairs = [{"name": name, "data": mindspore.Tensor(array)} for name, array in (tensors | extra).items()]
        mindspore.save_checkpoint(pairs, str(file))
    else:
        save_file(tensors | extra, file)
    direct = write_merged(tmp_path / "merged", root, merged(arrays, (ALPHA / RANK, factors)))
    build(tmp_path / "a", direct, BuildOptions(tp=2))
    with pytest.raises(TelechatMindieError, match="scale of the adapter is not known"):
        open_checkpoint(root, adapters=[folder])
    build(tmp_path / "b", root, BuildOptions(tp=2, adapters=(f"{folder}={ALPHA / RANK}",)))
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    (folder / "finetune.yaml").write_text(YAML.format(rank=RANK, alpha=ALPHA))
    build(tmp_path / "c", root, BuildOptions(tp=2, adapters=(folder,)))
    assert digests(tmp_path / "a") == digests(tmp_path / "c")
    for rank, alpha, message in (
        (RANK + 1, ALPHA, r"rank is not the yaml's \(expected 5, found 4\)"),
        ("much", ALPHA, r"finetune.yaml: lora_rank: is no positive number \(found 'much'\)"),
        (RANK, -1, r"finetune.yaml: lora_alpha: is no positive number \(found '-1'\)"),
        (RANK, "[1, {a: 2}]", r"finetune.yaml: lora_alpha: is no positive number \(found 'a sequence'\)"),
    ):
        (folder / "finetune.yaml").write_text(YAML.format(rank=rank, alpha=alpha))
        with pytest.raises(TelechatMindieError, match=message):
            open_checkpoint(root, adapters=[folder])


def test_mindformers_trained_with_qkv_concat(base, tmp_path):
    root, arrays = base
    factors = make_factors(("query", "key_value"))
    for layer in range(CONFIG["n_layer"]):
        stem = f"transformer.h.{layer}.self_attention."
        factors[stem + "key_value"] = (factors[stem + "query"][0], factors[stem + "key_value"][1])
    save_file(packed_tensors(factors, head_dim=8), tmp_path / "lora.safetensors")
    to_hugging_face(
        open_checkpoint(root, adapters=[f"{tmp_path / 'lora.safetensors'}=0.5"]), tmp_path / "hf", OutputOptions()
    )
    found = load_file(next((tmp_path / "hf").glob("*.safetensors")))
    for name, array in merged(arrays, (0.5, factors)).items():
        np.testing.assert_array_equal(found[name], array, name)


def test_a_mindformers_checkpoint_that_holds_model_and_adapter(base, tmp_path):
    """What mindformers saves unless it is told to save the trainable weights alone: refused, until both are named."""
    root, _ = base
    (tmp_path / "run").mkdir()
    both = tmp_path / "run" / "both.safetensors"
    to_mindspore(open_checkpoint(root), both, MindSporeForm())
    save_file(load_file(both) | mindformers_tensors(make_factors()), both)
    for name in ("config.json", "tokenizer.model"):
        (both.parent / name).write_bytes((root / name).read_bytes())
    with pytest.raises(CheckpointError, match=r"holds a LoRA adapter beside the model.*--adapter too"):
        open_checkpoint(both.parent)
    with pytest.raises(CheckpointError, match=r"tensors beside the adapter.*--checkpoint too"):
        open_checkpoint(root, adapters=[f"{both}=1.5"])
    build(tmp_path / "a", both.parent, BuildOptions(adapters=(f"{both.parent}=1.5",)))
    lora = write_peft(tmp_path / "lora", make_factors())
    build(tmp_path / "b", root, BuildOptions(adapters=(lora,)))
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def test_a_real_training_run(shared, tmp_path):
    """mindformers' adapter after its first step, with its yaml: the merged model has the loss that it printed next.

    3.053; the model alone has 3.055, and another scale of the adapter another loss.
    """
    folder = shared("training/finetune")
    run, data = (np.load(folder / name) for name in ("lora.npz", "dense.npz"))
    tensors = {name.removeprefix("init/"): run[name] for name in run.files if name.startswith("init/")}
    (tmp_path / "run").mkdir()
    save_file(tensors, tmp_path / "run" / "telechat_rank_0-1_1.safetensors")
    (tmp_path / "run" / "finetune_lora.yaml").write_bytes((folder / "finetune_lora.yaml").read_bytes())
    write_checkpoint(tmp_path / "nano", replace=False)
    source = open_checkpoint(tmp_path / "nano", adapters=[tmp_path / "run"])
    to_hugging_face(source, tmp_path / "hf", OutputOptions(dtype="float32"))
    merged_weights = load_file(next((tmp_path / "hf").glob("*.safetensors")))
    losses = []
    for row in range(4, 8):  # those of the second step
        padding = int((data["input_ids"][row] == 3).cumprod().sum())
        ids, labels = data["input_ids"][row, padding:-1], data["labels"][row, padding + 1 :]
        scores = logits(merged_weights, source.config, ids)
        likelihood = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
        losses.extend(-likelihood[np.flatnonzero(labels != -100), labels[labels != -100]])
    assert round(float(np.mean(losses)), 3) == run["loss"][1]


def only(name):
    return lambda tensors, config: [tensors.pop(key) for key in list(tensors) if not re.search(name, key)]


def rename(old, new):
    def change(tensors, config):
        for key in list(tensors):
            tensors[key.replace(old, new)] = tensors.pop(key)

    return change


def put(name, array):
    return lambda tensors, config: tensors.update({f"base_model.model.transformer.h.0.{name}": array})


def settings(**changes):
    return lambda tensors, config: config.update(changes)


ZEROS = np.zeros((RANK, 64), np.float32)
QUERY = "self_attention.query.lora_"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (settings(peft_type="LOHA"), "peft_type: is no LoRA adapter (expected LORA, found 'LOHA')"),
        (settings(peft_type=None), "peft_type: is no LoRA adapter"),
        (settings(use_dora=True), "use_dora"),
        (settings(bias="all"), "bias"),
        (settings(lora_bias=True), "lora_bias"),
        (settings(fan_in_fan_out=True), "fan_in_fan_out"),
        (settings(modules_to_save=["lm_head"]), "modules_to_save"),
        (settings(layer_replication=[[0, 2]]), "layer_replication"),
        (settings(target_parameters=["experts"]), "target_parameters"),
        (settings(init_lora_weights="pissa_niter_4"), "init_lora_weights"),
        (settings(something_new=3), "something_new"),
        (settings(r=8), "rank of transformer.h.0"),
        (settings(lora_alpha=0), "lora_alpha: is no positive number"),
        (settings(lora_alpha="1e999"), "lora_alpha: is no positive number"),
        (settings(lora_alpha=10**400), "lora_alpha: is no positive number"),
        (settings(lora_alpha=None), "lora_alpha: is no positive number"),
        (settings(alpha_pattern={"(a+)+$": 3}), "alpha_pattern: is a pattern"),
        (settings(alpha_pattern=[1]), "are not both tables"),
        (settings(rank_pattern=7), "are not both tables"),
        (only("lora_A"), "holds A of an adapter's A and B"),
        (only("lora_B"), "holds B of an adapter's A and B"),
        (only("nothing"), "holds no tensors"),
        (rename("self_attention.query", "self_attn.q_proj"), "adapts a weight that the model does not have"),
        (rename("h.1.", "h.2."), "adapts a weight that the model does not have"),
        (rename("self_attention.query", "input_layernorm"), "adapts what is no single matrix"),
        (put(QUERY + "A.other.weight", ZEROS), "holds lora_A of two adapters"),
        (put(QUERY + "A.weight", ZEROS[:, 1:].copy()), "does not fit the weight"),
        (put(QUERY + "A.weight", ZEROS[:0]), "does not fit the weight"),
        (put(QUERY + "A.weight", ZEROS[:2]), "does not fit the weight"),
        (put(QUERY + "A.weight", ZEROS.reshape(-1)), "does not fit the weight"),
        (put(QUERY + "A.weight", ZEROS.astype(np.int64)), "has a dtype that weights do not have"),
        (put(QUERY + "A.weight", ZEROS + np.nan), "NaN or infinite values in the adapter"),
        (put(QUERY + "B.weight", np.full((64, RANK), np.inf, np.float32)), "NaN or infinite values in the adapter"),
        (put(QUERY + "B.bias", ZEROS[0]), "tensors that are no LoRA factors"),
        (put("self_attention.query.base_layer.weight", ZEROS), "tensors that are no LoRA factors"),
        (put("self_attention.query.lora_magnitude_vector", ZEROS[0]), "tensors that are no LoRA factors"),
        (put("self_attention.query.lora_embedding_A", ZEROS), "of an adapter's A and B"),
    ],
)  # fmt: skip
def test_what_is_refused(base, tmp_path, damage, message):
    """One sentence, and nothing is written."""
    tensors, config = peft_tensors(make_factors()), {}
    damage(tensors, config)
    lora = write_peft(tmp_path / "lora", make_factors(), tensors, **config)
    with pytest.raises(TelechatMindieError) as caught:
        build(tmp_path / "model", base[0], BuildOptions(adapters=(lora,)))
    assert message in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 600
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]


def test_tied_embeddings_are_not_adapted(tmp_path):
    make_checkpoint(tmp_path / "ckpt", tie_word_embeddings=True)
    lora = write_peft(tmp_path / "lora", make_factors(("lm_head",)))
    with pytest.raises(CheckpointError, match="tied"):
        open_checkpoint(tmp_path / "ckpt", adapters=[lora])
    a, b = make_factors(("lm_head",))["lm_head"]
    stem = "lm_head.mindpet_delta_lora_"
    save_file({stem + "a": a, stem + "b": b}, tmp_path / "head.safetensors")
    with pytest.raises(CheckpointError, match="tied"):
        open_checkpoint(tmp_path / "ckpt", adapters=[f"{tmp_path / 'head.safetensors'}=1"])


def truncate(lora):
    file = lora / "adapter_model.safetensors"
    os.truncate(file, file.stat().st_size - 1)


def huge_rank(lora):
    """A sparse file whose A is larger than the bound: told from the header, not by loading it."""
    rank, config = 600_000, lora / "adapter_config.json"
    config.write_text(config.read_text().replace(f'"r": {RANK}', f'"r": {rank}'))
    shapes = {"A": [rank, 64], "B": [64, rank]}
    header = {
        f"base_model.model.transformer.h.0.self_attention.query.lora_{side}.weight": {
            "dtype": "F32",
            "shape": shape,
            "data_offsets": [number * rank * 256, (number + 1) * rank * 256],
        }
        for number, (side, shape) in enumerate(shapes.items())
    }
    text = json.dumps(header).encode()
    file = lora / "adapter_model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(file, 8 + len(text) + 2 * rank * 256)


def link(lora):
    (lora / "adapter_model.safetensors").rename(lora.parent / "away")
    (lora / "adapter_model.safetensors").symlink_to(lora.parent / "away")


def as_pipe(lora):
    (lora / "adapter_model.safetensors").unlink()
    os.mkfifo(lora / "adapter_model.safetensors")


def unsafe_pickle(lora):
    (lora / "adapter_model.safetensors").unlink()
    (lora / "adapter_model.bin").write_bytes(b"\x80\x02cos\nsystem\n(X\x04\x00\x00\x00trueto.")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "is truncated"),
        (huge_rank, "too large to merge in bounded memory"),
        (link, "symbolic link"),
        (as_pipe, "not a regular file"),
        (unsafe_pickle, "adapter_model.bin"),
        (lambda lora: (lora / "adapter_config.json").unlink(), "adapter_config.json: file is missing"),
        (lambda lora: (lora / "adapter_config.json").write_text("[" * 10**6), "adapter_config.json: is nested too"),
        (lambda lora: (lora / "adapter_model.safetensors").unlink(), "holds no weights of the adapter"),
    ],
)  # fmt: skip
def test_hostile_files(base, adapter, damage, message):
    damage(adapter)
    with pytest.raises(TelechatMindieError, match=message):
        open_checkpoint(base[0], adapters=[adapter])


@pytest.fixture
def run(monkeypatch, capfd):
    """A command in this process: (exit code, stdout, stderr)."""

    def main(*arguments):
        monkeypatch.setattr(sys, "argv", ["telechat-mindie", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return (caught.value.code or 0, *capfd.readouterr())

    return main


def test_the_commands(base, adapter, tmp_path, run):
    root, model = base[0], tmp_path / "model"
    code, out, err = run("build", model, "--checkpoint", root, "--adapter", adapter)
    assert code == 0 and str(adapter) in out, err
    code, out, err = run("verify", model, "--against", root, "--adapter", adapter)
    assert code == 0 and "weights equal" in out, out + err
    code, out, err = run("verify", model, "--against", root)
    assert code == 2 and "adapters that were merged" in err and "'lora'" in err
    other = write_peft(tmp_path / "other", make_factors(seed=9))
    code, out, err = run("verify", model, "--against", root, "--adapter", other)
    assert code == 2 and "attention.wo.weight differs" in out
    code, out, err = run("convert", root, tmp_path / "hf", "--to", "hf", "--adapter", adapter, "--adapter", other)
    assert code == 0 and "merged" in out, err
    into = ("build", tmp_path / "x", "--checkpoint")
    for arguments, message in (
        ((*into, adapter), "is a LoRA adapter, not a model"),
        ((*into, root, "--adapter", tmp_path / "absent"), "adapter is not there"),
        ((*into, root, "--adapter", f"{adapter}=2"), "Leave =2 out"),
        ((*into, root, "--adapter", f"{adapter}=much"), "is no positive number"),
        ((*into, root, "--adapter", root), "holds several checkpoints"),
        (("verify", model, "--adapter", adapter), "Name the checkpoint too"),
    ):
        code, _, err = run(*arguments)
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and message in err, err
    assert not (tmp_path / "x").exists()


def test_another_adapter_makes_an_old_journal_invalid(base, adapter, tmp_path, monkeypatch):
    """A resumed run takes finished shards over only where everything is as it was."""
    from telechat_mindie.checkpoint import plan, stream

    monkeypatch.setattr(plan, "SHARD_BYTES", 50_000)
    other = write_peft(tmp_path / "other", make_factors(), lora_alpha=2 * ALPHA)
    build(tmp_path / "expected", base[0], BuildOptions(adapters=(other,)))

    class Killed(BaseException):
        pass

    def killed(*arguments, finish=stream._finish, done=[]):  # noqa: B006 - counts over the calls
        done.append(1)
        if len(done) > 2:
            raise Killed
        finish(*arguments)

    def interrupted(lora):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(stream, "_finish", killed)
            build(tmp_path / "model", base[0], BuildOptions(adapters=(lora,)))

    interrupted(adapter)
    with pytest.raises(OutputError, match="begun with other options"):
        build(tmp_path / "model", base[0], BuildOptions(adapters=(other,), resume=True))
    interrupted(other)
    os.utime(other / "adapter_model.safetensors")  # what it holds counts, not when it was copied
    build(tmp_path / "model", base[0], BuildOptions(adapters=(other,), resume=True))
    assert digests(tmp_path / "model") == digests(tmp_path / "expected")
    assert check_against(ModelDir.open(tmp_path / "model"), base[0], adapters=[other]) == []


def test_memory_stays_bounded(tmp_path):
    """An adapter costs the factors of one weight and a block, not what it has in all."""
    changes = {"hidden_size": 512, "ffn_hidden_size": 1024, "n_layer": 12}
    make_checkpoint(tmp_path / "ckpt", "float16", **changes)
    lora = write_peft(tmp_path / "lora", make_factors(rank=64, **changes), r=64)
    assert (lora / "adapter_model.safetensors").stat().st_size > 20 << 20

    def peak(*adapters):
        tracemalloc.start()
        try:
            build(tmp_path / "model", tmp_path / "ckpt", BuildOptions(adapters=adapters, force=True))
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(lora) - peak() < 6 << 20


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_bound_on_factors_is_what_they_take(base, tmp_path, monkeypatch, count, dtype):
    """Of all the adapters of a weight together, while they are loaded."""
    changes = {"n_layer": 1, "hidden_size": 1024, "ffn_hidden_size": 2048}
    make_checkpoint(tmp_path / "ckpt", "float16", **changes)
    factors = make_factors(("up_proj",), rank=32, dtype=dtype, **changes)
    loras = [write_peft(tmp_path / f"lora{number}", factors, r=32) for number in range(count)]
    source = open_checkpoint(tmp_path / "ckpt", adapters=loras)
    ((name, deltas),) = [(name, weight.deltas) for name, weight in source.weights.items() if weight.deltas]
    with TensorReader() as tensors:
        tracemalloc.start()
        try:
            loaded = LoadedDeltas(deltas, tensors)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert loaded and abs(peak - loading_bytes(deltas)) < 256 << 10  # numpy's own buffers
    for bound in (loading_bytes(deltas), loading_bytes(deltas) - 1):
        monkeypatch.setattr(adapter_factors, "MAX_FACTOR_BYTES", bound)
        if bound == loading_bytes(deltas):
            open_checkpoint(tmp_path / "ckpt", adapters=loras)
    with pytest.raises(CheckpointError, match=rf"{name}: rank {32 * count} is too large"):
        open_checkpoint(tmp_path / "ckpt", adapters=loras)
