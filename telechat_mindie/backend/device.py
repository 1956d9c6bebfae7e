"""One rank's model on the device of this process: the only place that knows Ascend from a CPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np

from telechat_mindie.backend.caches import HostCache, as_rows, external_caches
from telechat_mindie.backend.ranks import join_ranks, use_device
from telechat_mindie.errors import InputError
from telechat_mindie.model.batch import RaggedBatch
from telechat_mindie.model.decoder import TelechatForCausalLM
from telechat_mindie.model.kv_cache import KVCache
from telechat_mindie.model.loader import RankWeights
from telechat_mindie.model.parallel import TensorParallel
from telechat_mindie.model.rope import RotaryTable
from telechat_mindie.model_dir.layout import ModelDir

DEVICES = ("ascend", "cpu")


@dataclass(frozen=True)
class Rank:
    """Which part of a directory's model this process runs, and the cache that it gets."""

    directory: ModelDir
    rank: int
    world_size: int
    device_id: int
    num_blocks: int  # 0: every call brings its caches
    host_blocks: int
    block_size: int


class DeviceModel:
    """A decoder with its kernels and caches. `run` computes a batch's logits; subclasses build it for a device."""

    def __init__(self, rank: Rank) -> None:
        directory, config = rank.directory, rank.directory.config
        self.rank = rank
        self.rotary = RotaryTable(
            config.head_dim,
            config.training_seqlen,
            config.base_seqlen,
            directory.serving.extend_method,
            directory.serving.rotary_dtype,
            directory.serving.scaling_factor,
        )
        self.kernels: Any
        self.decoder: TelechatForCausalLM
        self.network: Callable[..., ms.Tensor]
        self.cache_dtype: str

    def load(self, kernels: Any, cache: Any, weight_dtype: str) -> TelechatForCausalLM:
        """The decoder over this rank's weights, every one of them used."""
        rank = self.rank
        parallel = TensorParallel(rank.rank, rank.world_size)
        folder = rank.directory.rank_folder(rank.rank)
        with RankWeights(folder, rank.directory.config, rank.world_size, weight_dtype) as weights:
            decoder = TelechatForCausalLM(rank.directory.config, weights, kernels, parallel, cache)
            weights.check_all_taken()
        decoder.set_train(False)
        return decoder

    def run(self, batch: RaggedBatch, caches: Any) -> np.ndarray:
        """Logits [R, vocabulary] float32; `caches` None for the model's own."""
        logits = np.empty((len(batch.logits_rows), self.rank.directory.config.vocab_size), np.float32)
        for call in self.kernels.calls(batch):
            out = self.network(call.token_ids, call.logits_rows, call.inputs, caches)
            logits[call.rows] = out.astype(ms.float32).asnumpy()[: len(call.rows)]
        return logits

    def external(self, key_cache: Sequence[ms.Tensor], value_cache: Sequence[ms.Tensor]) -> tuple[Any, int]:
        """MindIE's caches as the kernels take them, and their number of blocks. Raises InputError for a misfit."""
        raise InputError("caches from outside are not supported on this device", where="key_cache")

    def swap(self, pairs: np.ndarray, to_host: bool) -> None:
        """Copy block pairs[i, 0] to pairs[i, 1]. Raises InputError for anything but pairs of blocks."""


