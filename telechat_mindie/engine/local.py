"""A model directory opened for the embedded engine in this process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from telechat_mindie.engine.config import EngineConfig
from telechat_mindie.engine.engine import Engine
from telechat_mindie.kv_budget import RESERVED_BLOCKS, CacheShape
from telechat_mindie.model_dir.layout import ModelDir
from telechat_mindie.text.tokenizer import TelechatTokenizer


@dataclass(frozen=True)
class LocalEngine:
    """What `open_local` gives."""

    directory: ModelDir
    tokenizer: TelechatTokenizer
    engine: Engine


def open_local(model_path: Path) -> LocalEngine:
    """An engine for one request at a time, with a cache for the directory's longest sequence.

    Raises:
        ModelDirError, ConfigError, TokenizerError: the directory is incomplete or contradicts itself.
        RankError: a rank of a tensor parallel directory failed.
    """
    from telechat_mindie.backend.multi_rank import open_runner

    directory = ModelDir.open(model_path)
    length, block_size = directory.serving.max_seq_len, directory.serving.block_size
    shape = CacheShape(directory.config.kv_bytes_per_token(directory.serving.dtype, directory.tp), block_size)
    runner = open_runner(model_path, shape.blocks_for(length) + RESERVED_BLOCKS, block_size)
    config = EngineConfig(
        max_seq_len=length,
        max_input_token_len=length,
        max_iter_times=length,
        max_batch_size=1,
        max_prefill_batch_size=1,
        max_prefill_tokens=length,
        block_size=block_size,
    )
    return LocalEngine(directory, runner.tokenizer, Engine(runner, runner.tokenizer, config))
