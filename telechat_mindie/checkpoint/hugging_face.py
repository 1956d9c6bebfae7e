"""The Hugging Face form of a checkpoint: safetensors or torch archives, with or without an index."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from telechat_mindie.checkpoint.formats.safetensors import read_safetensors
from telechat_mindie.checkpoint.formats.tensors import StoredTensor, read_files
from telechat_mindie.checkpoint.formats.torch import read_torch_bin
from telechat_mindie.checkpoint.mapping import check_weights, weights
from telechat_mindie.checkpoint.tiles import TiledWeight, single_tile
from telechat_mindie.config import TelechatConfig
from telechat_mindie.errors import CheckpointError, name_some
from telechat_mindie.reading import read_json

FORMATS = (
    ("Hugging Face safetensors", "model.safetensors.index.json", "*.safetensors", read_safetensors),
    ("Hugging Face torch archive", "pytorch_model.bin.index.json", "pytorch_model*.bin", read_torch_bin),
)


def read_stored(directory: Path) -> tuple[str, dict[str, StoredTensor]]:
    """(kind, tensors by name) of the directory's weights; empty where it holds no such files.

    Raises:
        CheckpointError: a file is missing, damaged or hostile, or does not hold what the index says.
    """
    for kind, index, pattern, read in FORMATS:
        weight_map = read_index(directory / index) if (directory / index).exists() else None
        files = sorted(set(weight_map.values()) if weight_map else (path.name for path in directory.glob(pattern)))
        if not files:
            continue
        stored = read_files([directory / file for file in files], read, directory)
        if weight_map is not None:
            _check_index(weight_map, stored, directory / index)
        return kind, stored
    return "", {}


def is_published(names: Iterable[str]) -> bool:
    """Whether tensors have Hugging Face names, and not those of mindformers, which may be in safetensors files too."""
    spellings = {name.partition(".")[0] for name in names}
    return bool(spellings & {"transformer", "lm_head"}) and "model" not in spellings


def tiled_weights(stored: Mapping[str, StoredTensor], config: TelechatConfig, where: Path) -> dict[str, TiledWeight]:
    """Every weight that the config asks for, each a whole stored tensor.

    Raises:
        CheckpointError: names, shapes or dtypes do not fit the config.
    """
    check_weights({name: tensor.shape for name, tensor in stored.items()}, config, where)
    tied = {} if "lm_head.weight" in stored else {"lm_head.weight": "transformer.word_embeddings.weight"}
    return {name: single_tile(name, stored[tied.get(name, name)]) for name in weights(config)}


def read_index(path: Path) -> dict[str, str]:
    """Weight -> file of an index; files are plain names. Raises CheckpointError for anything else."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("has no weight_map", where=path)
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file or "/" in file or "\\" in file or "\0" in file or file in (".", ".."):
            raise CheckpointError("names a file outside its folder", where=path, found=f"{name!r} -> {file!r}")
        if len(file) > 255:
            raise CheckpointError("names a file with an over-long name", where=path, found=f"{file[:40]}...")
    return weight_map


def _check_index(weight_map: Mapping[str, str], stored: Mapping[str, StoredTensor], path: Path) -> None:
    absent = [name for name in weight_map if name not in stored]
    if absent:
        raise CheckpointError(f"weights of the index are in none of its files: {name_some(absent)}", where=path)
    unlisted = stored.keys() - weight_map.keys()
    if unlisted:
        raise CheckpointError(f"weights of the files are not in the index: {name_some(unlisted)}", where=path)
    for name, file in weight_map.items():
        actual = stored[name].extents[0].file.name if stored[name].extents else file
        if actual != file:
            raise CheckpointError("lies in another file than the index says", where=name, expected=file, found=actual)
