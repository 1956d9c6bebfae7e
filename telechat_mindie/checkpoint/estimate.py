"""What a conversion and the model it makes will need, before anything is read or written."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from telechat_mindie.checkpoint.direct_io import STAGING_BYTES
from telechat_mindie.checkpoint.formats.bounds import quoted
from telechat_mindie.checkpoint.hugging_face import index_alone, read_index
from telechat_mindie.checkpoint.mapping import HEAD, check_weights, published_names, weights
from telechat_mindie.checkpoint.pipeline import DEPTH
from telechat_mindie.checkpoint.plan import ConversionPlan
from telechat_mindie.checkpoint.reader import BLOCK_BYTES, TURN_BYTES
from telechat_mindie.checkpoint.source import NoWeightsError, open_checkpoint
from telechat_mindie.checkpoint.training_run import RunChoice
from telechat_mindie.config import TelechatConfig
from telechat_mindie.dtypes import DTYPES
from telechat_mindie.errors import CheckpointError, InputError
from telechat_mindie.staging import reporting_os_errors

INTERPRETER_BYTES = 80 << 20
"""Python with numpy and the tokenizer, measured."""

PROBE_BYTES = 256 << 20


@dataclass(frozen=True)
class Source:
    """What is known of a checkpoint without its weights: config, dtype, bytes and number of tensors.

    `assumed` says what of it nothing on disk tells, `note` what a person should know of how it was read.
    """

    config: TelechatConfig
    dtype: str
    nbytes: int
    tensors: int
    assumed: str = ""
    note: str = ""


def source_facts(checkpoint: Path, config_dir: Path | None = None, choice: RunChoice | None = None) -> Source:
    """From the headers of a checkpoint, or before its download from an index and config.json, or config.json alone.

    Args:
        checkpoint: a folder, a weight file, or a config.json, which then is all that is looked at.
        config_dir: where config.json is, if not beside the weights.
        choice: which step of a training run, and by which strategy.

    Raises:
        ConfigError, CheckpointError: as `open_checkpoint`; or nothing tells the dtype of what an index lists.
        InputError: `config_dir` or `choice` beside a config.json.
    """
    if checkpoint.suffix == ".json":
        if choice or config_dir:
            raise InputError(
                "is for a checkpoint, and --checkpoint names a config.json alone",
                where="--config, --strategy, --step, --source, --packed-by-rank",
            )
        return from_config(TelechatConfig.from_file(checkpoint))
    if not choice and (index := index_alone(checkpoint)) is not None:
        return _from_index(index, TelechatConfig.from_directory(config_dir or checkpoint))
    try:
        found = open_checkpoint(checkpoint, config_dir, choice=choice)
    except NoWeightsError:
        return from_config(TelechatConfig.from_directory(config_dir or checkpoint))
    return Source(found.config, found.dtype, found.source_bytes, len(found.weights), note=found.note)


def from_config(config: TelechatConfig) -> Source:
    """What config.json tells: everything but, where it names no dtype, whether the weights are float32."""
    dtype = config.torch_dtype or "float32"
    tied = config.tie_word_embeddings
    assumed = "" if config.torch_dtype else "float32 weights, as config.json names no dtype"
    return Source(config, dtype, config.weight_bytes(dtype), len(weights(config)) - tied, assumed)


def _from_index(index: Path, config: TelechatConfig) -> Source:
    weight_map, total = read_index(index)
    names = published_names(weight_map, index)
    check_weights(dict.fromkeys(names), config, index)
    elements = config.parameter_count
    if config.tie_word_embeddings and HEAD in names:  # stored all the same
        elements += config.vocab_size * config.hidden_size
    wide, narrow = 4 * elements, 2 * elements
    if total == wide:
        return Source(config, "float32", wide, len(names))
    if total == narrow:  # which of the two 16-bit dtypes it is, only config.json says
        return Source(config, config.torch_dtype or "float16", narrow, len(names))
    if config.torch_dtype is None:
        raise CheckpointError(
            "total_size does not fit the model that config.json describes",
            where=index,
            expected=f"{wide} or {narrow}",
            found=quoted(total),
        )
    dtype = config.torch_dtype
    assumed = f"{dtype} weights, as config.json says, for the index's total_size fits no dtype"
    return Source(config, dtype, elements * DTYPES[dtype].itemsize, len(names), assumed)


def peak_memory(plan: ConversionPlan) -> int:
    """Bytes of anonymous memory that a conversion holds, whatever the model's size."""
    turned = [target for shard in plan.shards for target in shard.targets if target.transposed]
    largest = max((target.shape[-1] * target.shape[-2] for target in turned), default=0)
    staging = 2 * plan.tp * STAGING_BYTES  # a shard is synced while the next is written
    return INTERPRETER_BYTES + (2 * DEPTH + 3) * BLOCK_BYTES + staging + min(TURN_BYTES, 4 * largest)


def probe_disk(folder: Path, nbytes: int = PROBE_BYTES) -> float:
    """Bytes a second that a file in `folder` is written and synced at; the file is removed again.

    Raises:
        OutputError: the folder cannot be written.
    """
    path = folder / f".telechat-mindie-probe.{os.getpid()}"
    chunk = os.urandom(BLOCK_BYTES)
    with reporting_os_errors(path):
        try:
            with open(path, "wb", buffering=0) as file:
                begin = time.monotonic()
                for _ in range(nbytes // BLOCK_BYTES):
                    file.write(chunk)
                os.fsync(file.fileno())
                return nbytes / (time.monotonic() - begin)
        finally:
            path.unlink(missing_ok=True)
