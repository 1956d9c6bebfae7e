"""Checkpoints of a run: whole or not there at all, checked when they are read, the newest few kept.

    checkpoints/step-00000200/run.json          what the run was told, how far it is, and the sha256 of each file
    checkpoints/step-00000200/rank_0.safetensors    the state of one rank, arrays by name; rank_1 ... beside it

Every rank writes its file into a hidden neighbour of the folder and says with a second file that it is done; the first
rank waits for all of them and gives the folder its name.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from telechat_mindie.checkpoint.formats.containers import SAFETENSORS
from telechat_mindie.errors import CheckpointError, OutputError
from telechat_mindie.reading import read_json
from telechat_mindie.staging import DIR_MODE, dump_json, reporting_os_errors, sync_directory, write_file
from telechat_mindie.training.arrays import StoredArrays, write_arrays

FACTS = "run.json"

PEER_SECONDS = 1800.0
"""For the other ranks' files: as long as a slow disk takes for tens of gigabytes."""

_STEP = re.compile(r"step-(\d{8,})")
_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Facts:
    """What a checkpoint says beside its arrays.

    Attributes:
        step: steps that are done.
        epoch, row: of the data, the next to be trained on, from 0.
        ranks: processes that hold a part of the state each.
        settings: all that decides the result, by the name that a person knows it by. The random state is among it: the
            order of the rows and the first LoRA factors follow from the seed, and nothing else is drawn.
        files: of each rank, by name.
    """

    step: int
    epoch: int
    row: int
    ranks: int
    settings: Mapping[str, Any]
    files: Mapping[str, Mapping[str, Any]]


class Checkpoints:
    """The checkpoints of the run in `folder`.

    Args:
        folder: made if it is not there.
        keep: how many of the newest stay.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder = folder
        self._keep = keep

    def clean(self) -> None:
        """Remove what a killed run left unfinished. Not while another process writes."""
        with reporting_os_errors(self._folder):
            self._folder.mkdir(mode=DIR_MODE, exist_ok=True)
            for path in self._folder.glob(".step-*"):
                shutil.rmtree(path)

    def steps(self) -> list[int]:
        """Of the checkpoints that are whole, ascending."""
        names = [path.name for path in self._folder.iterdir()] if self._folder.is_dir() else []
        return sorted(int(match[1]) for match in map(_STEP.fullmatch, names) if match)

    def path(self, step: int) -> Path:
        return self._folder / f"step-{step:08}"

    def save_rank(self, step: int, rank: int, state: Mapping[str, np.ndarray]) -> None:
        """Write one rank's arrays of step `step`, which is done."""
        partial = self._partial(step)
        with reporting_os_errors(partial):
            partial.mkdir(mode=DIR_MODE, exist_ok=True)
        record = write_arrays(partial, rank_file(rank), state)
        write_file(partial / _done_file(rank), dump_json(asdict(record)))

    def commit(
        self, step: int, position: tuple[int, int], ranks: int, settings: Mapping[str, Any], wait: float = PEER_SECONDS
    ) -> Path:
        """Give the checkpoint its name once all ranks have written; then drop what is too old.

        Raises:
            OutputError: a rank did not write in `wait` seconds, or the disk is full.
        """
        partial = self._partial(step)
        done = [partial / _done_file(rank) for rank in range(ranks)]
        deadline = time.monotonic() + wait
        while absent := [path.name for path in done if not path.exists()]:
            if time.monotonic() > deadline:
                raise OutputError("was not written by every rank", where=self.path(step), expected=absent[0])
            time.sleep(0.02)
        records = [json.loads(path.read_bytes()) for path in done]
        files = {record.pop("path"): record for record in records}
        with reporting_os_errors(partial):
            for path in done:
                path.unlink()
        write_file(partial / FACTS, dump_json(asdict(Facts(step, *position, ranks, settings, files))))
        with reporting_os_errors(self._folder):
            partial.rename(self.path(step))
            sync_directory(self._folder)
            for old in self.steps()[: -self._keep]:
                doomed = self._folder / f".{self.path(old).name}.old"
                self.path(old).rename(doomed)  # at once, or a kill would leave half a checkpoint under its name
                shutil.rmtree(doomed)
        return self.path(step)

    def facts(self, step: int) -> Facts:
        """What the checkpoint says. Raises CheckpointError where it is no such file."""
        where = self.path(step) / FACTS
        try:
            return Facts(**read_json(where))
        except TypeError:
            raise CheckpointError("is not a checkpoint of `finetune`", where=where) from None

    def load_rank(self, facts: Facts, rank: int) -> StoredArrays:
        """One rank's arrays.

        Raises:
            CheckpointError: the file is missing or not the one that was written.
        """
        path = self.path(facts.step) / rank_file(rank)
        if not path.is_file() or _sha256(path) != facts.files.get(path.name, {}).get("sha256"):
            raise CheckpointError(
                "is not as it was written",
                where=path,
                advice=f"Remove {self.path(facts.step)} to go on from the checkpoint before it.",
            )
        return StoredArrays(path)

    def _partial(self, step: int) -> Path:
        return self._folder / f".{self.path(step).name}.partial"


def rank_file(rank: int) -> str:
    return f"rank_{rank}{SAFETENSORS.suffix}"


def _done_file(rank: int) -> str:
    return f"rank_{rank}.done"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(_READ_BYTES):
            digest.update(data)
    return digest.hexdigest()
