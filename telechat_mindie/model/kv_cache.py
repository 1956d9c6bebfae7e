"""The paged key/value cache of one rank on a CPU."""

from __future__ import annotations

import ctypes

import numpy as np
from mindspore import ParameterTuple, Tensor, nn

from telechat_mindie.model.parameters import parameter_over


class KVCache(nn.Cell):
    """Keys and values of every layer, a row a slot: `slot = block * block_size + offset`.

    Each is a matrix [num_blocks * block_size + 1, kv heads * head_dim]. The last row is scratch: what must not be
    kept is written there, since the CPU's scatter refuses an index outside the matrix.

    Args:
        width: kv heads of this rank * head_dim.
        dtype: numpy's, of the elements; see the kernels' `cache_dtype`. With MindSpore's operators that is int16 where
            the runner says bfloat16: what `kvcache` gives then is the bits. MindIE asks for it on an NPU only, to put
            memory of its own in the parameters' place (generator_ms.py), so it gets these and no view of them.
    """

    def __init__(self, num_layers: int, num_blocks: int, block_size: int, width: int, dtype: np.dtype) -> None:
        super().__init__(auto_prefix=False)
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
    """The memory of a tensor on the CPU as a matrix [slots, width] of `dtype`, whatever its own shape and dtype."""
    return np.frombuffer((ctypes.c_char * tensor.nbytes).from_address(address_of(tensor)), dtype).reshape(-1, width)


def address_of(array: Tensor | np.ndarray) -> int:
    """Where the memory that operators use begins, of an array or of a tensor on the CPU.

    MindSpore 2.10 gives it by data_ptr and asnumpy alike. In 2.7 data_ptr, which 2.6 calls _data_ptr, is null until an
    operator has used the tensor, and asnumpy then gives the memory that operators will use; of what operators have made
    it gives a copy.
    """
    if not isinstance(array, np.ndarray):
        address = int(array.data_ptr() if hasattr(array, "data_ptr") else array._data_ptr())
        if address:
            return address
        array = array.asnumpy()
    return array.ctypes.data


def _parameters(name: str, count: int, shape: tuple[int, int], dtype: np.dtype) -> ParameterTuple:
    # numpy's zeros are pages that nothing has touched: memory that no token has used is not resident.
    zeros = (Tensor.from_numpy(np.zeros(shape, dtype)) for _ in range(count))
    return ParameterTuple([parameter_over(tensor, f"{name}.{layer}") for layer, tensor in enumerate(zeros)])
