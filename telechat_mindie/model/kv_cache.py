"""The paged key/value cache of one rank."""

from __future__ import annotations

import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from telechat_mindie.dtypes import DTYPES


class KVCache(nn.Cell):
    """Keys and values of every layer, a row a slot: `slot = block * block_size + offset`.

    Each is a matrix [num_blocks * block_size + 1, kv heads * head_dim]. The last row is scratch: what must not be
    kept is written there, since the CPU's scatter refuses an index outside the matrix.
    """

    def __init__(self, num_layers: int, num_blocks: int, block_size: int, width: int, dtype: str) -> None:
        super().__init__(auto_prefix=False)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.dtype = dtype
        self.scratch_row = num_blocks * block_size
        shape = (self.scratch_row + 1, width)
        self.keys = _parameters("key_cache", num_layers, shape, dtype)
        self.values = _parameters("value_cache", num_layers, shape, dtype)

        self._gather = ops.Gather()
        self._scatter = ops.ScatterUpdate()

    def read_blocks(self, blocks: np.ndarray) -> np.ndarray:
        """[layers, 2, n * block_size, width]: keys and values of n blocks, as the cache stores them."""
        rows = self._rows(blocks)
        layers = zip(self.keys, self.values, strict=True)
        return np.stack([[self._gather(side, rows, 0).asnumpy() for side in layer] for layer in layers])

    def write_blocks(self, blocks: np.ndarray, contents: np.ndarray) -> None:
        """The inverse of `read_blocks`."""
        rows = self._rows(blocks)
        for layer, found in zip(zip(self.keys, self.values, strict=True), contents, strict=True):
            for side, values in zip(layer, found, strict=True):
                self._scatter(side, rows, Tensor(np.ascontiguousarray(values)))
                side.data_ptr()  # waits for the scatter: NativeDecoder reads this memory itself

    def _rows(self, blocks: np.ndarray) -> Tensor:
        return Tensor((blocks[:, None] * self.block_size + np.arange(self.block_size)).ravel().astype(np.int32))


def _parameters(name: str, count: int, shape: tuple[int, int], dtype: str) -> ParameterTuple:
    # from_numpy shares numpy's zero pages: memory that no token has used is not touched.
    return ParameterTuple(
        [
            Parameter(
                Tensor.from_numpy(np.zeros(shape, DTYPES[dtype].numpy)), name=f"{name}.{layer}", requires_grad=False
            )
            for layer in range(count)
        ]
    )
