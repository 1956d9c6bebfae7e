"""The rows that mindformers would train on, looked at before: it checks neither their length nor their tokens."""

from __future__ import annotations

import os
import re
from pathlib import Path

from telechat_mindie.errors import InputError
from telechat_mindie.reading import existing_path
from telechat_mindie.training.dataset import checked_row, read_rows

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
        for number, row in enumerate(read_rows(file)):
            where = f"{file}: row {number}"
            token_ids, _ = checked_row(row, where, vocab_size)
            if len(token_ids) != sequence_length + 1:  # the model trains each token from those before it
                raise InputError(
                    f"does not fit --max-length {sequence_length}: a row has one token more",
                    where=f"{where}: input_ids",
                    expected=f"{sequence_length + 1} tokens",
                    found=len(token_ids),
                    advice=f"Preprocess with --max-length {sequence_length}, or say another --max-length.",
                )
            count += 1
    if not count:
        raise InputError("holds no rows", where=data)
    return count
