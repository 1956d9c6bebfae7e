"""`convert`: a checkpoint in another form that is not a model directory."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from telechat_mindie.checkpoint.copying import Copier
from telechat_mindie.checkpoint.elsewhere.layout import hugging_face_files
from telechat_mindie.checkpoint.formats.containers import CONTAINERS, MINDSPORE_CKPT, TORCH_SAFETENSORS
from telechat_mindie.checkpoint.formats.tensors import StoredTensor, read_files
from telechat_mindie.checkpoint.mapping import Target, hugging_face_targets, mindformers_targets
from telechat_mindie.checkpoint.mindformers import rank_folders, read_file, weight_files
from telechat_mindie.checkpoint.pipeline import Progress
from telechat_mindie.checkpoint.plan import ConversionPlan, make_plan
from telechat_mindie.checkpoint.source import Checkpoint
from telechat_mindie.checkpoint.stream import ConvertOptions, convert_staged, known_dtype
from telechat_mindie.checkpoint.writer import Journal
from telechat_mindie.errors import InputError
from telechat_mindie.staging import StagedDirectory, dump_json, write_file

HUGGING_FACE_SHARD_BYTES = 5_000_000_000  # what Hugging Face's own tools cut at
UNLIMITED = 1 << 62

_EXPERT_STACK = re.compile(r"feed_forward\.ffn\.w[123]\.weight")

OnStart = Callable[[int], Progress]
"""Called with the bytes of the output before the first is written; gives the progress callback."""


@dataclass(frozen=True, kw_only=True)
class OutputOptions(ConvertOptions):
    """What a person may choose of an output. `dtype` auto: every tensor keeps the dtype that it is stored in."""

    dtype: str = "auto"
    force: bool = False


@dataclass(frozen=True, kw_only=True)
class MindSporeForm(OutputOptions):
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
    tp: int = 1
    ranks: bool = False
    qkv_concat: bool = False
    transposed_experts: bool = False
    file: str = "checkpoint_{rank}"


def to_mindspore(
    source: Checkpoint, output: Path, form: MindSporeForm, on_start: OnStart | None = None
) -> ConversionPlan:
    """Write `source` as mindformers names and shapes it.

    Raises:
        InputError, ConfigError: an option that is unknown or does not fit the model.
        CheckpointError, OutputError: see `telechat_mindie.checkpoint.stream.convert_staged`.
    """
    if form.container not in CONTAINERS:
        raise InputError("unknown format", where="--format", expected=" or ".join(CONTAINERS), found=form.container)
    transposed = form.transposed_experts and source.config.is_moe
    targets = mindformers_targets(source.config, qkv_concat=form.qkv_concat, transposed_experts=transposed)
    plan = make_plan(
        source.config,
        *_dtypes(targets, source, form),
        form.tp,
        container=CONTAINERS[form.container],
        shard_bytes=UNLIMITED,
        file=form.file.replace("{rank}", "{{rank}}"),
    )
    single = form.tp == 1 and not form.ranks
    progress = on_start(plan.output_bytes) if on_start else None
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
    source: Checkpoint, output: Path, options: OutputOptions, on_start: OnStart | None = None
) -> ConversionPlan:
    """Write `source` in the published Hugging Face format: shards, their index, and what other engines need beside.

    Raises:
        InputError, CheckpointError, OutputError: as `to_mindspore`.
        ConfigError, TokenizerError: a file beside the weights does not fit the model.
    """
    targets, dtype = _dtypes(hugging_face_targets(source.config), source, options)
    plan = make_plan(
        source.config, targets, dtype, container=TORCH_SAFETENSORS, shard_bytes=HUGGING_FACE_SHARD_BYTES, folder=""
    )
    files = hugging_face_files(source.folders, source.config, plan.dtype)
    progress = on_start(plan.output_bytes) if on_start else None
    with StagedDirectory(
        output,
        replace=options.force,
        marker="model.safetensors.index.json",
        resume=options.resume,
        scratch=Journal.NAME,
    ) as staged:
        convert_staged(plan, source, staged, options, progress)
        weight_map = {target.name: shard.file for shard in plan.shards for target in shard.targets}
        total = sum(frame.nbytes for shard in plan.shards for frame in shard.frames)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_file(staged.path / "model.safetensors.index.json", dump_json(index))
        for name, content in files.items():
            (staged.path / name).parent.mkdir(exist_ok=True)
            write_file(staged.path / name, content)
        staged.commit()
    return plan


def transpose_experts(source: Path, output: Path, ranks: int, on_start: OnStart | None = None) -> None:
    """Every rank's checkpoint with its experts [experts, a, b] stored as [experts, b, a], for the grouped matmul.

    The experts are known by their names, and everything else is copied as it is, so it takes no config.json and works
    for a model of any size, as mindformers' research/telechat2/convert_gmm.py does.

    Raises:
        InputError: `source` has another number of rank folders, or no experts.
        CheckpointError, OutputError: as `to_mindspore`.
    """
    folders = rank_folders(source)
    if len(folders) != ranks:
        raise InputError("does not fit the rank folders", where="--rank", expected=len(folders), found=ranks)
    stored = [read_files(weight_files(folder), read_file, folder) for folder in folders]
    if not any(_is_expert_stack(tensor) for tensors in stored for tensor in tensors.values()):
        raise InputError("holds no experts to transpose", where=source)
    progress = on_start(sum(tensor.nbytes for tensors in stored for tensor in tensors.values())) if on_start else None
    with StagedDirectory(output, replace=False) as staged, Copier(staged.path, progress) as copier:
        for rank, tensors in enumerate(stored):
            path = f"rank_{rank}/checkpoint_{rank}{MINDSPORE_CKPT.suffix}"
            copier.write(path, list(tensors.values()), MINDSPORE_CKPT, turned=_is_expert_stack)
        copier.finish()
        staged.commit()


def _is_expert_stack(tensor: StoredTensor) -> bool:
    return len(tensor.shape) == 3 and _EXPERT_STACK.search(tensor.name) is not None


def _dtypes(targets: Sequence[Target], source: Checkpoint, options: OutputOptions) -> tuple[list[Target], str]:
    """The targets, each with the dtype it shall have, and the dtype of most of the output.

    Stored as it is, a target that is put together from weights of several dtypes is float32, which holds them all.
    """
    if options.dtype != "auto":
        return list(targets), known_dtype(options.dtype)
    kept = []
    for target in targets:
        dtypes = {source.weights[part.source].dtype for part in target.parts}
        kept.append(replace(target, dtype=dtypes.pop() if len(dtypes) == 1 else "float32"))
    return kept, source.dtype
