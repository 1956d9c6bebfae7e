"""A rank's weights as the decoder holds them, from a checkpoint's whole ones, and whole again from all ranks'."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from telechat_mindie.checkpoint.blocks import Block
from telechat_mindie.checkpoint.mapping import Target, mindformers_targets
from telechat_mindie.checkpoint.reader import BlockReader
from telechat_mindie.checkpoint.sharding import split
from telechat_mindie.checkpoint.tiles import as_matrix
from telechat_mindie.config import TelechatConfig

if TYPE_CHECKING:
    from telechat_mindie.checkpoint.source import Checkpoint

Read = Callable[[str, range, range], np.ndarray]
"""(Hugging Face name, rows, columns) -> that rectangle; a vector is a matrix of one column."""


class RankWeights(Mapping[str, np.ndarray]):
    """Name -> float32 array of this rank, read when it is asked for and not kept.

    Args:
        targets: the tensors that there are, see `decoder_targets`.
        read: gives what they are put together from.
    """

    def __init__(self, targets: Sequence[Target], read: Read, rank: int = 0, tp: int = 1) -> None:
        self._targets = {target.name: target for target in targets}
        self._read = read
        self._rank, self._tp = rank, tp

    def __getitem__(self, name: str) -> np.ndarray:
        target = self._targets[name]
        out = np.empty(target.rank_shape(self._tp), np.float32)
        flat, at = out.reshape(-1), 0
        for source, rows, columns in rectangles(target, self._rank, self._tp):
            array = self._read(source, rows, columns)
            flat[at : at + array.size] = (array.T if target.transposed else array).reshape(-1)
            at += array.size
        return out

    def __iter__(self) -> Iterator[str]:
        return iter(self._targets)

    def __len__(self) -> int:
        return len(self._targets)


def decoder_targets(config: TelechatConfig) -> list[Target]:
    """The parameters of the package's decoder: q/k/v and gate/up packed, experts as [experts, in, out]."""
    return mindformers_targets(config, qkv_concat=True, transposed_experts=config.is_moe)


def rectangles(target: Target, rank: int, tp: int) -> Iterator[tuple[str, range, range]]:
    """(Hugging Face name, rows, columns) of what a rank holds of a target, in the order in which it lies there."""
    for part in target.parts:
        rows, columns = split(as_matrix(part.shape), target.role.per_expert, rank, tp)
        for picked in part.pick_rows(rows):
            yield part.source, picked, columns


def checkpoint_weights(checkpoint: Checkpoint, rank: int = 0, tp: int = 1) -> RankWeights:
    """The decoder's weights of a rank from an opened checkpoint of any form."""
    reader = BlockReader(checkpoint.weights)

    def read(source: str, rows: range, columns: range) -> np.ndarray:
        return reader.read(Block(source, rows, columns, ()), np.empty(0, np.uint8))

    return RankWeights(decoder_targets(checkpoint.config), read, rank, tp)


def array_weights(
    arrays: Mapping[str, np.ndarray], targets: Sequence[Target], rank: int = 0, tp: int = 1
) -> RankWeights:
    """As `checkpoint_weights`, from whole arrays by Hugging Face name."""

    def read(source: str, rows: range, columns: range) -> np.ndarray:
        array = arrays[source]
        return array.reshape(as_matrix(array.shape))[rows.start : rows.stop, columns.start : columns.stop]

    return RankWeights(targets, read, rank, tp)


def hugging_face_weights(
    targets: Sequence[Target], ranks: Sequence[Mapping[str, np.ndarray]]
) -> Iterator[tuple[str, np.ndarray]]:
    """The inverse of `RankWeights`: (Hugging Face name, whole float32 array), weight by weight.

    Args:
        targets: of the arrays' names; those without an array, as a tied head, are left out.
        ranks: the arrays of each tensor parallel rank in turn, by target.
    """
    for target in targets:
        if target.name not in ranks[0]:
            continue
        found = {part.source: np.empty(part.shape, np.float32) for part in target.parts}
        for rank, arrays in enumerate(ranks):
            flat, at = arrays[target.name].reshape(-1), 0
            for source, rows, columns in rectangles(target, rank, len(ranks)):
                whole = found[source].reshape(as_matrix(found[source].shape))
                shape = (len(rows), len(columns))
                size = shape[0] * shape[1]
                stretch = flat[at : at + size]
                stretch = stretch.reshape(shape[::-1]).T if target.transposed else stretch.reshape(shape)
                whole[rows.start : rows.stop, columns.start : columns.stop] = stretch
                at += size
        yield from found.items()
