"""What a training run of mindformers leaves: the checkpoints of its ranks, step by step, and their strategy files.

    output/checkpoint/rank_N/{prefix}_rank_N-{epoch}_{step}.ckpt      also checkpoint_network; .safetensors
    output/strategy/ckpt_strategy_rank_N.ckpt                         also .json, or one merged file

The ranks of several machines lie in a folder of each. Files that tools renamed, such as rank_N/checkpoint_N.ckpt, and
those of all ranks in one folder are taken too (mindformers/core/callback/callback.py, CheckpointMonitor).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, overload

from telechat_mindie.checkpoint.distributed import gather, part_by_part
from telechat_mindie.checkpoint.formats.strategy import Strategy, read_strategy
from telechat_mindie.checkpoint.formats.strategy_layout import MAX_RUN_RANKS
from telechat_mindie.checkpoint.formats.tensors import StoredTensor, TensorReader, read_files
from telechat_mindie.checkpoint.inferred import PACKED, infer_strategy
from telechat_mindie.checkpoint.mapping import training_state
from telechat_mindie.checkpoint.mindformers import files_of, read_file, weight_files
from telechat_mindie.config import TelechatConfig
from telechat_mindie.errors import CheckpointError, InputError, name_some
from telechat_mindie.reading import existing_path

Step = tuple[int, int]
"""Epoch, and step of the epoch, as they stand in a file's name."""

_STEP = re.compile(r".+-(\d{1,9})_(\d{1,9})(?:_breakpoint)?\.(?:ckpt|safetensors)")
_RANK_FOLDER = re.compile(r"rank_(\d{1,9})")
_RANK_FILE = re.compile(r"(?:.*_)?rank_(\d{1,9})(?:[-_].*)?\.(?:ckpt|safetensors)")
_RANK_ENTRY = re.compile(f"{_RANK_FOLDER.pattern}|{_RANK_FILE.pattern}")


@dataclass(frozen=True)
class RunChoice:
    """Which checkpoint of which run.

    Attributes:
        strategy: a strategy file, or the folder of them; None: `strategy` beside the ranks' folder.
        step: as `EPOCH_STEP`, or a step alone where one epoch has it; None: the newest.
        sources: more folders of the same run, as of other machines.
        packed_by_rank: packed weights lie rank by rank, each packed from its rank's share; see `TrainingRun.weights`.
    """

    strategy: Path | None = None
    step: str | None = None
    sources: tuple[Path, ...] = ()
    packed_by_rank: bool = False

    def __bool__(self) -> bool:
        return self != RunChoice()


