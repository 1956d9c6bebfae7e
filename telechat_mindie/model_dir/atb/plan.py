"""What a build for atb will write, and whether atb_llm would compute it right: nothing is written here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from telechat_mindie.checkpoint.convert import HUGGING_FACE_SHARD_BYTES
from telechat_mindie.checkpoint.formats.containers import TORCH_SAFETENSORS
from telechat_mindie.checkpoint.mapping import hugging_face_targets
from telechat_mindie.checkpoint.msmodelslim import QUANTISE_AGAIN, Quantised, description_file, read_quantised
from telechat_mindie.checkpoint.plan import ConversionPlan, make_plan
from telechat_mindie.checkpoint.quantised_tensors import quantised_problems
from telechat_mindie.checkpoint.source import Checkpoint, open_checkpoint
from telechat_mindie.checkpoint.stream import ConvertOptions
from telechat_mindie.checkpoint.training_run import RunChoice
from telechat_mindie.computation import check_computation
from telechat_mindie.config import TelechatConfig
from telechat_mindie.dtypes import DTYPES
from telechat_mindie.errors import CheckpointError, ConfigError, InputError
from telechat_mindie.model_dir.atb.layout import CONFIG, quantised_bytes, rank_bytes
from telechat_mindie.model_dir.atb.rules import BLOCK_SIZE, DTYPE, model_refusals


@dataclass(frozen=True, kw_only=True)
class AtbOptions(ConvertOptions):
    """What a person may choose. `tp` is the number of cards that it is served with where nobody says; the weights are
    cut as they are loaded."""

    tp: int = 1
    force: bool = False
    adapters: tuple[str, ...] = ()
    config_dir: Path | None = None
    choice: RunChoice = field(default_factory=RunChoice)


@dataclass(frozen=True)
class AtbPlan:
    """What a build will write.

    Attributes:
        config: of the model.
        tp: cards.
        files: names and bytes of the files with weights.
        weights: bytes of them that a card holds, by how many share the model.
        allowed_tp: how many can.
        kind: float16, W8A8 or W8A8SC.
        conversion: how the weights are made; None where they are copied.
    """

    config: TelechatConfig
    tp: int
    files: Mapping[str, int]
    weights: Callable[[int], int]
    allowed_tp: tuple[int, ...]
    kind: str = DTYPE
    conversion: ConversionPlan | None = None

    @property
    def output_bytes(self) -> int:
        return sum(self.files.values())

    @property
    def rank_bytes(self) -> int:
        """Weights that one card holds."""
        return self.weights(self.tp)


def open_source(checkpoint: Path, options: AtbOptions) -> Checkpoint | Quantised:
    """The checkpoint in any form that `build` takes, or what msmodelslim made of one; refused where atb_llm would not
    compute it right.

    Raises:
        ConfigError, CheckpointError, InputError: as `build_atb`.
    """
    if description_file(checkpoint) is not None:
        return open_quantised(checkpoint, options)
    source = open_checkpoint(checkpoint, options.config_dir, options.adapters, options.choice)
    refuse(source.config, source.config_dir / CONFIG)
    return source


def open_quantised(checkpoint: Path, options: AtbOptions) -> Quantised:
    """What msmodelslim made. Raises as `open_source`."""
    refuse_float_options(options.config_dir, options.choice, options.adapters)
    source = read_quantised(checkpoint)
    for rule, clause in quantised_problems(source):
        if rule != "unknown":
            raise CheckpointError(clause, where=checkpoint, advice=QUANTISE_AGAIN)
    refuse(source.config, source.path / CONFIG)
    return source


def refuse_float_options(config_dir: Path | None, choice: RunChoice | None, adapters: tuple[str, ...] = ()) -> None:
    """Raises InputError for what only a checkpoint that is not quantised has."""
    if adapters or config_dir or choice:
        raise InputError(
            "is for a checkpoint that is not quantised",
            where="--adapter, --config, --strategy, --step, --source, --packed-by-rank",
            advice="Merge and convert first (`convert --to hf`), then quantise.",
        )


def refuse_ms_options(
    dtype: str, qkv_concat: bool, max_seq_len: int | None, block_size: int, bare_prompt: str = "chat"
) -> None:
    """Raises InputError for what only a directory for ms has, or what atb_llm does not compute in."""
    if dtype not in ("auto", DTYPE):
        raise InputError("is not what atb_llm computes in", where=f"--dtype {dtype}", expected=f"auto or {DTYPE}")
    if not qkv_concat or max_seq_len is not None or block_size != BLOCK_SIZE or bare_prompt != "chat":
        raise InputError(
            "is for --backend ms",
            where="--no-qkv-concat, --max-seq-len, --block-size, --bare-prompt",
            advice="A directory for atb has no such settings; `service-config --max-seq-len` bounds the length.",
        )


def refuse(config: TelechatConfig, where: Path | None = None) -> None:
    """Raises ConfigError where atb_llm would not compute this model right."""
    for refusal in model_refusals(config):
        key = refusal.key if where is None else f"{where}: {refusal.key}"
        raise ConfigError(refusal.message, where=key, advice=refusal.advice)
    check_computation(config, where)


def plan_atb(source: Checkpoint | Quantised, tp: int) -> AtbPlan:
    """What a build of an opened checkpoint writes, for so many cards.

    Raises:
        ConfigError, InputError: the model cannot be shared by so many.
    """
    return plan_quantised(source, tp) if isinstance(source, Quantised) else plan_float16(source.config, tp)


def plan_quantised(source: Quantised, tp: int) -> AtbPlan:
    """The same of a model whose files are copied."""
    if source.tp:
        if tp not in (1, source.tp):
            raise InputError("is not what it was compressed for", where=f"--tp {tp}", expected=source.tp)
        tp = source.tp
    else:
        source.config.check_tp(tp)
    weights = [name for name in source.files if name.endswith(".safetensors")]
    files = {name: (source.path / name).stat().st_size for name in weights}
    return AtbPlan(source.config, tp, files, partial(quantised_bytes, source), source.allowed_tp, source.kind)


def plan_float16(config: TelechatConfig, tp: int) -> AtbPlan:
    """The same of a model that is converted to float16; its weights need not be there yet."""
    config.check_tp(tp)
    made = atb_conversion(config)
    files = {made.path(0, shard): shard.nbytes for shard in made.shards}
    targets = [target for shard in made.shards for target in shard.targets]
    sizes = {target.name: DTYPES[DTYPE].itemsize * math.prod(target.shape) for target in targets}
    return AtbPlan(config, tp, files, partial(rank_bytes, sizes, config), config.allowed_tp(), conversion=made)


def atb_conversion(config: TelechatConfig) -> ConversionPlan:
    """The shards of a model in float16."""
    targets = hugging_face_targets(config)
    size = HUGGING_FACE_SHARD_BYTES
    return make_plan(config, targets, DTYPE, container=TORCH_SAFETENSORS, shard_bytes=size, folder="")
