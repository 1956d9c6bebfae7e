"""`build`: a checkpoint becomes a complete model directory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import telechat_mindie
from telechat_mindie.checkpoint.generation import Generation, read_generation
from telechat_mindie.checkpoint.mapping import mindformers_targets
from telechat_mindie.checkpoint.pipeline import Progress
from telechat_mindie.checkpoint.plan import ConversionPlan, make_plan
from telechat_mindie.checkpoint.source import Checkpoint, open_checkpoint
from telechat_mindie.checkpoint.stream import ConvertOptions, Written, choose_dtype, convert_staged
from telechat_mindie.checkpoint.training_run import RunChoice
from telechat_mindie.checkpoint.writer import FileRecord, Journal
from telechat_mindie.computation import check_computation, plain_context
from telechat_mindie.config import TelechatConfig
from telechat_mindie.errors import InputError, TokenizerError
from telechat_mindie.kv_budget import BLOCK_SIZES
from telechat_mindie.model_dir.daemon_files import TOP_K_LIMIT
from telechat_mindie.model_dir.layout import MANIFEST, ModelDir
from telechat_mindie.model_dir.modes import place_note
from telechat_mindie.model_dir.modules import OWN_MODULES
from telechat_mindie.model_dir.serving import BEYOND_PLAIN, MAX_BLOCK_SIZE, MAX_SEQ_LEN
from telechat_mindie.reading import read_json, read_text, unique_keys
from telechat_mindie.staging import StagedDirectory, dump_json, write_file
from telechat_mindie.templates import render
from telechat_mindie.text.settings import BARE_PROMPT_MODES, TEMPLATE_BYTES, template_names
from telechat_mindie.variants import label_for

_HUGGING_FACE_ONLY = ("auto_map", "architectures", "torch_dtype", "dtype", "_name_or_path")


@dataclass(frozen=True)
class BuildOptions(ConvertOptions):
    """What a person may choose. Lengths are tokens; `max_seq_len` None: as the checkpoint's config.json says.

    `config_dir` is where config.json, the tokenizer and generation_config.json are, if not beside the weights; `choice`
    says which step of a training run is taken.
    """

    tp: int = 1
    dtype: str = "auto"
    qkv_concat: bool = True
    max_seq_len: int | None = None
    block_size: int = 128
    bare_prompt: str = "chat"
    force: bool = False
    adapters: tuple[str, ...] = ()
    config_dir: Path | None = None
    choice: RunChoice = field(default_factory=RunChoice)


def build(
    model_path: Path,
    checkpoint: Path,
    options: BuildOptions | None = None,
    on_start: Callable[[ConversionPlan], Progress] | None = None,
    on_note: Callable[[str], object] = lambda _: None,
) -> ConversionPlan:
    """Make `model_path` from the checkpoint directory, complete or not at all.

    Args:
        on_start: called with the plan before the first byte is written; gives the progress callback.
        on_note: called with what a person should know of how the checkpoint was read.

    Raises:
        ConfigError, CheckpointError, TokenizerError: the checkpoint is refused.
        OutputError: the target exists, cannot be written, or the disk is too small.
        InputError: an option is out of range.
    """
    options = options or BuildOptions()
    if note := place_note(model_path):
        on_note(note)
    source = open_checkpoint(checkpoint, options.config_dir, options.adapters, options.choice)
    beside = source.config_dir
    if source.note:
        on_note(source.note)
    check_computation(source.config, beside / "config.json")
    dtype = choose_dtype(options.dtype, source.dtype, source.config)
    max_seq_len = check_lengths(options, source.config)
    if max_seq_len > source.config.seq_length:
        on_note(
            f"--max-seq-len {max_seq_len} is beyond the {source.config.seq_length} tokens that config.json gives the "
            "model: it was not trained for that, and what it says there may make no sense."
        )
    tokenizer_files, tokenizer_settings = read_tokenizer(beside, source.config, options.bare_prompt)
    generation = read_generation(beside, source.config)
    targets = mindformers_targets(source.config, qkv_concat=options.qkv_concat, transposed_experts=source.config.is_moe)
    config = replace(source.config, eos_token_id=generation.eos_token_id)
    plan = make_plan(config, targets, dtype, options.tp)
    texts = tokenizer_files | _render(plan, options, generation, max_seq_len, tokenizer_settings)
    with StagedDirectory(
        model_path, replace=options.force, marker=MANIFEST, resume=options.resume, scratch=Journal.NAME
    ) as staged:
        progress = on_start(plan) if on_start else None
        written = convert_staged(plan, source, staged, options, progress, options.qkv_concat)
        records = written.records
        for name, data in texts.items():
            (staged.path / name).parent.mkdir(exist_ok=True)  # commit sets its mode
            write_file(staged.path / name, data)
            records.append(FileRecord(name, len(data), hashlib.sha256(data).hexdigest()))
        write_file(staged.path / MANIFEST, dump_json(_manifest(plan, source, options, written)))
        ModelDir.open(staged.path)  # what the runner would refuse must not appear under its name
        staged.commit()
    return plan


def check_lengths(options: BuildOptions, config: TelechatConfig) -> int:
    """The longest sequence in tokens. Raises InputError where it, or another choice, is not to be built."""
    max_seq_len = config.seq_length if options.max_seq_len is None else options.max_seq_len
    for flag, value, limit in (
        ("--max-seq-len", max_seq_len, MAX_SEQ_LEN),
        ("--block-size", options.block_size, MAX_BLOCK_SIZE),
    ):
        if not 1 <= value <= limit:
            raise InputError("is out of range", where=flag, expected=f"1 to {limit}", found=value)
    if options.block_size not in BLOCK_SIZES:
        expected = " or ".join(map(str, BLOCK_SIZES))
        raise InputError(
            "is none that an NPU's PagedAttention takes",
            where="--block-size",
            expected=expected,
            found=options.block_size,
            advice="128 is best.",
        )
    longest = plain_context(config)
    if longest is not None and max_seq_len > longest:
        raise InputError(BEYOND_PLAIN, where="--max-seq-len", expected=f"at most {longest}", found=max_seq_len)
    if options.bare_prompt not in BARE_PROMPT_MODES:
        expected = " or ".join(BARE_PROMPT_MODES)
        raise InputError("unknown choice", where="--bare-prompt", expected=expected, found=options.bare_prompt)
    return max_seq_len


def read_tokenizer(
    checkpoint: Path, config: TelechatConfig, bare_prompt: str
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """tokenizer.model and template files as they are, and tokenizer_config.json with our switches; also its content.
    Refused where they do not work."""
    from telechat_mindie.text.trial import try_tokenizer

    path, config_path = checkpoint / "tokenizer.model", checkpoint / "tokenizer_config.json"
    if not path.exists():
        raise TokenizerError(
            "file is missing",
            where=path,
            advice="Put it beside the weights, or name the folder that has it and config.json: --config DIR",
        )
    given = read_json(config_path) if config_path.exists() else {"tokenizer_class": "TelechatTokenizer"}
    given = {key: value for key, value in given.items() if value is not None and key != "auto_map"}
    settings = {"control_tokens": "ids", "turn_tokens": "hide"} | given | {"bare_prompt": bare_prompt}
    try_tokenizer(checkpoint, config.vocab_size, settings)
    files = {"tokenizer.model": path.read_bytes(), "tokenizer_config.json": dump_json(settings)}
    for name in template_names(checkpoint):
        files[name] = read_text(checkpoint / name, TEMPLATE_BYTES).encode()
    return files, settings


def _render(
    plan: ConversionPlan,
    options: BuildOptions,
    generation: Generation,
    max_seq_len: int,
    tokenizer: Mapping[str, Any],
) -> dict[str, bytes]:
    config = plan.config
    label = label_for(config)
    shared = {
        "config": config,
        "dtype": plan.dtype,
        "tp": plan.tp,
        "label": label,
        "model_type": config.raw.get("model_type", "telechat"),
        "kept": _kept(config),
        "generation": generation.values,
        "tokenizer": tokenizer,
        "top_k_limit": min(TOP_K_LIMIT, config.vocab_size),
        "qkv_concat": options.qkv_concat,
        "max_seq_len": max_seq_len,
        "max_new_tokens": min(generation.max_new_tokens, max_seq_len),
        "block_size": options.block_size,
        "num_blocks": -(-max_seq_len // options.block_size),
    }
    outputs = {
        "config.json": "config.json.j2",
        "generation_config.json": "generation_config.json.j2",
        f"predict_telechat2_{label}.yaml": "predict.yaml.j2",
        **{f"{name}.py": f"{name}.py.j2" for name in OWN_MODULES},
    }
    texts = {name: render(template, **shared) for name, template in outputs.items()}
    for name in ("config.json", "generation_config.json"):
        texts[name] = dump_json(json.loads(texts[name], object_pairs_hook=unique_keys)).decode()
    return {name: text.encode() for name, text in texts.items()}


def _kept(config: TelechatConfig) -> dict[str, Any]:
    """The checkpoint's own keys, without those that are rendered and those that only Hugging Face's loader uses."""
    rendered = {
        "model_type",
        "vocab_size",
        "num_key_value_heads",
        "training_seqlen",
        "base_seqlen",
        "eos_token_id",
    }
    return {key: value for key, value in config.raw.items() if key not in rendered.union(_HUGGING_FACE_ONLY)}


def _manifest(plan: ConversionPlan, source: Checkpoint, options: BuildOptions, written: Written) -> dict[str, Any]:
    described = {"kind": source.kind, "dtype": source.dtype, "bytes": source.source_bytes}
    if source.adapters:
        described["adapters"] = [adapter.describe() for adapter in source.adapters]
    return {
        "format": 1,
        "tool": f"telechat-mindie {telechat_mindie.__version__}",
        "source": described,
        "dtype": plan.dtype,
        "tp": plan.tp,
        "qkv_concat": options.qkv_concat,
        "parameters": plan.config.parameter_count,
        "tensors_per_rank": sum(len(shard.targets) for shard in plan.shards),
        "odd_values": written.odd_values,
        "files": {record.path: {"nbytes": record.nbytes, "sha256": record.sha256} for record in written.records},
    }
