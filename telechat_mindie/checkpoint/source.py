"""A checkpoint as a lazy `name -> weight` view under Hugging Face names, whatever its files are."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from telechat_mindie.checkpoint import hugging_face, mindformers
from telechat_mindie.checkpoint.adapters.adapter import Adapter, parse_adapter, read_adapter, without_factors
from telechat_mindie.checkpoint.adapters.factors import check_memory
from telechat_mindie.checkpoint.tiles import TiledWeight
from telechat_mindie.checkpoint.training_run import RunChoice, find_run
from telechat_mindie.config import TelechatConfig
from telechat_mindie.dtypes import DTYPES
from telechat_mindie.errors import CheckpointError
from telechat_mindie.foreign import refuse_foreign
from telechat_mindie.reading import existing_path


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose every weight is accounted for.

    Attributes:
        config_dir: where config.json is, or would be.
        kind: what the files are, for messages and manifests.
        weights: by Hugging Face name.
        ranks: number of rank_N folders; 0 for a whole checkpoint.
        qkv_concat: MindSpore weights with q, k, v and gate, up packed.
        transposed_experts: MindSpore experts stored for the grouped matmul.
        adapters: what is added to the weights where they are read.
        note: what a person should know of how it was read.
    """

    path: Path
    config_dir: Path
    kind: str
    config: TelechatConfig
    weights: Mapping[str, TiledWeight]
    ranks: int = 0
    qkv_concat: bool = False
    transposed_experts: bool = False
    adapters: tuple[Adapter, ...] = ()
    note: str = ""

    @property
    def folders(self) -> tuple[Path, ...]:
        """Where the tokenizer's and other files may be: beside the weights, or beside config.json."""
        return tuple(dict.fromkeys((_folder(self.path), self.config_dir)))

    @property
    def dtype(self) -> str:
        """The dtype that most of the weights' elements have."""
        sizes: dict[str, int] = {}
        for weight in self.weights.values():
            sizes[weight.dtype] = sizes.get(weight.dtype, 0) + weight.elements
        return max(sizes, key=lambda dtype: sizes[dtype])

    @property
    def source_bytes(self) -> int:
        return sum(weight.elements * DTYPES[weight.dtype].itemsize for weight in self.weights.values())


class NoWeightsError(CheckpointError):
    """A folder has a config.json and no weights, nor what is known in their place."""


def open_checkpoint(
    path: Path, config_dir: Path | None = None, adapters: Sequence[str | Path] = (), choice: RunChoice | None = None
) -> Checkpoint:
    """Recognise and index the checkpoint at `path`, a directory or a MindSpore file; only headers are read.

    Args:
        config_dir: where config.json is; by default beside the weights. A MindSpore checkpoint can do without.
        choice: which step of a training run that lies there, and by which strategy.
        adapters: LoRA adapters to merge, each as for `parse_adapter`; `read_adapter` reads them whole.

    Raises:
        InputError: nothing is there, or a pipe or device.
        ConfigError: config.json is missing or not TeleChat2's.
        NoWeightsError: there are none.
        CheckpointError: a form that is not read, a damaged or hostile file, or names, shapes or dtypes that do not fit
            the config.
    """
    named = [parse_adapter(given) for given in adapters]
    model = _open_model(path, config_dir, {adapter.resolve() for adapter, _ in named}, choice or RunChoice())
    weights = dict(model.weights)
    read = tuple(read_adapter(adapter, scale, model.config, path) for adapter, scale in named)
    for adapter in read:
        for name, delta in adapter.deltas.items():
            weights[name] = replace(weights[name], deltas=(*weights[name].deltas, delta))
            check_memory(weights[name].deltas, f"adapters of {name}")
    return replace(model, weights=weights, adapters=read)


def config_beside(path: Path, config_dir: Path | None) -> TelechatConfig | None:
    """The config.json in `config_dir`, by default in the folder of the weights at `path`; None where there is none.

    Raises:
        ConfigError: it is malformed or not TeleChat2's.
    """
    folder = config_dir or _folder(path)
    return TelechatConfig.from_directory(folder) if (folder / "config.json").exists() else None


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _open_model(path: Path, config_dir: Path | None, adapters: Container[Path], choice: RunChoice) -> Checkpoint:
    if existing_path(path, "checkpoint").is_file():
        _refuse_foreign_files(path)
    # A config.json of another model says more than its weights' names, or dtypes that no file of ours has.
    config = config_beside(path, config_dir)
    config_dir = config_dir or _folder(path)
    run = find_run(path, choice)
    kind, stored = ("", {}) if run else hugging_face.read_stored(path)
    if stored and not mindformers.is_mindformers(stored):
        config = config or TelechatConfig.from_directory(config_dir)
        return Checkpoint(path, config_dir, kind, config, hugging_face.tiled_weights(stored, config, path))
    ranks = [run.weights(config)] if run else mindformers.read_ranks(path)
    if ranks is None:
        _refuse_foreign_files(path)
        TelechatConfig.from_directory(config_dir)
        raise NoWeightsError(
            "holds no weights that are recognised",
            where=path,
            expected="*.safetensors, pytorch_model*.bin, *.ckpt or rank_N folders",
        )
    ranks = [without_factors(stored, path, adapters) for stored in ranks]
    config = config or mindformers.infer_config(ranks, path)
    form = mindformers.recognise(ranks[0], config, len(ranks))
    by_rank = run is None and path.is_dir() and (path / "rank_0").is_dir()
    kind = f"MindSpore, {len(ranks)} ranks" if by_rank else "MindSpore"
    return Checkpoint(
        path,
        config_dir,
        run.kind if run else kind,
        config,
        mindformers.tiled_weights(ranks, form, config, path),
        ranks=len(ranks) if by_rank else 0,
        qkv_concat=form.qkv_concat,
        transposed_experts=form.transposed_experts,
        note=_PACKED_NOTE if run and run.packed_ranks > 1 and not choice.packed_by_rank else "",
    )


_PACKED_NOTE = (
    "The run cut packed weights (w_qkv, w_gate_hidden) over its ranks; they are read as one [q k v], as its strategy "
    "says. If each rank's were packed from the rank's own q, k and v, as convert_weight.py packs rank folders, add "
    "--packed-by-rank."
)


def _refuse_foreign_files(path: Path) -> None:
    """Raises CheckpointError where a file, or a folder without weights of ours, is of a form that `foreign` names."""
    names = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else [path.name]
    refuse_foreign("file", names, path, CheckpointError)
