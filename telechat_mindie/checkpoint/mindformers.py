"""The mindformers form of a checkpoint: .ckpt or safetensors, whole or in rank_N folders, kv_concat or qkv_concat.

It is whatever mindformers' convert_weight.py, convert_gmm.py and transform_ckpt.py make, or this package.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from telechat_mindie.checkpoint.blocks import blocks
from telechat_mindie.checkpoint.formats.mindspore import read_mindspore_ckpt
from telechat_mindie.checkpoint.formats.safetensors import read_safetensors
from telechat_mindie.checkpoint.formats.tensors import StoredTensor, read_files
from telechat_mindie.checkpoint.mapping import (
    MINDFORMERS_NAME,
    Target,
    differences,
    mindformers_targets,
    training_state,
    weights,
)
from telechat_mindie.checkpoint.sharding import Role
from telechat_mindie.checkpoint.tiles import Tile, TiledWeight, as_matrix, float_dtype
from telechat_mindie.config import MAX_RANKS, TelechatConfig
from telechat_mindie.errors import CheckpointError, name_some
from telechat_mindie.foreign import ADAPTER_FILES, refuse_foreign

Ranks = Sequence[Mapping[str, StoredTensor]]
"""Each rank's tensors by mindformers name; a whole checkpoint is one rank."""


def is_mindformers(names: Iterable[str]) -> bool:
    """Whether tensors have mindformers' names."""
    return any(MINDFORMERS_NAME.match(name) for name in names)


def read_ranks(path: Path) -> list[dict[str, StoredTensor]] | None:
    """The weights of a file, of a folder's files, or of its rank_0 .. rank_N folders; None where there are none.

    Raises:
        CheckpointError: a rank folder is missing or empty, or a file is damaged or hostile.
    """
    if folders := rank_folders(path):
        return [read_files(weight_files(folder), read_weights, folder) for folder in folders]
    if path.is_file():
        return [read_weights(path, path.parent)]
    files = files_of(path)
    if len(files) > 1:
        refuse_foreign("rank file", (file.name for file in files), path, CheckpointError)
    return [read_files(files, read_weights, path)] if files else None


def rank_folders(path: Path) -> list[Path]:
    """The folders rank_0 .. rank_N, or none. Raises CheckpointError where one between is missing."""
    folders = {int(entry.name[5:]): entry for entry in path.glob("rank_*") if entry.name[5:].isdecimal()}
    count = max(folders, default=-1) + 1
    missing = [f"rank_{rank}" for rank in range(min(count, MAX_RANKS)) if rank not in folders]
    if missing or count > MAX_RANKS:
        raise CheckpointError(f"rank folders are missing: {name_some(missing)}", where=path)
    return [folders[rank] for rank in range(count)]


def weight_files(folder: Path) -> list[Path]:
    """A rank folder's files. Raises CheckpointError where there are none."""
    files = files_of(folder)
    if not files:
        raise CheckpointError("holds no .ckpt or .safetensors file", where=folder)
    return files


def read_file(file: Path, root: Path) -> dict[str, StoredTensor]:
    """Everything in a file. Raises CheckpointError where it is damaged or hostile."""
    return read_safetensors(file, root) if file.suffix == ".safetensors" else read_mindspore_ckpt(file, root)


def read_weights(file: Path, root: Path) -> dict[str, StoredTensor]:
    """The weights in a file, as `read_file`."""
    return {name: tensor for name, tensor in read_file(file, root).items() if training_state(name) is None}


def files_of(folder: Path) -> list[Path]:
    """The weight files that lie in a folder, but for an adapter's."""
    files = (entry for entry in folder.iterdir() if entry.suffix in (".ckpt", ".safetensors"))
    return sorted(file for file in files if file.name not in ADAPTER_FILES)


@dataclass(frozen=True)
class Form:
    """What a mindformers checkpoint's tensors are: packed or not, experts for the grouped matmul or not."""

    qkv_concat: bool
    transposed_experts: bool
    targets: tuple[Target, ...]


def tiled_weights(ranks: Ranks, form: Form, config: TelechatConfig, where: Path) -> dict[str, TiledWeight]:
    """Every weight that the config asks for, put together from the ranks' tensors.

    Raises:
        CheckpointError: names, shapes or dtypes do not fit the config and the number of ranks.
    """
    _check_ranks(ranks, form.targets, where)
    return put_together(ranks, form.targets, config)


def put_together(ranks: Ranks, targets: Sequence[Target], config: TelechatConfig) -> dict[str, TiledWeight]:
    """Every weight that the config asks for, from the targets that were made of them, which all are there.

    Raises:
        CheckpointError: a dtype that weights do not have.
    """
    tiles: dict[str, list[Tile]] = {}
    dtypes: dict[str, str] = {}
    for target in targets:
        for source, tile in _tiles(target, ranks):
            tiles.setdefault(source, []).append(tile)
            dtypes[source] = float_dtype(target.name, tile.stored)
    shapes = {weight.name: as_matrix(weight.shape) for weight in weights(config).values()}
    return {name: TiledWeight(dtypes[name], shape, tuple(tiles[name])) for name, shape in shapes.items()}


