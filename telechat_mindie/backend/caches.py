"""Key/value memory beyond the model's own cache: blocks in host memory, and caches that MindIE allocates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mindspore as ms
import numpy as np

from telechat_mindie.checkpoint.tensors import DTYPES
from telechat_mindie.errors import InputError
from telechat_mindie.model.kv_cache import KVCache


def block_count(gigabytes: int, token_bytes: int, block_size: int, name: str) -> int:
    """Blocks of `block_size` tokens that fit: MindIE's own formula (kvcache_settings.py), so it hands out no more.

    Raises:
        InputError: not even one fits.
    """
    count = (gigabytes << 30) // (token_bytes * block_size)
    if count < 1:
        raise InputError(
            "is too small for one block",
            where=name,
            expected=f"at least {token_bytes * block_size} bytes",
            found=f"{gigabytes} GB",
        )
    return count


class HostCache:
    """Swapped-out blocks, in ordinary memory that is touched only when used."""

    def __init__(self, device: KVCache, num_blocks: int) -> None:
        self._device = device
        layers, (_, width) = len(device.keys), device.keys[0].shape
        shape = (num_blocks, layers, 2, device.block_size, width)
        self._blocks = np.zeros(shape, DTYPES[device.dtype])

    def swap(self, pairs: np.ndarray, to_host: bool) -> None:
        """Copy block pairs[i, 0] to pairs[i, 1], from the device where `to_host`, else to it.

        Args:
            pairs: [n, 2] integers, as MindIE passes them.

        Raises:
            InputError: not such an array, or a block out of range.
        """
        pairs = np.asarray(pairs)
        if pairs.ndim != 2 or pairs.shape[1] != 2 or pairs.dtype.kind not in "iu":
            raise InputError(
                "must be pairs of blocks", where="block_tables", expected="integers [n, 2]", found=list(pairs.shape)
            )
        source, target = pairs.T if len(pairs) else (pairs[:, 0], pairs[:, 1])
        host, device = (target, source) if to_host else (source, target)
        for name, blocks, count in (("host", host, len(self._blocks)), ("device", device, self._device.num_blocks)):
            if len(blocks) and not (blocks.min() >= 0 and blocks.max() < count):
                raise InputError(
                    f"{name} block out of range",
                    where="block_tables",
                    expected=f"0 to {count - 1}",
                    found=blocks.tolist(),
                )
        for host_block, device_block in zip(host, device, strict=True):
            if to_host:
                found = self._device.read_blocks(np.array([device_block]))
                self._blocks[host_block] = found
            else:
                self._device.write_blocks(np.array([device_block]), self._blocks[host_block])


def external_caches(
    key_cache: Sequence[ms.Tensor], value_cache: Sequence[ms.Tensor], expected: tuple[int, int, int], dtype: str
) -> tuple[Any, int]:
    """MindIE's caches (npu_mem_size -1) in the kernels' layout, sharing their memory, and their number of blocks.

    Args:
        key_cache: a tensor a layer, [blocks, block_size, kv heads, head_size].
        value_cache: the same.
        expected: (layers, block_size, kv heads * head_size).
        dtype: what the kernels keep caches in.

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
    blocks = key_cache[0].shape[0]
    for name, caches in (("key_cache", key_cache), ("value_cache", value_cache)):
        for layer, cache in enumerate(caches):
            shape = (cache.shape[0], cache.shape[1], int(np.prod(cache.shape[2:])))
            if shape != (blocks, block_size, width) or cache.dtype != getattr(ms, dtype):
                raise InputError(
                    "has the wrong shape or dtype",
                    where=f"{name}[{layer}]",
                    expected=f"{dtype} [{blocks}, {block_size}, {width}]",
                    found=f"{cache.dtype} {list(cache.shape)}",
                )
    views = [[cache.reshape(blocks * block_size, width) for cache in caches] for caches in (key_cache, value_cache)]
    return ms.mutable((ms.mutable(views[0]), ms.mutable(views[1]))), blocks
