"""The decoder of one rank as one call of the native library, over the memory of its MindSpore parameters."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from mindspore import Tensor

from telechat_mindie.errors import TelechatMindieError
from telechat_mindie.model.batch import RaggedBatch
from telechat_mindie.model.kv_cache import address_of

if TYPE_CHECKING:
    from telechat_mindie.model.decoder import Layer, TelechatForCausalLM


class NativeDecoder:
    """Runs a TelechatForCausalLM of one rank without a graph.

    It saves the time that MindSpore takes around and between operators, needs no graph compiled for each number of
    tokens, pads nothing, and computes the last layer's output only for the rows whose logits are wanted.

    Args:
        decoder: whose parameters it reads, and whose cache it writes in place.
        library: the loaded native library.
        runs: cuts a batch into what the library takes at a time, see `NativeKernels.runs`.
    """

    def __init__(
        self,
        decoder: TelechatForCausalLM,
        library: ctypes.CDLL,
        runs: Callable[[RaggedBatch], Iterator[tuple[list[np.ndarray], np.ndarray]]],
    ) -> None:
        config = decoder.config
        self._runs = runs
        self._vocab_size = config.vocab_size
        self._function = library.telechat_decoder
        experts = config.experts_per_token if config.is_moe else 0
        form = np.array([config.num_layers, experts, config.embed_layernorm], np.int32)
        eps, block_size = np.array([config.norm_eps], np.float32), np.array([decoder.cache.block_size], np.int32)
        self._keep = decoder, form, eps, block_size  # the arguments point to their memory
        model = decoder.model
        arguments = [form, eps, block_size, model.tok_embeddings.embedding_weight]
        if config.embed_layernorm:
            arguments.append(model.embedding_norm.weight)
        self._cache_places = []
        self._cache_width = config.kv_size
        self._own = self._used = decoder.cache.keys, decoder.cache.values
        for layer, *caches in zip(model.layers, *self._own, strict=True):
            arguments += _weights(layer)
            self._cache_places.append(len(arguments))
            arguments += caches
        arguments += [model.norm_out.weight, decoder.lm_head.weight]
        self._arguments = _Arguments(arguments)

    def logits(self, batch: RaggedBatch, caches: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None) -> np.ndarray:
        """Logits [R, vocabulary] float32 of a batch; `caches` (keys, values), a tensor a layer, in place of its own.

        Raises:
            TelechatMindieError: the library, which checks whatever it is given once more, refused it.
        """
        caches = self._own if caches is None else caches
        if caches is not self._used:
            for place, *layer in zip(self._cache_places, *caches, strict=True):
                self._arguments.set(place, layer, self._cache_width)
            self._used = caches
        out = np.empty((len(batch.logits_rows), self._vocab_size), np.float32)
        for inputs, wanted in self._runs(batch):
            everything = len(wanted) == len(out)
            found = out if everything else np.empty((len(inputs[1]), self._vocab_size), np.float32)
            if self._function(*self._arguments.followed_by([*inputs, found]), None, None):
                raise TelechatMindieError("the native kernels refused a call; what they found is on standard error")
            if not everything:
                out[wanted] = found[: len(wanted)]
        return out


def _weights(layer: Layer) -> list[Tensor]:
    """A layer's weights in the order of the library's read_layer."""
    attention, feed = layer.attention, layer.feed_forward
    common = [layer.attention_norm.weight, attention.w_qkv.weight, attention.wo.weight, attention.wo.bias]
    if hasattr(feed, "router"):
        experts = [feed.ffn.w1.weight, feed.ffn.w3.weight, feed.ffn.w2.weight, feed.ffn.w2.bias]
        return [*common, layer.ffn_norm.weight, feed.router.dense.weight, *experts]
    return [*common, layer.ffn_norm.weight, feed.w_gate_hidden.weight, feed.w2.weight, feed.w2.bias]


@lru_cache(maxsize=64)
def _dtype_name(dtype: object) -> bytes:
    return str(dtype).lower().encode()


class _Arguments:
    """Tensors and arrays as the library takes them: addresses, ranks, shapes and dtypes."""

    ROOM = 8  # for the arguments of a call

    def __init__(self, arrays: Sequence[Tensor | np.ndarray]) -> None:
        size = len(arrays) + self.ROOM
        self._fixed = len(arrays)
        self._addresses = (ctypes.c_void_p * size)()
        self._ranks = (ctypes.c_int * size)()
        self._shapes = (ctypes.c_void_p * size)()
        self._dtypes = (ctypes.c_char_p * size)()
        self._keep: list[object] = [None] * size  # the shapes' memory
        self.set(0, arrays)

    def set(self, place: int, arrays: Iterable[Tensor | np.ndarray], width: int = 0) -> None:
        """Describe arrays as the arguments from `place` on, as matrices of `width` columns unless that is 0."""
        for index, array in enumerate(arrays, place):
            shape = (array.size // width, width) if width else array.shape
            dimensions = (ctypes.c_int64 * len(shape))(*shape)
            self._addresses[index] = address_of(array)
            self._ranks[index] = len(shape)
            self._shapes[index] = ctypes.addressof(dimensions)
            self._dtypes[index] = _dtype_name(array.dtype)
            self._keep[index] = dimensions

    def followed_by(self, arrays: list[np.ndarray]) -> tuple[object, ...]:
        """What the library's function takes: the number of arguments, then what describes each of them."""
        self.set(self._fixed, arrays)
        return self._fixed + len(arrays), self._addresses, self._ranks, self._shapes, self._dtypes
