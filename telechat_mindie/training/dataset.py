"""The rows of a run: read from mindrecord files once, checked, and kept in one flat file that every rank maps."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from telechat_mindie.config import TelechatConfig
from telechat_mindie.data.packing import IGNORED, PADDING
from telechat_mindie.errors import InputError
from telechat_mindie.staging import reporting_os_errors
from telechat_mindie.training.order import BLANK
from telechat_mindie.training.rows import Batch

COLUMNS = ("input_ids", "labels")


@dataclass(frozen=True)
class Dataset:
    """Rows in a file, [rows, 2, length] int32: the token ids of each, then its labels, which the model shifts.

    Attributes:
        length: of each row, one more than the tokens that the model is given.
        numbers: of those rows of the file that are meant.
        trained_tokens: in the whole file.
        left_out: rows of the data that train nothing, which the file does not have.
        sha256: of the file.
    """

    file: Path
    length: int
    numbers: np.ndarray
    trained_tokens: int
    left_out: int
    sha256: str

    def __len__(self) -> int:
        return len(self.numbers)

    def take(self, indices: np.ndarray) -> Batch:
        """The rows of these indices, from 0; a BLANK one is all padding."""
        blank = indices == BLANK
        rows = self._stored[self.numbers[np.where(blank, 0, indices)]]
        rows[blank] = [[PADDING], [IGNORED]]
        return Batch(rows[:, 0], rows[:, 1])

    def only(self, indices: np.ndarray) -> Dataset:
        """The rows of these indices alone."""
        return replace(self, numbers=self.numbers[indices])

    @cached_property
    def _stored(self) -> np.ndarray:
        return np.memmap(self.file, "<i4", "r").reshape(-1, len(COLUMNS), self.length)


def is_mindrecord(path: Path) -> bool:
    """A file with the index that belongs to one beside it."""
    return path.is_file() and Path(f"{path}.db").is_file()


def mindrecord_files(names: Sequence[str]) -> list[Path]:
    """The mindrecord files that paths, folders and globs mean, or none where they mean other data.

    Raises:
        InputError: some are mindrecord files and some are not, or one is without its index.
    """
    found: dict[Path, None] = {}
    others: list[str] = []
    for name in names:
        path = Path(name)
        paths = sorted(path.iterdir()) if path.is_dir() else [path] if path.exists() else _matches(name)
        files = [file for file in paths if is_mindrecord(file)]
        if not files and any(".mindrecord" in file.name for file in paths):
            raise InputError(
                "is without the index that belongs to it",
                where=name,
                expected="NAME.mindrecord and NAME.mindrecord.db side by side",
                advice="Copy both; neither can be given another name.",
            )
        if not files and path.is_dir():
            raise InputError("holds no mindrecord files", where=name, advice="Name a folder that `preprocess` made.")
        others += [] if files else [name]
        found |= dict.fromkeys(files)
    if found and others:
        raise InputError(
            "are mixed", where="mindrecord files and other data", found=f"{next(iter(found))}, {others[0]}"
        )
    return list(found)


def gather_rows(files: Sequence[Path], flat: Path, config: TelechatConfig) -> Dataset:
    """Read mindrecord files, check every row, and write those that train something to `flat`.

    Raises:
        InputError: a file that cannot be read, rows of several lengths, an id that the model has no embedding for,
            columns that are no rows of tokens, or nothing to train on.
        OutputError: `flat` cannot be written.
    """
    count = trained = left_out = length = 0
    digest = hashlib.sha256()
    with reporting_os_errors(flat), flat.open("wb") as file:
        for path in files:
            for number, row in enumerate(read_rows(path)):
                token_ids, labels = checked_row(row, f"{path}: row {number}", config.vocab_size, length)
                length = len(token_ids)
                tokens = Batch(token_ids[None], labels[None]).tokens(config.pad_token_id)
                if not tokens:
                    left_out += 1
                    continue
                for array in (token_ids, labels):
                    data = array.astype("<i4", copy=False).tobytes()
                    digest.update(data)
                    file.write(data)
                count += 1
                trained += tokens
    if not count:
        raise InputError("hold no row with a token to train on", where=_named(files), found=f"{left_out} rows")
    return Dataset(flat, length, np.arange(count), trained, left_out, digest.hexdigest())


def checked_row(row: Any, where: str, vocab_size: int, length: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and labels of a row, which has `length` tokens like those before it, if there are any.

    Raises:
        InputError: it has not, it is no row of tokens, or it has an id that the model has no embedding for.
    """
    if absent := [name for name in COLUMNS if name not in row]:
        raise InputError(f"has no column {absent[0]}", where=where, found=", ".join(sorted(row)))
    token_ids, labels = (row[name] for name in COLUMNS)
    for name, array in zip(COLUMNS, (token_ids, labels), strict=True):
        if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype.kind not in "iu":
            raise InputError("is no row of integers", where=f"{where}: {name}")
        expected = length or len(token_ids)
        if len(array) != expected:
            advice = "All rows of a run are of one length: preprocess the data together."
            raise InputError(
                "has another length", where=f"{where}: {name}", expected=expected, found=len(array), advice=advice
            )
    if len(token_ids) < 2:
        raise InputError("is too short to train on", where=where, expected="at least 2 tokens", found=len(token_ids))
    for name, array in zip(COLUMNS, (token_ids, labels[labels != IGNORED]), strict=True):
        if len(array) and not 0 <= array.min() <= array.max() < vocab_size:
            worst = array.min() if array.min() < 0 else array.max()
            raise InputError(
                "has an id that the model has no embedding for",
                where=f"{where}: {name}",
                expected=f"0 to {vocab_size - 1}",
                found=worst,
                advice="Preprocess the data with the tokenizer of this model.",
            )
    return token_ids, labels


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of one file, in its order. Raises InputError for one that cannot be read."""
    from mindspore.mindrecord import FileReader

    try:
        # One file at a time and one consumer: the order is the file's, whoever reads it.
        reader = FileReader([str(path)], num_consumer=1)
        try:
            yield from reader.get_next()
        finally:
            reader.close()
    except RuntimeError as error:
        said = [line.removeprefix("[ERROR] ") for line in str(error).splitlines() if line.strip(" -")]
        cause = next((line for line in said if line.startswith("Invalid")), said[0] if said else "")
        raise InputError(f"cannot be read: {cause}", where=path, advice="Is it whole, and of `preprocess`?") from None


def _matches(pattern: str) -> list[Path]:
    return sorted(map(Path, glob.glob(pattern, recursive=True)))  # noqa: PTH207 - Path.glob takes no absolute pattern


def _named(files: Sequence[Path]) -> str:
    return ", ".join(map(str, files[:3])) + (", ..." if len(files) > 3 else "")
