"""Key/value memory beyond the model's own cache: blocks in host memory, and caches that MindIE allocates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import mindspore as ms
import numpy as np
from mindspore import Tensor
from mindspore.common.initializer import Zero

from telechat_mindie.errors import InputError
from telechat_mindie.model.kv_cache import KVCache, rows_of
from telechat_mindie.model.parameters import parameter_over

if TYPE_CHECKING:
    from telechat_mindie.model.kernels.ascend_graphs import AscendCache


class HostCache:
    """Swapped-out blocks, in ordinary memory that is touched only when used."""

    def __init__(self, device: KVCache, num_blocks: int) -> None:
        self._device = device
        none = device.read_blocks(np.zeros(0, np.int64))
        self._blocks = np.zeros((num_blocks, *none.shape[1:]), none.dtype)

    def swap(self, pairs: np.ndarray, to_host: bool) -> None:
        """Copy block pairs[i, 0] to pairs[i, 1], from the device where `to_host`, else to it."""
        source, target = pairs.T
        if to_host:
            self._blocks[target] = self._device.read_blocks(source)
        else:
            self._device.write_blocks(target, self._blocks[source])


class AscendHostCache:
    """Swapped-out blocks of an NPU's cache, in MindSpore's host memory, copied by its swap_cache."""

    def __init__(self, device: AscendCache, num_blocks: int) -> None:
        self._device = device
        shape = (num_blocks, *device.keys[0].shape[1:])
        dtype = getattr(ms, device.dtype)
        # MindSpore refuses an empty tensor; without host memory there is nothing to swap.
        self._keys, self._values = (
            [
                parameter_over(Tensor(shape=shape, dtype=dtype, init=Zero()).init_data(), f"{name}_host.{layer}")
                for layer in range(len(device.keys) if num_blocks else 0)
            ]
            for name in ("key", "value")
        )

    def swap(self, pairs: np.ndarray, to_host: bool) -> None:
        """As `HostCache.swap`."""
        from mindspore._c_expression import swap_cache

        mapping = Tensor(pairs.astype(np.int64))
        for host, device in ((self._keys, self._device.keys), (self._values, self._device.values)):
            for host_layer, device_layer in zip(host, device, strict=True):
                swap_cache(host_layer, device_layer, mapping, to_host)


def block_pairs(pairs: np.ndarray, to_host: bool, host_blocks: int, device_blocks: int) -> np.ndarray:
    """[n, 2] pairs of blocks (from, to), as MindIE passes them. Raises InputError where they are not that."""
    pairs = np.asarray(pairs)
    if pairs.ndim != 2 or pairs.shape[1] != 2 or pairs.dtype.kind not in "iu":
        raise InputError(
            "must be pairs of blocks", where="block_tables", expected="integers [n, 2]", found=list(pairs.shape)
        )
    device, host = pairs.T if to_host else pairs.T[::-1]
    for name, blocks, count in (("host", host, host_blocks), ("device", device, device_blocks)):
        if len(blocks) and not (blocks.min() >= 0 and blocks.max() < count):
            raise InputError(
                f"{name} block out of range",
                where="block_tables",
                expected=f"0 to {count - 1}",
                found=blocks.tolist(),
            )
    return pairs


def external_caches(
    key_cache: Sequence[ms.Tensor], value_cache: Sequence[ms.Tensor], expected: tuple[int, int, int], dtype: str
) -> tuple[list[ms.Tensor], list[ms.Tensor], int]:
    """MindIE's caches (npu_mem_size -1) checked, and their number of blocks.

    Args:
        key_cache: a tensor a layer, [blocks, block_size, kv heads, head_size].
        value_cache: the same.
        expected: (layers, block_size, kv heads * head_size).
        dtype: the runner's.

    Raises:
        InputError: another number of layers, shape or dtype.
    """
    layers, block_size, width = expected
    for name, caches in (("key_cache", key_cache), ("value_cache", value_cache)):
        if caches is None or len(caches) != layers:
            raise InputError(
                "has the wrong number of layers",
                where=name,
                expected=layers,
                found=None if caches is None else len(caches),
            )
    blocks = next(iter(key_cache[0].shape), 0)
    for name, caches in (("key_cache", key_cache), ("value_cache", value_cache)):
        for layer, cache in enumerate(caches):
            shape = (*cache.shape[:2], int(np.prod(cache.shape[2:])))
            if shape != (blocks, block_size, width) or cache.dtype != getattr(ms, dtype):
                raise InputError(
                    "has the wrong shape or dtype",
                    where=f"{name}[{layer}]",
                    expected=f"{dtype} [{blocks}, {block_size}, {width}]",
                    found=f"{cache.dtype} {list(cache.shape)}",
                )
    return list(key_cache), list(value_cache), blocks


def as_rows(
    key_cache: Sequence[ms.Tensor], value_cache: Sequence[ms.Tensor], width: int, dtype: np.dtype
) -> tuple[list[ms.Tensor], list[ms.Tensor]]:
    """MindIE's caches as a graph takes them: mutable matrices [slots, width] of the same memory, their bits `dtype`."""
    keys, values = (
        ms.mutable([Tensor.from_numpy(rows_of(cache, width, dtype)) for cache in caches])
        for caches in (key_cache, value_cache)
    )
    rows: tuple[list[ms.Tensor], list[ms.Tensor]] = ms.mutable((keys, values))
    return rows
