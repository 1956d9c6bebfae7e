"""`convert`: a checkpoint in another form that is not a model directory."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from telechat_mindie.checkpoint.formats.containers import MINDSPORE_CKPT, SAFETENSORS, Container
from telechat_mindie.checkpoint.mapping import hugging_face_targets, mindformers_targets
from telechat_mindie.checkpoint.pipeline import Progress
from telechat_mindie.checkpoint.plan import Plan, make_plan
from telechat_mindie.checkpoint.source import Checkpoint
from telechat_mindie.checkpoint.stream import ConvertOptions, choose_dtype, convert_staged
from telechat_mindie.checkpoint.writer import Journal
from telechat_mindie.errors import InputError
from telechat_mindie.staging import StagedDirectory, dump_json, write_file

HUGGING_FACE_SHARD_BYTES = 5_000_000_000  # what Hugging Face's own tools cut at
UNLIMITED = 1 << 62

SIDE_FILES = ("generation_config.json", "tokenizer.model", "tokenizer_config.json")
CONTAINERS = {"safetensors": SAFETENSORS, "ckpt": MINDSPORE_CKPT}


@dataclass(frozen=True)
class MindSporeForm(ConvertOptions):
    """A mindformers checkpoint: one file, or with `ranks` a folder of rank_N folders with a file each.

    Attributes:
        container: "safetensors" or "ckpt".
        tp: number of ranks.
        ranks: write rank folders even for one rank.
        qkv_concat: pack q/k/v and gate/up, as convert_weight.py --qkv_concat does.
        transposed_experts: store experts for the grouped matmul, as convert_gmm.py does.
        file: name of a rank's file without suffix, by `{rank}`.
    """

    container: str = "safetensors"
    dtype: str = "auto"
    tp: int = 1
    ranks: bool = False
    qkv_concat: bool = False
    transposed_experts: bool = False
    file: str = "checkpoint_{rank}"
    force: bool = False


def to_mindspore(
    source: Checkpoint, output: Path, form: MindSporeForm, on_start: Callable[[Plan], Progress] | None = None
) -> Plan:
    """Write `source` as mindformers names and shapes it.

    Raises:
        InputError, ConfigError: an option that is unknown or does not fit the model.
        CheckpointError, OutputError: see `telechat_mindie.checkpoint.stream.convert`.
    """
    transposed = form.transposed_experts and source.config.is_moe
    plan = make_plan(
        source.config,
        mindformers_targets(source.config, qkv_concat=form.qkv_concat, transposed_experts=transposed),
        choose_dtype(form.dtype, source.dtype, source.config),
        form.tp,
        container=_container(form.container),
        shard_bytes=UNLIMITED,
        file=form.file.replace("{rank}", "{{rank}}"),
    )
    single = form.tp == 1 and not form.ranks
    progress = on_start(plan) if on_start else None
    with StagedDirectory(
        output, replace=form.force, marker="rank_0", resume=form.resume, single_file=single, scratch=Journal.NAME
    ) as staged:
        convert_staged(plan, source, staged, form, progress)
        if single:
            staged.commit_file(plan.path(0, plan.shards[0]))
        else:
            staged.commit()
    return plan


def to_hugging_face(
    source: Checkpoint,
    output: Path,
    options: ConvertOptions,
    dtype: str = "auto",
    force: bool = False,
    on_start: Callable[[Plan], Progress] | None = None,
) -> Plan:
    """Write `source` in the published Hugging Face format: shards, their index, config.json, the tokenizer's files.

    Raises:
        InputError, CheckpointError, OutputError: as `to_mindspore`.
    """
    plan = make_plan(
        source.config,
        hugging_face_targets(source.config),
        choose_dtype(dtype, source.dtype, source.config),
        shard_bytes=HUGGING_FACE_SHARD_BYTES,
        folder="",
    )
    progress = on_start(plan) if on_start else None
    with StagedDirectory(
        output, replace=force, marker="model.safetensors.index.json", resume=options.resume, scratch=Journal.NAME
    ) as staged:
        convert_staged(plan, source, staged, options, progress)
        weight_map = {target.name: shard.file for shard in plan.shards for target in shard.targets}
        total = sum(frame.nbytes for shard in plan.shards for frame in shard.frames)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_file(staged.path / "model.safetensors.index.json", dump_json(index))
        write_file(staged.path / "config.json", dump_json(_config(source, plan.dtype)))
        folder = source.path if source.path.is_dir() else source.path.parent
        for name in SIDE_FILES:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, staged.path / name)
        staged.commit()
    return plan


def _config(source: Checkpoint, dtype: str) -> dict[str, object]:
    """The source's own config.json, or the same facts in the published spelling where it came without one."""
    config = source.config
    if config.raw:
        return {**config.raw, "torch_dtype": dtype}
    facts: dict[str, object] = {
        "architectures": ["TelechatForCausalLM"],
        "model_type": "telechat",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "ffn_hidden_size": config.ffn_size,
        "layer_norm_epsilon": config.norm_eps,
        "seq_length": config.seq_length,
        "training_seqlen": config.training_seqlen,
        "base_seqlen": config.base_seqlen,
        "torch_dtype": dtype,
    }
    if config.is_moe:
        facts |= {"num_local_experts": config.num_experts, "num_experts_per_tok": config.experts_per_token}
    return facts


def _container(name: str) -> Container:
    if name not in CONTAINERS:
        raise InputError("unknown format", where="--format", expected=" or ".join(CONTAINERS), found=name)
    return CONTAINERS[name]
