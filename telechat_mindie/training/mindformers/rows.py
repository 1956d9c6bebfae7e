"""The rows that mindformers would train on, looked at before: it checks neither their length nor their tokens."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from telechat_mindie.data.packing import IGNORED
from telechat_mindie.errors import InputError
from telechat_mindie.reading import existing_path

COLUMNS = ("input_ids", "labels")

_FILE = re.compile(r"mindrecord\d*$")  # mindformers/dataset/causal_language_model_dataset.py _process_mindrecord_data


def mindrecord_files(data: Path) -> list[Path]:
    """The files that mindformers would read of a folder and all below it, or the file that is named.

    Raises:
        InputError: there are none, or one is without the index that belongs to it.
    """
    existing_path(data, "data")
    files = (
        [data] if data.is_file() else sorted(Path(root) / name for root, _, names in os.walk(data) for name in names)
    )
    files = [file for file in files if _FILE.search(file.name)]
    if not files:
        raise InputError("holds no mindrecord file", where=data, advice="Make some with `telechat-mindie preprocess`.")
    for file in files:
        if not Path(f"{file}.db").is_file():
            raise InputError(
                "is without its index",
                where=file,
                expected=f"{file.name}.db beside it",
                advice="Copy both; neither can be given another name.",
            )
    return files


def count_rows(data: Path, sequence_length: int, vocab_size: int) -> int:
    """How many rows there are; all of them are read.

    Raises:
        InputError: no rows, columns that are not the recipe's, a row that is not one token longer than the sequence, or
            a token that the vocabulary has not.
    """
    count = 0
    for file in mindrecord_files(data):
        for number, row in enumerate(_read(file)):
            _check(row, f"{file}: row {number}", sequence_length, vocab_size)
            count += 1
    if not count:
        raise InputError("holds no rows", where=data)
    return count


def _check(row: dict[str, Any], where: str, sequence_length: int, vocab_size: int) -> None:
    for name in COLUMNS:
        if name not in row:
            raise InputError(f"has no column {name}", where=where, found=", ".join(sorted(row)))
        values = np.asarray(row[name])
        if values.shape != (sequence_length + 1,):  # the model trains each token from those before it
            found = f"{len(values)} tokens" if values.ndim == 1 else f"shape {list(values.shape)}"
            raise InputError(
                f"does not fit --max-length {sequence_length}: a row has one token more",
                where=f"{where}: {name}",
                expected=f"{sequence_length + 1} tokens",
                found=found,
                advice=f"Preprocess with --max-length {sequence_length}, or say another --max-length.",
            )
        tokens = values if name == "input_ids" else values[values != IGNORED]
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < vocab_size:
            raise InputError(
                "has a token that the vocabulary has not",
                where=f"{where}: {name}",
                expected=f"0 to {vocab_size - 1}",
                found=tokens.min() if tokens.min() < 0 else tokens.max(),
                advice="Preprocess with the tokenizer of this model.",
            )


def _read(file: Path) -> Iterator[dict[str, Any]]:
    from mindspore.mindrecord import FileReader

    try:
        reader = FileReader([str(file)], num_consumer=1)
        try:
            yield from reader.get_next()
        finally:
            reader.close()
    except RuntimeError:
        raise InputError("is no mindrecord file that can be read", where=file, advice="Is it whole?") from None