class CpuModel(DeviceModel):
    """MindSpore on the CPU: float32 activations, the cache a row a slot."""

    def __init__(self, rank: Rank) -> None:
        from telechat_mindie.model.kernels.selection import select_cpu_kernels

        super().__init__(rank)
        config, stored = rank.directory.config, rank.directory.serving.dtype
        kernels = select_cpu_kernels()
        self.cache_dtype = kernels.cache_dtype(stored)
        self._width = config.kv_size // rank.world_size
        cache = KVCache(config.num_layers, rank.num_blocks, rank.block_size, self._width, self.cache_dtype)
        self._host = HostCache(cache, rank.host_blocks)
        self.kernels = kernels(config, rank.world_size, cache, self.rotary)
        self.network = self.decoder = self.load(self.kernels, cache, kernels.weight_dtype(stored))
        # The ranks of several exchange sums between operators, which only a graph can.
        self._alone = self.kernels.single_rank_decoder(self.decoder) if rank.world_size == 1 else None

    def run(self, batch: RaggedBatch, caches: Any) -> np.ndarray:
        if self._alone is not None:
            logits: np.ndarray = self._alone.logits(batch, caches)
            return logits
        if caches is None:
            return super().run(batch, None)
        keys, values = caches
        with as_rows(keys, values, self._width) as rows:  # the CPU's scatter writes rows of a matrix
            return super().run(batch, rows)

    def external(self, key_cache: Sequence[ms.Tensor], value_cache: Sequence[ms.Tensor]) -> tuple[Any, int]:
        shape = (self.rank.directory.config.num_layers, self.rank.block_size, self._width)
        keys, values, blocks = external_caches(key_cache, value_cache, shape, self.cache_dtype)
        return (keys, values), blocks

    def swap(self, pairs: np.ndarray, to_host: bool) -> None:
        self._host.swap(pairs, to_host)


class AscendModel(DeviceModel):
    """Fused operators on one NPU, in the dtype of the weights; the cache [blocks, block_size, kv heads, head_dim]."""

    on_device = True

    def __init__(self, rank: Rank) -> None:
        from telechat_mindie.backend.caches import AscendHostCache
        from telechat_mindie.model.kernels.ascend import AscendKernels
        from telechat_mindie.model.kernels.ascend_graphs import AscendCache, AscendGraphs

        super().__init__(rank)
        config, serving = rank.directory.config, rank.directory.serving
        self.cache_dtype = AscendKernels.cache_dtype(serving.dtype)
        kv_heads = config.num_kv_heads // rank.world_size
        cache = AscendCache(
            config.num_layers,
            rank.num_blocks,
            rank.block_size,
            kv_heads,
            config.head_dim,
            self.cache_dtype,
            on_device=self.on_device,
        )
        self._width = kv_heads * config.head_dim
        self._host = AscendHostCache(cache, rank.host_blocks)
        self.kernels = self.prepare(AscendKernels(config, rank.world_size, cache, self.rotary, serving.rotary_dtype))
        self.decoder = self.load(self.kernels, cache, AscendKernels.weight_dtype(serving.dtype))
        external_layers = 0 if rank.num_blocks else config.num_layers
        self.network = AscendGraphs(self.decoder, self.kernels.call_shape(external_layers))

    @staticmethod
    def prepare(kernels: Any) -> Any:
        """The kernels as they are used; a place for tests to put emulated operators."""
        return kernels

    def external(self, key_cache: Sequence[ms.Tensor], value_cache: Sequence[ms.Tensor]) -> tuple[Any, int]:
        shape = (self.rank.directory.config.num_layers, self.rank.block_size, self._width)
        keys, values, blocks = external_caches(key_cache, value_cache, shape, self.cache_dtype)
        return (keys, values), blocks

    def swap(self, pairs: np.ndarray, to_host: bool) -> None:
        self._host.swap(pairs, to_host)


def device_name() -> str:
    """ "ascend" where an NPU's driver is, else "cpu"; TELECHAT_DEVICE overrides.

    Raises:
        InputError: TELECHAT_DEVICE is neither.
    """
    chosen = os.environ.get("TELECHAT_DEVICE")
    if chosen is None:
        return "ascend" if Path("/dev/davinci_manager").exists() else "cpu"
    if chosen not in DEVICES:
        raise InputError("is unknown", where="TELECHAT_DEVICE", expected=" or ".join(DEVICES), found=chosen)
    return chosen


def open_device_model(rank: Rank) -> DeviceModel:
    """The rank's model on this process's device, in graph mode; joins the other ranks first."""
    device = device_name()
    ms.set_context(mode=ms.GRAPH_MODE)
    use_device(device, rank.device_id)
    join_ranks(rank.rank, rank.world_size, device)
    return AscendModel(rank) if device == "ascend" else CpuModel(rank)
