"""A training checkpoint divided over ranks in another way, or over none: every tensor, its optimizer's state too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from telechat_mindie.checkpoint.copying import Copier, Progress
from telechat_mindie.checkpoint.distributed import scatter
from telechat_mindie.checkpoint.formats.containers import CONTAINERS
from telechat_mindie.checkpoint.formats.strategy import read_strategy
from telechat_mindie.checkpoint.mapping import training_state
from telechat_mindie.checkpoint.source import config_beside
from telechat_mindie.checkpoint.stream import check_space
from telechat_mindie.checkpoint.training_run import RunChoice, find_run
from telechat_mindie.errors import CheckpointError
from telechat_mindie.reading import existing_path
from telechat_mindie.staging import StagedDirectory


@dataclass(frozen=True, kw_only=True)
class Redistribution:
    """What a person may choose.

    Attributes:
        choice: which checkpoint of the run, and its strategy.
        strategy: of the ranks to write; None: everything in one file.
        training_state: keep the optimizer's state, counters and buffers.
        container: "ckpt" or "safetensors".
        ranks: write a rank folder even for one rank.
        file: name of a rank's file without suffix, by `{rank}`.
    """

    choice: RunChoice = field(default_factory=RunChoice)
    strategy: Path | None = None
    training_state: bool = True
    container: str = "ckpt"
    ranks: bool = False
    file: str = "checkpoint_{rank}"
    force: bool = False


@dataclass(frozen=True)
class Redistributed:
    """What came of it: `kind` is that of the source."""

    kind: str
    ranks: int
    tensors: int
    nbytes: int


def redistribute(
    source: Path,
    output: Path,
    options: Redistribution,
    config_dir: Path | None = None,
    on_start: Callable[[int], Progress] | None = None,
) -> Redistributed:
    """Write the checkpoint `source`, whole or of a run's ranks, as one file or for the ranks of another strategy.

    Names, shapes, dtypes and bits stay as they are.

    Args:
        config_dir: where config.json is, if not beside the weights; needed where the ranks come without a strategy.

    Raises:
        InputError, CheckpointError: as `find_run`, `TrainingRun.whole` and `scatter`.
        OutputError: the output exists or cannot be written.
    """
    run = find_run(source, options.choice, certain=True)
    config = config_beside(source, config_dir) if run.needs_config else None
    tensors = run.whole(config, weights_only=not options.training_state)
    if not any(training_state(name) is None for name in tensors):
        raise CheckpointError("holds no weights", where=source)
    if options.strategy is not None:
        existing_path(options.strategy, "strategy")
        ranks = scatter(read_strategy([options.strategy]), tensors, options.strategy)
    else:
        ranks = [tensors]
    single = options.strategy is None and not options.ranks
    container = CONTAINERS[options.container]
    nbytes = sum(tensor.nbytes for held in ranks for tensor in held.values())
    progress = on_start(nbytes) if on_start else None
    with StagedDirectory(output, replace=options.force, marker="rank_0", single_file=single) as staged:
        check_space(staged.path, nbytes)
        with Copier(staged.path, progress) as copier:
            names = []
            for rank, held in enumerate(ranks):
                names.append(f"rank_{rank}/{options.file.format(rank=rank)}{container.suffix}")
                copier.write(names[-1], list(held.values()), container)
            copier.finish()
        if single:
            staged.commit_file(names[0])
        else:
            staged.commit()
    return Redistributed(run.kind, len(ranks), len(tensors), nbytes)
