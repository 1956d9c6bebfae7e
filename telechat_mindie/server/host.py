"""A model directory opened for a server: the engine, and the one thread that computes."""

from __future__ import annotations

import dataclasses
import threading
from dataclasses import dataclass, field
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
    """The engine and its thread."""

    directory: ModelDir
    tokenizer: TelechatTokenizer
    engine: Engine
    _thread: threading.Thread | None = field(default=None, init=False)

    @classmethod
    def open(cls, model_path: Path, settings: ServerSettings) -> EngineHost:
        """Load the model and make its cache.

        Raises:
            ModelDirError, ConfigError, TokenizerError: the directory is incomplete or contradicts itself.
            InputError: the settings do not fit the directory.
        """
        from telechat_mindie.backend.multi_rank import open_runner

        directory = ModelDir.open(model_path)
        config = settings.engine
        longest = min(config.max_seq_len, directory.serving.max_seq_len)
        # Prompts are refused by what the directory can hold, not by what the settings hope for.
        config = dataclasses.replace(
            config,
            max_seq_len=longest,
            max_prefill_batch_size=min(config.max_prefill_batch_size, config.max_batch_size),
        )
        blocks = num_blocks(directory, settings)
        runner = open_runner(model_path, blocks, config.block_size, settings.host_cache_gb)
        return cls(directory, runner.tokenizer, Engine(runner, runner.tokenizer, config))

    def start(self) -> None:
        """Start the thread, and compute one token, so that no client waits for what is made on first use."""
        self._thread = threading.Thread(target=self.engine.run_forever, name="telechat-engine", daemon=True)
        self._thread.start()
        for _ in self.engine.add([self.tokenizer.bos_token_id], GenerationParams(max_new_tokens=2, ignore_eos=True)):
            pass

    @property
    def is_alive(self) -> bool:
        """Whether the engine can answer."""
        return self._thread is not None and self._thread.is_alive()

    def stop(self) -> None:
        """End what is unfinished, and the thread."""
        self.engine.stop(drain=False)
        if self._thread is not None:
            self._thread.join()


def num_blocks(directory: ModelDir, settings: ServerSettings) -> int:
    """Blocks of the cache: what the memory holds, but no more than all sequences of a full batch can fill."""
    config = settings.engine
    token_bytes = directory.config.kv_bytes_per_token(directory.serving.dtype, directory.tp)
    shape = CacheShape(token_bytes, config.block_size)
    longest = shape.blocks_for(min(config.max_seq_len, directory.serving.max_seq_len))
    held = shape.blocks_in(int(settings.cache_gb * GB))
    return max(1 + RESERVED_BLOCKS, min(held, longest * config.max_batch_size + RESERVED_BLOCKS))
