"""A CPU's key/value cache: memory that only its use makes resident, one and the same for operators and for blocks."""

from __future__ import annotations

import ctypes

import mindspore as ms
import numpy as np
import psutil
import pytest
from mindspore import Tensor, nn, ops

from telechat_mindie.backend.ranks import use_device
from telechat_mindie.dtypes import DTYPES
from telechat_mindie.model.kv_cache import KVCache, address_of

MIB = 1 << 20
BLOCK, WIDTH = 16, 64


def resident() -> int:
    found: int = psutil.Process().memory_info().rss
    return found


class Step(nn.Cell):
    """Writes rows of the first layer's keys, and reads rows of them, as the kernels do."""

    def __init__(self, cache: KVCache) -> None:
        super().__init__(auto_prefix=False)
        self.keys = cache.keys
        self.scatter = ops.ScatterUpdate()
        self.gather = ops.Gather()

    def construct(self, slots: Tensor, rows: Tensor, wanted: Tensor) -> Tensor:
        self.scatter(self.keys[0], slots, rows)
        return self.gather(self.keys[0], wanted, 0)


def large(dtype: np.dtype) -> KVCache:
    """256 MiB in two layers' keys and values."""
    return KVCache(2, 64 * MIB // (BLOCK * WIDTH * dtype.itemsize), BLOCK, WIDTH, dtype)


@pytest.mark.parametrize("dtype", ["int16", "float16", "float32"])
@pytest.mark.parametrize("mode", [ms.GRAPH_MODE, ms.PYNATIVE_MODE], ids=["graph", "pynative"])
def test_operators_write_where_blocks_are_read_and_touch_no_more(dtype: str, mode: int) -> None:
    ms.set_context(mode=mode)
    use_device("cpu")
    slots, rows = Tensor(np.int32([3 * BLOCK + 5])), np.arange(WIDTH).astype(dtype)[None]
    Step(KVCache(1, 8, BLOCK, WIDTH, np.dtype(dtype)))(slots, Tensor(rows), slots)  # what MindSpore itself takes
    before = resident()
    cache = large(np.dtype(dtype))
    step = Step(cache)
    try:
        np.testing.assert_array_equal(step(slots, Tensor(rows), slots).asnumpy(), rows)
        blocks = cache.read_blocks(np.array([3, 4]))
        bits = blocks.view(dtype).reshape(2, 4, BLOCK, WIDTH)  # [block, layers' keys and values, slot, width]
        np.testing.assert_array_equal(bits[0, 0, 5], rows[0])
        assert np.count_nonzero(blocks) == np.count_nonzero(rows)
        cache.write_blocks(np.array([7]), blocks[:1])
        there = Tensor(np.int32([7 * BLOCK + 5]))
        np.testing.assert_array_equal(step(slots, Tensor(rows), there).asnumpy(), rows)
    finally:
        ms.set_context(mode=ms.GRAPH_MODE)
    assert resident() - before < 128 * MIB


def test_bfloat16_is_untouched_too_and_keeps_its_name() -> None:
    use_device("cpu")
    before = resident()
    cache = large(DTYPES["bfloat16"].numpy)
    assert resident() - before < 128 * MIB
    for parameter in (*cache.keys, *cache.values):
        assert parameter.dtype is ms.bfloat16 and parameter.shape == (cache.scratch_row + 1, WIDTH)
        assert not parameter.requires_grad
    assert [parameter.name for parameter in (*cache.keys, *cache.values)] == [
        "key_cache.0",
        "key_cache.1",
        "value_cache.0",
        "value_cache.1",
    ]
    blocks = np.full((1, 4, BLOCK * WIDTH), 0x3F80, np.uint16)
    cache.write_blocks(np.array([2]), blocks)
    written = (ctypes.c_uint16 * (BLOCK * WIDTH)).from_address(address_of(cache.values[1]) + 2 * 2 * BLOCK * WIDTH)
    np.testing.assert_array_equal(np.array(written), blocks[0, 3])


def test_one_address_whoever_made_the_memory() -> None:
    use_device("cpu")
    array = np.arange(6, dtype=np.float32)
    shared, made = Tensor.from_numpy(array), ops.ones((2, 3), ms.float32)
    assert address_of(array) == address_of(shared) == array.ctypes.data
    ctypes.memset(address_of(made), 0, 4)
    np.testing.assert_array_equal(made.asnumpy(), [[0, 1, 1], [1, 1, 1]])
    assert address_of(shared + 1) != array.ctypes.data
    assert address_of(shared) == array.ctypes.data  # once an operator has used it