@dataclass(frozen=True)
class TrainingRun:
    """One step of a run.

    Attributes:
        path: the folder that was named first.
        files: by rank.
        strategies: files and folders; none where none were found.
        step: None where the files' names have none.
        steps: all that every rank has, in order.
        packed_by_rank: as in `RunChoice`.
    """

    path: Path
    files: Mapping[int, Sequence[Path]]
    strategies: tuple[Path, ...]
    step: Step | None
    steps: tuple[Step, ...]
    packed_by_rank: bool = False

    @property
    def kind(self) -> str:
        step = f", step {spelled(self.step)}" if self.step else ""
        return f"mindformers training, {len(self.files)} rank{'s' if len(self.files) > 1 else ''}{step}"

    @cached_property
    def strategy(self) -> Strategy | None:
        """As its files say; None without any.

        Raises:
            CheckpointError: as `read_strategy`; or ranks that it names are missing.
        """
        strategy = read_strategy(self.strategies) if self.strategies else None
        count = strategy.ranks if strategy else max(self.files) + 1
        if missing := [f"rank_{rank}" for rank in range(count) if rank not in self.files]:
            raise CheckpointError(
                f"{len(missing)} of the run's {count} ranks are missing: {name_some(missing)}",
                where=self.path,
                advice="Name other machines' folders with --source; or the strategy is that of another run.",
            )
        return strategy

    @property
    def needs_config(self) -> bool:
        """Whether nothing but the model's shape can tell how the ranks divide it."""
        return self.strategy is None and len(self.files) > 1

    def read(self, *, weights_only: bool = False) -> list[dict[str, StoredTensor]]:
        """Each rank's tensors.

        Args:
            weights_only: leave out the optimizer's state, counters and buffers.

        Raises:
            CheckpointError: a file is damaged, or the ranks' counters say different steps.
        """
        ranks = []
        with TensorReader() as reader:
            counters: dict[str, tuple[int, bytes]] = {}
            for rank in sorted(self.files):
                files = self.files[rank]
                tensors = read_files(files, read_file, files[0].parent)
                for name in _STEP_COUNTERS & tensors.keys():
                    value = reader.load(tensors[name]).tobytes()
                    first, wanted = counters.setdefault(name, (rank, value))
                    if value != wanted:
                        listed = [int.from_bytes(number, "little") for number in (wanted, value)]
                        raise CheckpointError(
                            f"ranks are at different steps: {name} is {listed[0]} in rank {first} and {listed[1]} in "
                            f"rank {rank}",
                            where=self.path,
                            advice="Take a step that all ranks have saved.",
                        )
                if weights_only:
                    tensors = {n: tensor for n, tensor in tensors.items() if training_state(n) is None}
                ranks.append(tensors)
        return ranks

    def whole(self, config: TelechatConfig | None, *, weights_only: bool = False) -> dict[str, StoredTensor]:
        """Every tensor of the run, put together from the ranks' pieces.

        Args:
            config: looked at only where `needs_config`.

        Raises:
            CheckpointError: as `read` and `gather`; or there is no strategy file, and the shapes leave doubt.
        """
        strategy = self.strategy  # first, as it says which ranks are missing
        ranks = self.read(weights_only=weights_only)
        if len(ranks) == 1 and strategy is None:
            return ranks[0]
        return gather(strategy or infer_strategy(ranks, config, self.path), ranks, self.path)

    @property
    def packed_ranks(self) -> int:
        """Over how many ranks tensor parallelism cuts packed weights; 1 where it does not."""
        stages = self.strategy.stages if self.strategy else ()
        return max((cut.cuts[0] for stage in stages for name, cut in stage.items() if name.endswith(PACKED)), default=1)

    def weights(self, config: TelechatConfig | None) -> dict[str, StoredTensor]:
        """The weights alone, as `whole`; packed ones in the order that `choice` says.

        With tensor parallelism the graph that mindformers compiles splits each rank's own rows of w_qkv into its q, k
        and v (`skip_redistribution`; SplitWithSizeInfo::ReplaceNodeInputOrAttrs in MindSpore's split_info.cc), so that
        ranks which were packed one by one hold [q0 k0 v0 q1 k1 v1]. The strategy says [q k v], cut across.

        Raises:
            CheckpointError: as `whole`.
            InputError: `packed_by_rank`, and no packed weight is cut.
        """
        weights = self.whole(config, weights_only=True)
        if self.packed_by_rank:
            if self.packed_ranks == 1:
                raise InputError("the run cuts no packed weights over its ranks", where="--packed-by-rank")
            weights |= {n: part_by_part(t, self.packed_ranks) for n, t in weights.items() if n.endswith(PACKED)}
        return weights


@overload
def find_run(path: Path, choice: RunChoice, *, certain: Literal[True]) -> TrainingRun: ...
@overload
def find_run(path: Path, choice: RunChoice) -> TrainingRun | None: ...
def find_run(path: Path, choice: RunChoice, *, certain: bool = False) -> TrainingRun | None:
    """The training run at `path`; None where it is something else: its files have no step in their names.

    Args:
        path: the run's output folder, the folder of its rank folders, or a file of a single rank.
        certain: it is one whatever the names are, as it is where `choice` says anything.

    Raises:
        CheckpointError: the ranks do not have the same step, or hold several checkpoints of it; or it is certain that
            there is a run, and there are no files.
        InputError: a step that there is not.
    """
    files: dict[int, list[Path]] = {}
    folders = [_ranks_folder(existing_path(source, "checkpoint")) for source in (path, *choice.sources)]
    for folder in folders:
        for rank, found in _files_by_rank(folder).items():
            if rank in files:
                raise CheckpointError(
                    f"rank {rank} is in two folders",
                    where=files[rank][0],
                    found=found[0],
                    advice="Name one of the two.",
                )
            files[rank] = found
    by_step = {rank: _by_step(found) for rank, found in files.items()}
    stepped = any(by_step.values()) and not path.is_file()
    if not (stepped or certain or choice):
        return None
    if not files:
        raise CheckpointError("holds no .ckpt or .safetensors file of a training run", where=path)
    if max(files) >= MAX_RUN_RANKS:
        raise CheckpointError("has too many ranks", where=path, expected=f"at most {MAX_RUN_RANKS}", found=max(files))
    strategies: tuple[Path, ...] = ()
    if choice.strategy is not None:
        strategies = (existing_path(choice.strategy, "strategy"),)
    elif stepped:
        beside = [place for folder in folders for place in (folder.parent / "strategy", folder / "strategy")]
        strategies = tuple(dict.fromkeys(place for place in beside if place.is_dir() and any(place.iterdir())))
    if not any(by_step.values()):
        if choice.step is not None:
            raise InputError("the files' names have no steps", where="--step", found=choice.step)
        return TrainingRun(path, files, strategies, None, (), choice.packed_by_rank)
    step, steps = _choose(by_step, choice.step, path)
    chosen = {rank: _one(found[step]) for rank, found in by_step.items()}
    return TrainingRun(path, chosen, strategies, step, steps, choice.packed_by_rank)


