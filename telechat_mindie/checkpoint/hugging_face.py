"""The Hugging Face form of a checkpoint: safetensors or torch archives, with or without an index."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from telechat_mindie.checkpoint.formats.safetensors import read_safetensors
from telechat_mindie.checkpoint.formats.tensors import StoredTensor, read_files
from telechat_mindie.checkpoint.formats.torch import read_torch_bin
from telechat_mindie.checkpoint.mapping import EMBEDDINGS, HEAD, check_weights, published_names, weights
from telechat_mindie.checkpoint.tiles import TiledWeight, single_tile
from telechat_mindie.config import TelechatConfig
from telechat_mindie.errors import CheckpointError, name_some
from telechat_mindie.foreign import ADAPTER_FILES
from telechat_mindie.reading import read_json

FORMATS = (
    ("Hugging Face safetensors", "model.safetensors.index.json", "*.safetensors", read_safetensors),
    ("Hugging Face torch archive", "pytorch_model.bin.index.json", "pytorch_model*.bin", read_torch_bin),
)


def read_stored(path: Path) -> tuple[str, dict[str, StoredTensor]]:
    """(kind, tensors by name) of a weight file or of a directory's; empty where there are none.

    A LoRA adapter beside a model is no part of it.

    Raises:
        CheckpointError: a file is missing, damaged or hostile, or does not hold what the index says.
    """
    if path.is_file():
        chosen = next((form for form in FORMATS if path.suffix == Path(form[2]).suffix), None)
        return (chosen[0], chosen[3](path, path.parent)) if chosen else ("", {})
    for kind, index, pattern, read in FORMATS:
        weight_map = read_index(path / index)[0] if (path / index).exists() else None
        if not (files := set(weight_map.values()) if weight_map else _shards(path, pattern)):
            continue
        stored = read_files([path / file for file in sorted(files)], read, path)
        if weight_map is not None:
            _check_index(weight_map, stored, path / index)
        return kind, stored
    return "", {}


def index_alone(directory: Path) -> Path | None:
    """The index of shards none of which is there (yet), as before a download."""
    for _, index, pattern, _ in FORMATS:
        if (directory / index).exists() and not _shards(directory, pattern):
            return directory / index
    return None


def _shards(directory: Path, pattern: str) -> set[str]:
    return {file.name for file in directory.glob(pattern)} - {*ADAPTER_FILES}


def tiled_weights(stored: Mapping[str, StoredTensor], config: TelechatConfig, where: Path) -> dict[str, TiledWeight]:
    """Every weight that the config asks for, each a whole stored tensor.

    Raises:
        CheckpointError: names, shapes or dtypes do not fit the config.
    """
    named = {name: stored[given] for name, given in published_names(stored, where).items()}
    check_weights({name: tensor.shape for name, tensor in named.items()}, config, where)
    named.setdefault(HEAD, named[EMBEDDINGS])  # tied, or check_weights refuses
    return {name: single_tile(name, named[name]) for name in weights(config)}


def read_index(path: Path) -> tuple[dict[str, str], object]:
    """Weight -> file of an index, and the total_size that it says, which may be anything, or None.

    Raises:
        CheckpointError: files are no plain names.
    """
    index = read_json(path)
    weight_map, metadata = index.get("weight_map"), index.get("metadata")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("has no weight_map", where=path)
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file or "/" in file or "\\" in file or "\0" in file or file in (".", ".."):
            raise CheckpointError("names a file outside its folder", where=path, found=f"{name!r} -> {file!r}")
        if len(file) > 255:
            raise CheckpointError("names a file with an over-long name", where=path, found=f"{file[:40]}...")
    return weight_map, metadata.get("total_size") if isinstance(metadata, dict) else None


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
