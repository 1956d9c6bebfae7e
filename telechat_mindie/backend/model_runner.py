"""The model runner that MindIE's ms backend constructs and calls; also the engine of this package on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np

from telechat_mindie.backend.caches import HostCache, block_count, external_caches
from telechat_mindie.backend.inputs import Limits, ragged_batch
from telechat_mindie.backend.model_config import ModelConfig
from telechat_mindie.backend.plugins import parse_plugin_params
from telechat_mindie.errors import InputError, ModelDirError
from telechat_mindie.model.decoder import TelechatForCausalLM
from telechat_mindie.model.kernels.cpu import CpuKernels
from telechat_mindie.model.kv_cache import KVCache
from telechat_mindie.model.loader import RankWeights
from telechat_mindie.model.parallel import TensorParallel
from telechat_mindie.model.rope import RotaryTable
from telechat_mindie.model_dir import ModelDir
from telechat_mindie.tokenizer import TelechatTokenizer


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
        self._limits = Limits(config.vocab_size, self.npu_num_blocks, block_size, directory.serving.max_seq_len)

        ms.set_context(mode=ms.GRAPH_MODE)
        ms.set_device("CPU")
        self._cache_dtype = CpuKernels.cache_dtype(directory.serving.dtype)
        width = config.kv_size // world_size
        self._cache = KVCache(config.num_layers, self.npu_num_blocks, block_size, width, self._cache_dtype)
        self._host_cache = HostCache(self._cache, self.cpu_num_blocks)
        rotary = RotaryTable(
            config.head_dim,
            config.training_seqlen,
            config.base_seqlen,
            directory.serving.extend_method,
            directory.serving.rotary_dtype,
        )
        self._kernels = CpuKernels(config, world_size, self._cache, rotary)
        with RankWeights(
            directory.rank_folder(rank_id), config, world_size, CpuKernels.weight_dtype(directory.serving.dtype)
        ) as weights:
            parallel = TensorParallel(rank_id, world_size)
            self.model = TelechatForCausalLM(config, weights, self._kernels, parallel, self._cache)
            weights.check_all_taken()
        self.model.set_train(False)

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
            float32 [B, vocabulary] with prefill, else [T, vocabulary].

        Raises:
            InputError: arguments that do not fit together, the directory or the cache. Nothing was computed.
        """
        if adapter_ids is not None and any(adapter is not None for adapter in adapter_ids):
            raise InputError("LoRA adapters are not supported", where="adapter_ids", found=list(adapter_ids))
        limits, caches = self._limits, None
        if key_cache is not None or value_cache is not None:
            expected = (self.num_layers, limits.block_size, self.num_kv_heads * self.head_size)
            caches, blocks = external_caches(key_cache, value_cache, expected, self._cache_dtype)
            # MindIE keeps the last block for dummy batches, so its last slot holds nothing.
            limits = replace(limits, num_blocks=blocks, scratch_row=blocks * limits.block_size - 1)
        elif not self.npu_num_blocks:
            raise InputError(
                "is missing", where="key_cache", advice="With npu_mem_size -1 each call brings its own."
            )
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
        logits = np.empty((len(batch.logits_rows), self.model_config.vocab_size), np.float32)
        for call in self._kernels.calls(batch):
            out = self.model(call.token_ids, call.logits_rows, call.inputs, caches).asnumpy()
            logits[call.rows] = out[: len(call.rows)]
        return ms.Tensor(logits)

    def swap(self, block_tables: np.ndarray, swap_type: bool) -> None:
        """Copy cache blocks between device and host memory.

        Args:
            block_tables: [n, 2] pairs (from, to).
            swap_type: True: from the device to the host, False: back.

        Raises:
            InputError: not such pairs, or a block out of range.
        """
        self._host_cache.swap(block_tables, bool(swap_type))

    def generate_position_ids(self, input_ids: np.ndarray) -> np.ndarray:
        """Positions [T] int32 of one prompt's tokens [T]: TeleChat2 counts from 0."""
        return np.arange(len(input_ids), dtype=np.int32)


class MindIEModelRunner(ModelRunner):
    """The same, constructed positionally with the yaml's path second, as mindformers' `model.arch.type` hook does."""

    def __init__(
        self,
        model_path: str,
        config_path: str,
        npu_mem_size: int,
        cpu_mem_size: int,
        block_size: int,
        rank_id: int = 0,
        world_size: int = 1,
        npu_device_ids: Sequence[int] | None = None,
        plugin_params: str | None = None,
    ) -> None:
        if Path(config_path).parent.resolve() != Path(model_path).resolve():
            raise ModelDirError("yaml lies outside the model directory", where=config_path, expected=f"in {model_path}")
        super().__init__(
            model_path, npu_mem_size, cpu_mem_size, block_size, rank_id, world_size, npu_device_ids, plugin_params
        )
