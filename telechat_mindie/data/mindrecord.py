"""Rows of tokens in mindrecord files, as mindformers' MindDataset reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from telechat_mindie.errors import OutputError

SCHEMA = {"input_ids": {"type": "int32", "shape": [-1]}, "labels": {"type": "int32", "shape": [-1]}}
"""Columns and types of the recipe's telechat_preprocess.py."""

_BATCH = 64  # rows of a write


class RowWriter:
    """Files `NAME-00000.mindrecord`, `NAME-00001.mindrecord` ... of about `shard_bytes`, each with its index beside it.

    A file knows its own name, and cannot be given another.

    Args:
        folder: where to; it exists.
        shard_bytes: of the rows in one file; None for a single `NAME.mindrecord`.
        name: NAME.

    Raises:
        OutputError: a file cannot be written.
    """

    def __init__(self, folder: Path, shard_bytes: int | None, name: str = "dataset") -> None:
        self._folder = folder
        self._shard_bytes = shard_bytes
        self._name = name
        self._writer: Any = None
        self._batch: list[dict[str, np.ndarray]] = []
        self._bytes = 0
        self.names: list[str] = []

    def write(self, token_ids: np.ndarray, labels: np.ndarray) -> None:
        self._batch.append({"input_ids": token_ids, "labels": labels})
        self._bytes += token_ids.nbytes + labels.nbytes
        full = self._shard_bytes is not None and self._bytes >= self._shard_bytes
        if full or len(self._batch) == _BATCH:
            self._flush()
        if full:
            self.close()

    def close(self) -> None:
        """Complete the last file."""
        self._flush()
        if self._writer is not None:
            self._try(self._writer.commit)
            self._writer = None
        self._bytes = 0

    def _flush(self) -> None:
        if not self._batch:
            return
        if self._writer is None:
            self._open()
        self._try(self._writer.write_raw_data, self._batch)
        self._batch = []

    def _open(self) -> None:
        from mindspore.mindrecord import FileWriter

        number = "" if self._shard_bytes is None else f"-{len(self.names):05}"
        self.names.append(f"{self._name}{number}.mindrecord")
        self._writer = self._try(FileWriter, str(self._folder / self.names[-1]), 1, True)
        self._try(self._writer.add_schema, SCHEMA, "rows of tokens")

    def _try(self, call: Any, *arguments: Any) -> Any:
        """MindSpore's own errors, which are RuntimeErrors of many lines, in one sentence."""
        try:
            return call(*arguments)
        except (RuntimeError, OSError, ValueError) as error:
            said = str(error).strip().splitlines()
            raise OutputError(
                f"cannot be written: {said[0] if said else type(error).__name__}",
                where=self._folder / self.names[-1],
                advice="Is the disk full?",
            ) from None
