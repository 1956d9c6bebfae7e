"""The paged key/value cache of one rank on a CPU."""

from __future__ import annotations

import ctypes

import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn


class KVCache(nn.Cell):
    """Keys and values of every layer, a row a slot: `slot = block * block_size + offset`.

    Each is a matrix [num_blocks * block_size + 1, kv heads * head_dim]. The last row is scratch: what must not be
    kept is written there, since the CPU's scatter refuses an index outside the matrix.

    Args:
        width: kv heads of this rank * head_dim.
        dtype: numpy's, of the elements; see the kernels' `cache_dtype`.
    """

    def __init__(self, num_layers: int, num_blocks: int, block_size: int, width: int, dtype: np.dtype) -> None:
        super().__init__(auto_prefix=False)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.dtype = dtype
        self.scratch_row = num_blocks * block_size
        shape = (self.scratch_row + 1, width)
        self.keys = _parameters("key_cache", num_layers, shape, dtype)
        self.values = _parameters("value_cache", num_layers, shape, dtype)
        # [blocks, block_size * width] of each layer's keys, then of each one's values
        bits = np.dtype(f"u{dtype.itemsize}")
        self._blocks = [
            rows_of(side, width, bits)[: self.scratch_row].reshape(num_blocks, block_size * width)
            for side in (*self.keys, *self.values)
        ]

    def read_blocks(self, blocks: np.ndarray) -> np.ndarray:
        """[n, 2 * layers, block_size * width]: the bits of n blocks' keys and values."""
        return np.stack([side[blocks] for side in self._blocks], axis=1)

    def write_blocks(self, blocks: np.ndarray, contents: np.ndarray) -> None:
        """The inverse of `read_blocks`."""
        for side, found in zip(self._blocks, contents.swapaxes(0, 1), strict=True):
            side[blocks] = found


def rows_of(tensor: Tensor, width: int, dtype: np.dtype) -> np.ndarray:
    """The memory of a tensor on the CPU as a matrix [slots, width] of `dtype`, whatever its own shape and dtype.

    MindSpore 2.7 has no data_ptr of what no operator has used yet; asnumpy then gives the memory that operators will
    use. Of what operators have made, its asnumpy gives a copy.
    """
    address = int(tensor.data_ptr()) or tensor.asnumpy().ctypes.data
    return np.frombuffer((ctypes.c_char * tensor.nbytes).from_address(address), dtype).reshape(-1, width)


def _parameters(name: str, count: int, shape: tuple[int, int], dtype: np.dtype) -> ParameterTuple:
    # from_numpy shares numpy's zero pages: memory that no token has used is not touched.
    return ParameterTuple(
        [
            Parameter(Tensor.from_numpy(np.zeros(shape, dtype)), name=f"{name}.{layer}", requires_grad=False)
            for layer in range(count)
        ]
    )