def counter_values(tensors: Mapping[str, StoredTensor]) -> dict[str, int | float]:
    """The run's counters of one number, such as global_step, by name."""
    with TensorReader() as reader:
        return {
            name: reader.load(tensor).item()
            for name, tensor in tensors.items()
            if training_state(name) == "counter" and math.prod(tensor.shape) == 1
        }


def spelled(step: Step | None) -> str:
    """A step as options and files' names have it."""
    return f"{step[0]}_{step[1]}" if step else "none"


_STEP_COUNTERS = {"global_step", "epoch_num", "step_num"}


def _ranks_folder(path: Path) -> Path:
    """`path`, or the folder in it that has the ranks' checkpoints."""
    for folder in (path, path / "checkpoint", path / "checkpoint_network"):
        if folder.is_dir() and any(_RANK_ENTRY.fullmatch(entry.name) for entry in folder.iterdir()):
            return folder
    return path


def _files_by_rank(folder: Path) -> dict[int, list[Path]]:
    if folder.is_file():
        return {0: [folder]}
    ranks = {int(match[1]): e for e in folder.iterdir() if (match := _RANK_FOLDER.fullmatch(e.name)) and e.is_dir()}
    if ranks:
        return {rank: weight_files(ranks[rank]) for rank in sorted(ranks)}
    files: dict[int, list[Path]] = {}
    for file in files_of(folder):
        match = _RANK_FILE.fullmatch(file.name)
        files.setdefault(int(match[1]) if match else 0, []).append(file)
    return dict(sorted(files.items()))


def _by_step(files: Iterable[Path]) -> dict[Step, list[Path]]:
    """Files by the step in their names. Raises CheckpointError where some have one and others do not."""
    steps: dict[Step, list[Path]] = {}
    others = []
    for file in files:
        if match := _STEP.fullmatch(file.name):
            steps.setdefault((int(match[1]), int(match[2])), []).append(file)
        else:
            others.append(file)
    if steps and others:
        raise CheckpointError(
            "lies among the checkpoints of a training run, and its name has no step",
            where=others[0],
            advice="Leave one checkpoint in the folder.",
        )
    return steps


def _choose(
    by_step: Mapping[int, Mapping[Step, object]], wanted: str | None, path: Path
) -> tuple[Step, tuple[Step, ...]]:
    """The step to take, and all that every rank has."""
    common = sorted(set.intersection(*(set(steps) for steps in by_step.values())))
    advice = f"Every rank has {name_some(map(spelled, common))}." if common else "No step is in every rank."
    if wanted is None:
        newest = {rank: max(steps, default=None) for rank, steps in by_step.items()}
        if len(set(newest.values())) > 1:
            first = min(newest)
            other = next(rank for rank in newest if newest[rank] != newest[first])
            found = f"{spelled(newest[first])} in rank_{first}, {spelled(newest[other])} in rank_{other}"
            if common:
                advice += f" Take one: --step {spelled(common[-1])}."
            raise CheckpointError("ranks are at different steps", where=path, found=found, advice=advice)
        return common[-1], tuple(common)
    every = sorted(set().union(*by_step.values()))
    matching = [step for step in every if wanted in (spelled(step), str(step[1]))]
    exact = [step for step in matching if spelled(step) == wanted] or matching
    if len(exact) != 1:
        found = f"{wanted}, which {'several epochs have' if exact else 'no rank has'}"
        raise InputError("is not one of the steps", where="--step", expected="EPOCH_STEP", found=found, advice=advice)
    if lacking := [f"rank_{rank}" for rank, steps in by_step.items() if exact[0] not in steps]:
        raise CheckpointError(f"step {spelled(exact[0])} is missing in {name_some(lacking)}", where=path, advice=advice)
    return exact[0], tuple(common)


def _one(files: Sequence[Path]) -> Sequence[Path]:
    if len(files) > 1:
        raise CheckpointError(
            "is one of several files of the same step",
            where=files[0],
            found=name_some(file.name for file in files),
            advice="Leave the one of the run in the folder.",
        )
    return files
