"""A training run's parallel strategy, from the files that MindSpore leaves of it; without MindSpore."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from telechat_mindie.checkpoint.formats.bounds import open_bounded
from telechat_mindie.checkpoint.formats.strategy_file import KIND, parse_json_form, parse_protobuf
from telechat_mindie.checkpoint.formats.strategy_layout import MAX_RUN_RANKS, Stage
from telechat_mindie.errors import CheckpointError, name_some

MAX_FILE_BYTES = 64 << 20
"""Of a strategy file. One of the 115B has about 300 KB."""


@dataclass(frozen=True)
class Strategy:
    """How a whole run divides its parameters: `stages[s]` are the layouts of ranks s * n .. s * n + n - 1."""

    stages: tuple[Stage, ...]

    @property
    def stage_ranks(self) -> int:
        """Ranks of each stage."""
        return next(iter(self.stages[0].values())).ranks

    @property
    def ranks(self) -> int:
        return len(self.stages) * self.stage_ranks

    @property
    def most_cuts(self) -> int:
        """The most parts that any parameter is cut into by tensor or expert parallelism."""
        return max(math.prod(layout.cuts) for stage in self.stages for layout in stage.values())

    @property
    def most_shards(self) -> int:
        """The most parts that optimizer parallelism cuts any parameter into."""
        return max(layout.shards for stage in self.stages for layout in stage.values())


def read_strategy(paths: Sequence[Path]) -> Strategy:
    """The strategy that files of one run make up together: a merged one, or those of its ranks, which repeat.

    Args:
        paths: files, and folders of files.

    Raises:
        CheckpointError: there are none, one is damaged, a stage is missing, or they are of different runs.
        ConfigError: a .json file is none.
    """
    stages: dict[int, tuple[Stage, Path]] = {}
    seen: set[bytes] = set()
    for file in (file for path in paths for file in strategy_files(path)):
        with open_bounded(file) as opened:
            if opened.size > MAX_FILE_BYTES:
                raise CheckpointError(f"is no {KIND}: it is too large", where=file, found=f"{opened.size} bytes")
            content = opened.read(0, opened.size)
            digest = hashlib.sha256(content).digest()
            if digest in seen:  # every rank of a stage writes the same
                continue
            seen.add(digest)
            found = parse_json_form(content, file) if file.suffix == ".json" else parse_protobuf(opened)
        for number, layouts in found.items():
            known, first = stages.setdefault(number, (layouts, file))
            if known != layouts:
                raise CheckpointError(
                    f"differs from the strategy of the same stage in {first}",
                    where=file,
                    advice="They are of different runs; leave the files of one in the folder.",
                )
    return _whole({number: stage for number, (stage, _) in stages.items()}, paths)


def strategy_files(path: Path) -> list[Path]:
    """`path` itself, or a folder's files: .ckpt, or else .json. Raises CheckpointError where there are none."""
    if not path.is_dir():
        return [path]
    files = sorted(path.glob("*.ckpt")) or sorted(path.glob("*.json"))
    if not files:
        raise CheckpointError(f"holds no {KIND}", where=path, expected="ckpt_strategy_rank_N.ckpt or .json")
    return files


def _whole(stages: Mapping[int, Stage], paths: Sequence[Path]) -> Strategy:
    where = " and ".join(str(path) for path in paths[:2])
    if missing := set(range(max(stages) + 1)) - stages.keys():
        ranks = next(iter(stages[max(stages)].values())).ranks
        raise CheckpointError(
            f"the strategy of pipeline stages is missing: {name_some(missing)}",
            where=where,
            advice=f"Add the file of any rank of it, such as ckpt_strategy_rank_{min(missing) * ranks}.ckpt.",
        )
    strategy = Strategy(tuple(stages[number] for number in sorted(stages)))
    for number, stage in enumerate(strategy.stages):
        for name, layout in stage.items():
            if layout.ranks != strategy.stage_ranks:
                raise CheckpointError(
                    "is not divided over the ranks that other parameters are divided over",
                    where=f"{where}: {name} of stage {number}",
                    expected=strategy.stage_ranks,
                    found=layout.ranks,
                )
    if strategy.ranks > MAX_RUN_RANKS:
        raise CheckpointError("is for too many ranks", where=where, expected=f"at most {MAX_RUN_RANKS}")
    return strategy
