"""The parameters of a decoder that is trained: float32 masters, or for LoRA frozen weights with factors beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor

from telechat_mindie.checkpoint.mapping import EMBEDDINGS, HEAD
from telechat_mindie.checkpoint.mapping import weights as weights_by_source
from telechat_mindie.config import TelechatConfig
from telechat_mindie.dtypes import DTYPES
from telechat_mindie.errors import CheckpointError
from telechat_mindie.training.lora import A, B, Module, initial_factors, modules_of, trained_modules
from telechat_mindie.training.settings import Computation, Lora
from telechat_mindie.training.weights import decoder_targets


class Parameters:
    """Gives a decoder its parameters, one by one, and remembers which are trained.

    For LoRA a weight comes as a tuple of it and its factors, see `TrainingKernels`.

    Args:
        weights: float32 arrays by the decoder's names, of this rank.
        tp_rank: which.

    Attributes:
        trained: by name, in the decoder's order.
        cut: names of those of which each tensor parallel rank has a part of its own.
    """

    def __init__(
        self,
        config: TelechatConfig,
        weights: Mapping[str, np.ndarray],
        computation: Computation,
        lora: Lora | None,
        tp_rank: int,
    ) -> None:
        self._config, self._weights, self._computation, self._lora = config, weights, computation, lora
        self._rank = tp_rank
        self._targets = {target.name: target for target in decoder_targets(config)}
        self._embeddings = weights_by_source(config)[EMBEDDINGS].target
        self._modules = {module.name for module in trained_modules(config, lora)} if lora else set()
        self._all: dict[str, Any] = {}
        self.trained: dict[str, Any] = {}
        self.cut: set[str] = set()

    def __call__(self, name: str, shape: tuple[int, ...], dtype: str = "") -> Any:
        if self._config.tie_word_embeddings and name == HEAD:
            return self._all[self._embeddings]  # one parameter
        if name not in self._weights:
            raise CheckpointError("weight is missing", where=name)
        array = self._weights[name]
        if array.shape != shape:
            raise CheckpointError("has the wrong shape", where=name, expected=list(shape), found=list(array.shape))
        target = self._targets[name]
        if self._lora is None:
            if target.role.axis is not None and self._computation.tp > 1:
                self.cut.add(name)
            return self._parameter(name, array, trained=True)
        frozen = self._parameter(name, array, trained=False)
        modules = modules_of(target, self._config)
        if not any(module.name in self._modules for module in modules):
            return frozen
        return ParameterTuple([frozen, *(factor for module in modules for factor in self._factors(module))])

    def _factors(self, module: Module) -> list[Any]:
        """A and B. A module that is packed with a trained one and is none itself has factors of zeros that stay so."""
        assert self._lora is not None
        trained = module.name in self._modules
        tp = self._computation.tp
        a, b = initial_factors(module, self._lora, self._rank, tp)
        if not trained:
            a, b = np.zeros_like(a[:1]), b[:, :1]
        found = []
        for suffix, array in ((A, a), (B, b)):
            name = module.name + suffix
            found.append(self._parameter(name, array, trained=trained))
            if tp > 1 and module.is_cut(suffix):
                self.cut.add(name)
        return found

    def _parameter(self, name: str, array: np.ndarray, *, trained: bool) -> Any:
        narrow = not trained and array.ndim > 1 and name != self._embeddings  # frozen, and only ever multiplied
        dtype = self._computation.dtype if narrow else "float32"
        parameter = Parameter(Tensor(array.astype(DTYPES[dtype].numpy)), name=name, requires_grad=trained)
        self._all[name] = parameter
        if trained:
            self.trained[name] = parameter
        return parameter

    def restore_names(self) -> None:
        """The names that parameters were given, to which cells have put theirs in front."""
        for name, parameter in self._all.items():
            parameter.name = name


def zeros_like(parameter: Any, name: str) -> Any:
    """A parameter of its shape, float32, that is not trained."""
    return Parameter(Tensor(np.zeros(parameter.shape, np.float32)), name=name, requires_grad=False)
