"""`build --backend atb`: a checkpoint, or what msmodelslim made of one, becomes what MindIE >= 3.0 loads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import telechat_mindie
from telechat_mindie.checkpoint.copying import copy_file
from telechat_mindie.checkpoint.elsewhere.layout import hugging_face_files
from telechat_mindie.checkpoint.msmodelslim import Quantised
from telechat_mindie.checkpoint.pipeline import Progress
from telechat_mindie.checkpoint.plan import ConversionPlan
from telechat_mindie.checkpoint.source import Checkpoint
from telechat_mindie.checkpoint.stream import check_space, convert_staged
from telechat_mindie.checkpoint.writer import FileRecord, Journal
from telechat_mindie.computation import plain_length
from telechat_mindie.errors import CheckpointError
from telechat_mindie.mindie import ATB
from telechat_mindie.model_dir.atb.generation import complete
from telechat_mindie.model_dir.atb.layout import CONFIG, GENERATION, AtbDir
from telechat_mindie.model_dir.atb.plan import AtbOptions, AtbPlan, open_source, plan_atb
from telechat_mindie.model_dir.atb.rules import DTYPE, beyond_plain
from telechat_mindie.model_dir.manifest import MANIFEST
from telechat_mindie.model_dir.modes import place_note
from telechat_mindie.staging import StagedDirectory, dump_json, write_file

INDEX = "model.safetensors.index.json"

OVERFLOW_ADVICE = (
    "atb_llm computes in float16 alone, which cannot hold them: serve the model in bfloat16 with backendType ms "
    "(`build --dtype bfloat16`), or accept infinities with --allow-overflow."
)


def build_atb(
    model_path: Path,
    checkpoint: Path,
    options: AtbOptions | None = None,
    on_start: Callable[[AtbPlan], Progress] | None = None,
    on_note: Callable[[str], object] = lambda _: None,
) -> AtbPlan:
    """Make `model_path` from the checkpoint directory, complete or not at all. A quantised one is copied as it is.

    Args:
        on_start: called with the plan before the first byte is written; gives the progress callback.
        on_note: called with what a person should know.

    Raises:
        ConfigError, CheckpointError, TokenizerError: the checkpoint is refused, or atb_llm would not compute it right.
        OutputError: the target exists, cannot be written, or the disk is too small.
        InputError: an option is out of range.
    """
    options = options or AtbOptions()
    if note := place_note(model_path):
        on_note(note)
    source = open_source(checkpoint, options)
    config, folders = source.config, (source.path,) if isinstance(source, Quantised) else source.folders
    if isinstance(source, Checkpoint) and source.note:
        on_note(source.note)
    if reason := beyond_plain(config.seq_length, plain_length(config)):
        on_note(f"seq_length {reason}. service-config takes {plain_length(config)} where nobody says otherwise.")
    plan = plan_atb(source, options.tp)
    texts = _texts(source, folders)
    with StagedDirectory(
        model_path, replace=options.force, marker=MANIFEST, resume=options.resume, scratch=Journal.NAME
    ) as staged:
        progress = on_start(plan) if on_start else None
        odd: Mapping[str, Any] = {}
        records: list[FileRecord] = []
        if isinstance(source, Quantised):
            records = _copied(source, staged, options.resume, progress or (lambda _: None))
        elif plan.conversion is not None:
            told = replace(options, overflow_advice=OVERFLOW_ADVICE)
            written = convert_staged(plan.conversion, source, staged, told, progress)
            records, odd = list(written.records), written.odd_values
            texts[INDEX] = dump_json(_index(plan.conversion))
        for name, data in texts.items():
            (staged.path / name).parent.mkdir(exist_ok=True)  # commit sets its mode
            write_file(staged.path / name, data)
            records.append(FileRecord(name, len(data), hashlib.sha256(data).hexdigest()))
        write_file(staged.path / MANIFEST, dump_json(_manifest(plan, source, records, odd)))
        AtbDir.open(staged.path)  # what MindIE would refuse must not appear under its name
        staged.commit()
    return plan


def _texts(source: Checkpoint | Quantised, folders: tuple[Path, ...]) -> dict[str, bytes]:
    """Everything beside the weights."""
    config = source.config
    files = hugging_face_files(folders, config, DTYPE)
    if "tokenizer.json" not in files:
        raise CheckpointError("holds no tokenizer.model", where=folders[-1], advice="Copy the tokenizer's files there.")
    files[GENERATION] = dump_json(complete(json.loads(files[GENERATION]), config))
    if isinstance(source, Quantised):
        files[CONFIG] = dump_json(json.loads(files[CONFIG]) | {"quantize": source.kind.lower()})
    return files


def _index(plan: ConversionPlan) -> dict[str, Any]:
    return {
        "metadata": {"total_size": sum(frame.nbytes for shard in plan.shards for frame in shard.frames)},
        "weight_map": {target.name: shard.file for shard in plan.shards for target in shard.targets},
    }


def _copied(source: Quantised, staged: StagedDirectory, resume: bool, progress: Progress) -> list[FileRecord]:
    """The weights and their descriptions, byte by byte; what a killed run had copied is kept to be resumed."""
    facts = [(name, stat.st_size, stat.st_mtime_ns) for name in source.files for stat in [(source.path / name).stat()]]
    decisive = [telechat_mindie.__version__, str(source.path), facts]
    journal = Journal(staged.path, hashlib.sha256(json.dumps(decisive).encode()).hexdigest(), resume=resume)
    try:
        staged.resumable = bool(journal.records)
        journal.remove_strays()
        check_space(staged.path, sum(size for name, size, _ in facts if name not in journal.records))
        for name, size, _ in facts:
            if name in journal.records:
                progress(size)
            else:
                journal.add([copy_file(source.path, staged.path, name, progress)], {})
    finally:
        staged.resumable = bool(journal.records)
        journal.close()
    return [journal.records[name] for name in source.files]


def _manifest(
    plan: AtbPlan, source: Checkpoint | Quantised, records: Sequence[FileRecord], odd: Mapping[str, Any]
) -> dict[str, Any]:
    if isinstance(source, Quantised):
        described: dict[str, Any] = {"kind": f"msmodelslim {source.kind}", "dtype": source.kind, "bytes": source.nbytes}
    else:
        described = {"kind": source.kind, "dtype": source.dtype, "bytes": source.source_bytes}
        if source.adapters:
            described["adapters"] = [adapter.describe() for adapter in source.adapters]
    return {
        "format": 1,
        "backend": ATB,
        "tool": f"telechat-mindie {telechat_mindie.__version__}",
        "source": described,
        "dtype": plan.kind,
        "tp": plan.tp,
        "parameters": plan.config.parameter_count,
        "odd_values": odd,
        "files": {record.path: {"nbytes": record.nbytes, "sha256": record.sha256} for record in records},
    }
