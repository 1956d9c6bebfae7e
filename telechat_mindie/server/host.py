"""A model directory opened for a server."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from telechat_mindie.engine.engine import Engine
from telechat_mindie.engine.params import GenerationParams
from telechat_mindie.kv_budget import RESERVED_BLOCKS, CacheShape
from telechat_mindie.model_dir.layout import ModelDir
from telechat_mindie.server.settings import ServerSettings
from telechat_mindie.text.tokenizer import TelechatTokenizer
from telechat_mindie.units import GB


@dataclass
class EngineHost:
    """The engine, and what it was made of."""

    directory: ModelDir
    tokenizer: TelechatTokenizer
    engine: Engine

    @classmethod
    def open(cls, model_path: Path, settings: ServerSettings) -> EngineHost:
        """Load the model and make its cache.

        Raises:
            ModelDirError, ConfigError, TokenizerError: the directory is incomplete or contradicts itself.
            InputError: the settings do not fit the directory.
        """
        from telechat_mindie.backend.multi_rank import open_runner

        directory = ModelDir.open(model_path)
        config = dataclasses.replace(
            settings.engine,
            max_seq_len=longest_sequence(directory, settings),
            max_prefill_batch_size=min(settings.engine.max_prefill_batch_size, settings.engine.max_batch_size),
        )
        runner = open_runner(model_path, num_blocks(directory, settings), config.block_size, settings.host_cache_gb)
        return cls(directory, runner.tokenizer, Engine(runner, runner.tokenizer, config))

    def start(self) -> None:
        """Start the engine's thread, and compute one token, so that no client waits for what is made on first use."""
        self.engine.start()
        for _ in self.engine.add([self.tokenizer.bos_token_id], GenerationParams(max_new_tokens=2, ignore_eos=True)):
            pass

    def stop(self) -> None:
        """End what is unfinished, and the thread."""
        self.engine.stop(drain=False)


def longest_sequence(directory: ModelDir, settings: ServerSettings) -> int:
    """Tokens. Prompts are refused by what the directory can hold, not by what the settings hope for."""
    return min(settings.engine.max_seq_len, directory.serving.max_seq_len)


def num_blocks(directory: ModelDir, settings: ServerSettings) -> int:
    """Blocks of the cache: what the memory holds, but no more than all sequences of a full batch can fill."""
    config = settings.engine
    token_bytes = directory.config.kv_bytes_per_token(directory.serving.dtype, directory.tp)
    shape = CacheShape(token_bytes, config.block_size)
    longest = shape.blocks_for(longest_sequence(directory, settings))
    held = shape.blocks_in(int(settings.cache_gb * GB))
    return max(1 + RESERVED_BLOCKS, min(held, longest * config.max_batch_size + RESERVED_BLOCKS))
