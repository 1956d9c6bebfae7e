"""The model runner that MindIE's ms backend constructs and calls; also the engine of this package on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np

from telechat_mindie.backend.device import Rank, open_device_model
from telechat_mindie.backend.inputs import BatchLimits, ragged_batch
from telechat_mindie.backend.model_config import ModelConfig
from telechat_mindie.backend.plugins import parse_plugin_params, plugin_names
from telechat_mindie.errors import InputError, ModelDirError
from telechat_mindie.kv_budget import block_count
from telechat_mindie.model_dir.layout import ModelDir
from telechat_mindie.text.tokenizer import TelechatTokenizer


class ModelRunner:
    """One rank of a built TeleChat2 model, driven by MindIE with numpy arrays.

    Args:
        model_path: directory that `telechat-mindie build` made.
        npu_mem_size: GB for the key/value cache; -1: every `forward` brings the caches.
        cpu_mem_size: GB for swapped-out blocks in host memory; 0: none.
        block_size: tokens of a cache block.
        rank_id: this process's rank.
        world_size: number of ranks; must be the directory's tensor parallel size.
        npu_device_ids: the one device of this process.
        plugin_params: JSON of MindIE's plugins, or None; see `parse_plugin_params`.
        num_blocks: blocks of the cache instead of what npu_mem_size gives; not passed by MindIE.

    Attributes that MindIE reads: `model_config`, `tokenizer`, `dtype`, `num_layers`, `num_kv_heads` (of this rank),
    `head_size`, `use_legacy` (False: inputs come flat).

    Raises:
        ModelDirError, ConfigError, TokenizerError: the directory is incomplete or contradicts itself.
        InputError: an argument does not fit the directory.
    """

    use_legacy = False

    def __init__(
        self,
        model_path: str,
        npu_mem_size: int,
        cpu_mem_size: int,
        block_size: int,
        rank_id: int = 0,
        world_size: int = 1,
        npu_device_ids: Sequence[int] | None = None,
        plugin_params: str | None = None,
        *,
        num_blocks: int | None = None,
    ) -> None:
        directory = ModelDir.open(Path(model_path))
        config = directory.config
        if world_size != directory.tp:
            raise InputError(
                "does not fit the directory's weights",
                where="world_size",
                expected=directory.tp,
                found=world_size,
                advice=f"Build the directory with --tp {world_size}, or start {directory.tp} ranks.",
            )
        if not 0 <= rank_id < world_size:
            raise InputError("is out of range", where="rank_id", expected=f"0 to {world_size - 1}", found=rank_id)
        if block_size < 1:
            raise InputError("must be positive", where="block_size", found=block_size)
        self.model_config = ModelConfig(directory)
        self.tokenizer = TelechatTokenizer.from_pretrained(model_path)
        self.dtype = getattr(ms, directory.serving.dtype)
        self.num_layers = config.num_layers
        self.num_kv_heads = config.num_kv_heads // world_size
        self.head_size = config.head_dim
        self.plugin_params = parse_plugin_params(plugin_params)
        token_bytes = config.kv_bytes_per_token(directory.serving.dtype, world_size)
        self.npu_num_blocks = num_blocks or 0
        if num_blocks is None and npu_mem_size != -1:
            self.npu_num_blocks = block_count(npu_mem_size, token_bytes, block_size, "npu_mem_size")
        self.cpu_num_blocks = block_count(cpu_mem_size, token_bytes, block_size, "cpu_mem_size") if cpu_mem_size else 0
        self._limits = BatchLimits(config.vocab_size, self.npu_num_blocks, block_size, directory.serving.max_seq_len)

        device_id = npu_device_ids[0] if npu_device_ids else 0
        self._device = open_device_model(
            Rank(
                directory,
                rank_id,
                world_size,
                device_id,
                self.npu_num_blocks,
                self.cpu_num_blocks,
                block_size,
                plugin_names(self.plugin_params),
            )
        )
        self.model = self._device.decoder

    def forward(
        self,
        input_ids: np.ndarray,
        valid_length_each_example: np.ndarray,
        block_tables: np.ndarray,
        slot_mapping: np.ndarray,
        prefill: bool = True,
        position_ids: np.ndarray | None = None,
        adapter_ids: Sequence[str | None] | None = None,
        prefill_head_indices: np.ndarray | None = None,
        key_cache: Any = None,
        value_cache: Any = None,
        spec_mask: Any = None,
        q_seq_lens: Sequence[int] | np.ndarray | None = None,
    ) -> ms.Tensor:
        """Logits for the new tokens of B sequences; their keys and values go into the cache.

        Args:
            input_ids: [T] new tokens, one sequence after the other.
            valid_length_each_example: [B] tokens of each sequence with the new ones.
            block_tables: [B, W] cache blocks of each sequence, -1 where unused.
            slot_mapping: [T] where to write each token: block * block_size + offset, or -1 for nowhere.
            prefill: logits of each sequence's last token, rather than of every token.
            position_ids: [T] positions; by default each sequence's go on where its cache ends.
            adapter_ids: LoRA adapters; only None is supported.
            prefill_head_indices: [B] index in T of each sequence's last token.
            key_cache, value_cache: with npu_mem_size -1, a tensor [blocks, block_size, kv heads, head_size] a layer.
            spec_mask: [T, C] 0 where a draft token may look, else a large negative number.
            q_seq_lens: [B] new tokens of each sequence; by default all of it (prefill) or one.

        Returns:
            float32 [B, vocabulary] with prefill, else [T, vocabulary]; on an NPU in its memory, where MindIE samples.

        Raises:
            InputError: arguments that do not fit together, the directory or the cache. Nothing was computed.
        """
        if adapter_ids is not None and any(adapter is not None for adapter in adapter_ids):
            raise InputError("LoRA adapters are not supported", where="adapter_ids", found=list(adapter_ids))
        limits, caches = self._limits, None
        if key_cache is not None or value_cache is not None:
            caches, blocks = self._device.external(key_cache, value_cache)
            # MindIE keeps the last block for dummy batches, so its last slot holds nothing.
            limits = replace(limits, num_blocks=blocks, scratch_row=blocks * limits.block_size - 1)
        elif not self.npu_num_blocks:
            raise InputError("is missing", where="key_cache", advice="With npu_mem_size -1 each call brings its own.")
        batch = ragged_batch(
            limits,
            input_ids=input_ids,
            valid_length_each_example=valid_length_each_example,
            block_tables=block_tables,
            slot_mapping=slot_mapping,
            prefill=prefill,
            position_ids=position_ids,
            prefill_head_indices=prefill_head_indices,
            spec_mask=spec_mask,
            q_seq_lens=q_seq_lens,
        )
        return self._device.run(batch, caches)

    def swap(self, block_tables: np.ndarray, swap_type: bool) -> None:
        """Copy cache blocks between device and host memory.

        Args:
            block_tables: [n, 2] pairs (from, to).
            swap_type: True: from the device to the host, False: back.

        Raises:
            InputError: not such pairs, or a block out of range.
        """
        self._device.swap(block_tables, bool(swap_type))

    def generate_position_ids(self, input_ids: np.ndarray) -> np.ndarray:
        """Positions [T] int32 of one prompt's tokens [T]: TeleChat2 counts from 0."""
        return np.arange(len(input_ids), dtype=np.int32)


class MindIEModelRunner(ModelRunner):
    """The same, constructed positionally with the yaml's path second, as mindformers' `model.arch.type` hook does.

    What follows the two paths are ModelRunner's arguments after its `model_path`.
    """

    def __init__(self, model_path: str, config_path: str, *arguments: Any, **keywords: Any) -> None:
        if Path(config_path).parent.resolve() != Path(model_path).resolve():
            raise ModelDirError("yaml lies outside the model directory", where=config_path, expected=f"in {model_path}")
        super().__init__(model_path, *arguments, **keywords)