def _tiles(target: Target, ranks: Ranks) -> Iterator[tuple[str, Tile]]:
    """Where each part of a target's sources lies in the ranks' tensors: the converter's own blocks, read backwards."""
    row = [0] * len(ranks)
    for block in blocks(target, len(ranks)):
        shares = block.shares[:1] if target.role is Role.REPLICATED else block.shares
        for rank, columns in shares:
            lines, width = len(block.rows), len(columns)
            if block.transposed:
                lines, width = width, lines
            stored = ranks[rank][target.name]
            yield block.source, Tile(stored, block.rows, columns, width, row[rank], block.transposed)
            row[rank] += lines


def recognise(stored: Mapping[str, StoredTensor], config: TelechatConfig, tp: int) -> Form:
    """The form that a rank's tensors are in.

    Raises:
        ConfigError: the model cannot be split into `tp` ranks.
        CheckpointError: the experts' shapes do not tell which.
    """
    config.check_tp(tp)
    packed = any(name.endswith(".attention.w_qkv.weight") for name in stored)
    forms = [
        Form(packed, transposed, tuple(mindformers_targets(config, qkv_concat=packed, transposed_experts=transposed)))
        for transposed in ((True, False) if config.is_moe else (False,))
    ]
    if len(forms) == 1:
        return forms[0]
    name = "model.layers.0.feed_forward.ffn.w1.weight"
    shapes = [next(t.rank_shape(tp) for t in form.targets if t.name == name) for form in forms]
    if shapes[0] == shapes[1]:
        raise CheckpointError(
            "does not show whether the experts are stored for the grouped matmul: both ways have the same shape",
            where=name,
            found=list(shapes[0]),
        )
    return forms[0] if name in stored and stored[name].shape == shapes[0] else forms[1]


def _check_ranks(ranks: Ranks, targets: Sequence[Target], where: Path) -> None:
    tp = len(ranks)
    expected = {target.name: target.rank_shape(tp) for target in targets}
    everywhere = set().union(*ranks)
    for rank, stored in enumerate(ranks):
        place = f"{where}, rank {rank}" if tp > 1 else str(where)
        refuse_foreign("tensor", stored, place, CheckpointError)
        if lacking := everywhere - stored.keys():
            raise CheckpointError(
                f"lacks weights that other ranks hold, as in a run with pipeline stages: {name_some(lacking)}",
                where=place,
                advice="Name the run's strategy files: --strategy output/strategy.",
            )
        for _, clause in differences({name: tensor.shape for name, tensor in stored.items()}, expected):
            raise CheckpointError(
                clause, where=place, advice="A rank folder is missing, or the config belongs to another model."
            )
        for name, tensor in stored.items():
            if tensor.dtype != ranks[0][name].dtype:
                raise CheckpointError(
                    f"{name} has another dtype than in rank 0",
                    where=place,
                    expected=ranks[0][name].dtype,
                    found=tensor.dtype,
                )


def infer_config(ranks: Ranks, where: Path, head_dim: int = 128) -> TelechatConfig:
    """The model's shape from its tensors, for a checkpoint that comes without config.json.

    Args:
        head_dim: 128 in every released model; the tensors do not tell it. Neither do they tell how many experts a
            token uses, which conversion does not need; the published 4 is taken.

    Raises:
        CheckpointError: a tensor that must be there is not, or the sizes do not fit each other.
    """
    stored, tp = ranks[0], len(ranks)

    def shape(name: str) -> tuple[int, ...]:
        if name not in stored:
            raise CheckpointError("weight is missing", where=f"{where}: {name}", advice="Name a config.json.")
        return stored[name].shape

    hidden = shape("model.norm_out.weight")[0]
    layer = "model.layers.0."
    cut_for = hidden // max(1, shape(layer + "attention.wo.weight")[1])
    if cut_for != tp:
        raise CheckpointError(
            "number of rank folders does not fit the weights' shapes", where=where, expected=cut_for, found=tp
        )
    if hidden % head_dim:
        raise CheckpointError(
            f"hidden size is no multiple of {head_dim}", where=where, found=hidden, advice="Name a config.json."
        )
    packed, router = layer + "attention.w_qkv.weight", layer + "feed_forward.router.dense.weight"
    kv_rows = tp * (shape(packed)[0] if packed in stored else shape(layer + "attention.wk_v.weight")[0])
    experts = shape(router)[0] if router in stored else 0
    if experts:
        per_rank = set(shape(layer + "feed_forward.ffn.w1.weight")[1:]) - {hidden} or {hidden}
        ffn = tp * per_rank.pop()
    else:
        ffn = tp * shape(layer + "feed_forward.w2.weight")[1]
    return TelechatConfig(
        vocab_size=tp * shape("model.tok_embeddings.embedding_weight")[0],
        hidden_size=hidden,
        num_layers=1 + max(int(match[1]) for name in stored if (match := re.match(r"model\.layers\.(\d+)\.", name))),
        num_heads=hidden // head_dim,
        ffn_size=ffn,
        num_kv_heads=(kv_rows - (hidden if packed in stored else 0)) // 2 // head_dim,
        num_experts=experts,
        experts_per_token=min(4, experts),
    )
