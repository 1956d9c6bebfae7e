"""A rank's weights from a model directory into parameters: every name and shape accounted for, nothing random."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from mindspore import Parameter, Tensor

from telechat_mindie.checkpoint.formats.safetensors import read_safetensors
from telechat_mindie.checkpoint.formats.tensors import StoredTensor, TensorReader
from telechat_mindie.checkpoint.mapping import Target, differences, mindformers_targets
from telechat_mindie.config import TelechatConfig
from telechat_mindie.dtypes import DTYPES
from telechat_mindie.errors import ModelDirError, name_some
from telechat_mindie.model.parameters import parameter_over

_REBUILD = "Build the directory again with `telechat-mindie build --force`."


class RankWeights:
    """The weights of `folder` (a directory's rank_N), given out one by one as parameters of `dtype`.

    The decoder takes q/k/v and gate/up packed; from a directory built with --no-qkv-concat they are packed here.

    Raises:
        ModelDirError: a weight is missing, unknown, or has another shape than the config and `tp` ask for.
    """

    def __init__(self, folder: Path, config: TelechatConfig, tp: int, dtype: str) -> None:
        if not folder.is_dir():
            raise ModelDirError("weights of this rank are missing", where=folder, advice=_REBUILD)
        self._dtype = dtype
        self._head_dim = config.head_dim
        self._stored: dict[str, StoredTensor] = {}
        for path in sorted(folder.glob("*.safetensors")):
            self._stored |= read_safetensors(path)
        packed = any(name.endswith("attention.w_qkv.weight") for name in self._stored)
        expected = mindformers_targets(config, qkv_concat=packed, transposed_experts=config.is_moe)
        self._check(expected, tp, folder)
        self._reader = TensorReader()

    def __enter__(self) -> RankWeights:
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.__exit__()

    def __call__(self, name: str, shape: tuple[int, ...], dtype: str = "") -> Parameter:
        """The parameter called `name`, over its file's pages where that has its dtype; each weight is given once.

        Raises:
            ModelDirError: there is no such weight, or its shape is another.
        """
        array = self._load(name)
        if array.shape != shape:
            raise ModelDirError("has the wrong shape", where=name, expected=list(shape), found=list(array.shape))
        return parameter_over(Tensor.from_numpy(np.ascontiguousarray(array, DTYPES[dtype or self._dtype].numpy)))

    def check_all_taken(self) -> None:
        """Raises ModelDirError where the directory holds weights that the model did not ask for."""
        if self._stored:
            raise ModelDirError(f"weights that the model does not use: {name_some(self._stored)}", advice=_REBUILD)

    def _load(self, name: str) -> np.ndarray:
        if name in self._stored:
            return self._reader.map(self._stored.pop(name))
        if name.endswith("attention.w_qkv.weight"):
            query = self._load(name.replace("w_qkv", "wq"))
            key_value = self._load(name.replace("w_qkv", "wk_v"))
            # Per kv head: head_dim rows of the key, then of the value.
            pairs = key_value.reshape(-1, 2, self._head_dim, key_value.shape[1])
            return np.concatenate([query, *(pairs[:, side].reshape(-1, key_value.shape[1]) for side in (0, 1))])
        if name.endswith("feed_forward.w_gate_hidden.weight"):
            return np.concatenate([self._load(name.replace("w_gate_hidden", part)) for part in ("w1", "w3")])
        raise ModelDirError("weight is missing", where=name, advice=_REBUILD)

    def _check(self, targets: list[Target], tp: int, folder: Path) -> None:
        expected = {target.name: target.rank_shape(tp) for target in targets}
        for _, clause in differences({name: tensor.shape for name, tensor in self._stored.items()}, expected):
            raise ModelDirError(clause, where=folder, advice=_REBUILD)
