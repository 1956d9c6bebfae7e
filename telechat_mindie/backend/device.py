"""One rank's model on the device of this process: the only place that knows Ascend from a CPU."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from operator import is_not
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np

from telechat_mindie.backend.caches import AscendHostCache, HostCache, as_rows, block_pairs, external_caches
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
    plugins: tuple[str, ...] = ()  # MindIE's, as `plugin_names` gives them


class DeviceModel:
    """A decoder with its kernels and caches. `run` computes a batch's logits; subclasses build it for a device."""

    def __init__(self, rank: Rank) -> None:
        directory, config = rank.directory, rank.directory.config
        self.rank = rank
        serving = directory.serving
        self.rotary = RotaryTable.of(config, serving.extend_method, serving.rotary_dtype, serving.scaling_factor)
        self.dtype = serving.dtype  # of the caches: the runner's, whatever else a device computes in
        self.width = config.kv_size // rank.world_size
        self.kernels: Any
        self.decoder: TelechatForCausalLM
        self.host: HostCache | AscendHostCache

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

    def run(self, batch: RaggedBatch, caches: Any) -> ms.Tensor:
        """Logits [R, vocabulary] float32; `caches` None for the model's own, else what `external` gave."""
        raise NotImplementedError

    def external(self, key_cache: Sequence[ms.Tensor], value_cache: Sequence[ms.Tensor]) -> tuple[Any, int]:
        """MindIE's caches, checked, and their number of blocks. Raises InputError for a misfit."""
        shape = (self.rank.directory.config.num_layers, self.rank.block_size, self.width)
        keys, values, blocks = external_caches(key_cache, value_cache, shape, self.dtype)
        return (keys, values), blocks

    def swap(self, pairs: np.ndarray, to_host: bool) -> None:
        """Copy block pairs[i, 0] to pairs[i, 1], from the device where `to_host`, else to it.

        Raises:
            InputError: anything but pairs of blocks.
        """
        self.host.swap(block_pairs(pairs, to_host, self.rank.host_blocks, self.rank.num_blocks), to_host)


class CpuModel(DeviceModel):
    """MindSpore on the CPU: float32 activations, the cache a row a slot.

    Keys and values are rounded to the directory's dtype, half the memory of float32 where that has 16 bits. On a model
    of bfloat16 weights, logits up to 8.1, that moves a logit by at most 0.088 in bfloat16 (root mean square 0.012) and
    0.010 in float16 (0.0015), against 1.3e-5 for float32; no greedy token of it changed, nor any of the 1,027 answers
    that telechat2-nano was trained on.
    """

    def __init__(self, rank: Rank) -> None:
        from telechat_mindie.model.kernels.selection import select_cpu_kernels

        super().__init__(rank)
        config, kernels = rank.directory.config, select_cpu_kernels()
        self._cache_dtype = kernels.cache_dtype(self.dtype)
        cache = KVCache(config.num_layers, rank.num_blocks, rank.block_size, self.width, self._cache_dtype)
        self.host = HostCache(cache, rank.host_blocks)
        self.kernels = kernels(config, rank.world_size, cache, self.rotary)
        self.decoder = self.load(self.kernels, cache, kernels.weight_dtype(self.dtype))
        # The ranks of several exchange sums between operators, which only a graph can.
        self._alone = self.kernels.single_rank_decoder(self.decoder) if rank.world_size == 1 else None

    def run(self, batch: RaggedBatch, caches: Any) -> ms.Tensor:
        if self._alone is not None:
            logits = self._alone.logits(batch, caches)
            return ms.Tensor.from_numpy(logits)  # the same memory, and asnumpy gives it again
        if caches is not None:  # the CPU's scatter writes rows of a matrix
            keys, values = caches
            caches = as_rows(keys, values, self.width, self._cache_dtype)
        logits = np.empty((len(batch.logits_rows), self.rank.directory.config.vocab_size), np.float32)
        for call in self.kernels.calls(batch):
            out = self.decoder(call.token_ids, call.logits_rows, call.inputs, caches)
            logits[call.rows] = out.astype(ms.float32).asnumpy()[: len(call.rows)]
        return ms.Tensor.from_numpy(logits)


class AscendModel(DeviceModel):
    """Fused operators on one NPU, in the dtype of the weights; the cache [blocks, block_size, kv heads, head_dim]."""

    on_device = True

    def __init__(self, rank: Rank) -> None:
        from telechat_mindie.model.kernels.ascend import AscendKernels
        from telechat_mindie.model.kernels.ascend_graphs import DECODE, PLUGIN_GRAPHS, AscendCache, AscendGraphs

        super().__init__(rank)
        config, serving = rank.directory.config, rank.directory.serving
        cache = AscendCache(
            config.num_layers,
            rank.num_blocks,
            rank.block_size,
            config.num_kv_heads // rank.world_size,
            config.head_dim,
            self.dtype,
            on_device=self.on_device,
        )
        self.host = AscendHostCache(cache, rank.host_blocks)
        kernels = AscendKernels(
            config,
            rank.world_size,
            cache,
            self.rotary,
            max_seq_len=serving.max_seq_len,
            layer_form=serving.layer_form,
        )
        self.kernels = self.prepare(kernels)
        self.decoder = self.load(self.kernels, cache, AscendKernels.weight_dtype(self.dtype))
        external_layers = 0 if rank.num_blocks else config.num_layers
        self.network = AscendGraphs(self.decoder, self.kernels.call_shape(external_layers))
        self._given: list[ms.Tensor] = []
        self._external: tuple[Any, int] = (None, 0)
        self._to_compile = {DECODE, *(graph for name in rank.plugins for graph in PLUGIN_GRAPHS.get(name, ()))}

    def external(self, key_cache: Sequence[ms.Tensor], value_cache: Sequence[ms.Tensor]) -> tuple[Any, int]:
        """As the base says, each side as graphs take it.

        MindIE brings the same tensors with every call: those that have been looked at are known by their identity.
        """
        if self.rank.num_blocks:
            raise InputError("comes beside the model's own cache", where="key_cache", expected="npu_mem_size -1")
        given = [*(key_cache or ()), *(value_cache or ())]
        if len(given) != len(self._given) or any(map(is_not, given, self._given)):
            (keys, values), blocks = super().external(key_cache, value_cache)
            self._external = (ms.mutable(tuple(keys)), ms.mutable(tuple(values))), blocks
            self._given = given
        return self._external

    def run(self, batch: RaggedBatch, caches: Any) -> ms.Tensor:
        """As the base says; on the device, and neither waited for nor copied."""
        (call,) = self.kernels.calls(batch)
        logits = self.network(call, caches)
        if self._to_compile:
            self._compile(call.kind, caches)
        return logits

    def _compile(self, done: str, caches: Any) -> None:
        """Run the graphs of the calls to come once: MindIE warms up with prompts alone, and the first user would wait.

        Every rank is in the same call of MindIE's here, so that their collectives meet.
        """
        from telechat_mindie.model.kernels.ascend_batches import first_batch

        kinds, self._to_compile = self._to_compile - {done}, set()
        for kind in sorted(kinds):
            (call,) = self.kernels.calls(first_batch(kind))
            self.network(call, caches)

    @staticmethod
    def prepare(kernels: Any) -> Any:
        """The kernels as they are used; a place for tests to put emulated operators."""
        return kernels


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
    if device == "ascend":
        from telechat_mindie.backend.ascend_process import prepare_process

        prepare_process(rank.rank, rank.world_size, rank.device_id)
    else:
        ms.set_context(mode=ms.GRAPH_MODE)
        use_device(device)
    join_ranks(rank.rank, rank.world_size, device)
    return AscendModel(rank) if device == "ascend" else CpuModel(rank)
