"""`preprocess`: data files in, a directory of mindrecord files out, and an account of every record."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from telechat_mindie.data.encoding import Encoding, encode_records
from telechat_mindie.data.mindrecord import RowWriter
from telechat_mindie.data.packing import IGNORED, PADDING, Packer
from telechat_mindie.data.recipe import Recipe
from telechat_mindie.data.records import Record, data_files, read_records
from telechat_mindie.errors import InputError
from telechat_mindie.staging import StagedDirectory, dump_json, reporting_os_errors, write_file

OVERFLOW = ("cut", "drop")
"""What becomes of an example that is longer than a row."""

REPORT = "preprocess.json"
LEFT_OUT = "left-out.jsonl"
_SCRATCH = ".records"

Rows = Iterator[tuple[np.ndarray, np.ndarray]]
Start = Callable[[int], Callable[[int], None]]


@dataclass(frozen=True)
class Options:
    """How rows are made.

    Args:
        max_length: a row has one token more, since the model is trained to say each from those before it.
        overflow: of OVERFLOW.
        skip_bad: leave out records that cannot be read, instead of refusing all.
        shard_bytes: of the rows in one file; None: all in one.
        show: number of a row to keep for showing, from 0.
        force: replace an output that this made.
    """

    max_length: int = 8192
    overflow: str = "cut"
    skip_bad: bool = False
    shard_bytes: int | None = 1 << 30
    show: int | None = None
    force: bool = False

    def __post_init__(self) -> None:
        if self.max_length < 1:
            raise InputError("is too small", where="--max-length", expected="at least 1", found=self.max_length)
        if self.overflow not in OVERFLOW:
            raise InputError("is unknown", where="--overflow", expected=" or ".join(OVERFLOW), found=self.overflow)

    @property
    def row_length(self) -> int:
        return self.max_length + 1


@dataclass
class Report:
    """What became of the records. `left_out` are the first few; all of them stand in LEFT_OUT of the output."""

    files: list[str]
    row_length: int
    records: int = 0
    examples: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0  # tokens of an example, before any cut; not known of the recipe's
    rows: int = 0
    cut: int = 0
    dropped: int = 0
    bad: int = 0
    shards: list[str] = field(default_factory=list)
    left_out: list[dict[str, Any]] = field(default_factory=list)
    shown: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def fill(self) -> float:
        """The part of all rows that is not padding."""
        return self.tokens / (self.rows * self.row_length) if self.rows else 0.0

    def as_dict(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in vars(self) if name not in ("shown", "left_out")}
        return values | {"fill": round(self.fill, 4)}


def preprocess(names: Sequence[str], output: Path, encoding: Encoding, options: Options, start: Start) -> Report:
    """Write the conversations of data files as rows of tokens.

    Each becomes the chat template's own ids, examples are packed into rows of max_length + 1 tokens in the order of the
    files, rows are padded on the right. The same files and options give the same bytes.

    Args:
        names: paths and globs.
        output: directory to make.
        start: of a progress bar: told the bytes of the files, gives what is told of each that are read.

    Raises:
        InputError: a file or a record that cannot be read, nothing to train on, or no row to show. Nothing is left at
            `output`.
        TokenizerError: no tokenizer comes of its directory.
        OutputError: the output exists or cannot be written.
    """
    return _write(names, output, options, start, lambda run: run.packed_rows(encoding))


def preprocess_as_recipe(
    names: Sequence[str], output: Path, recipe: Recipe, options: Options, start: Start, name: str = "dataset"
) -> Report:
    """The same with the rows of mindformers' script, see `recipe`, all in one file NAME.mindrecord."""
    options = replace(options, shard_bytes=None)
    return _write(names, output, options, start, lambda run: run.recipe_rows(recipe), name)


def _write(
    names: Sequence[str],
    output: Path,
    options: Options,
    start: Start,
    make_rows: Callable[[_Run], Rows],
    name: str = "dataset",
) -> Report:
    files = data_files(names)
    with StagedDirectory(output, replace=options.force, marker=REPORT, scratch=_SCRATCH) as staged:
        with reporting_os_errors(output), (staged.path / LEFT_OUT).open("w", encoding="utf-8") as left_out:
            run = _Run(files, options, start, left_out, staged.path / _SCRATCH)
            report, writer = run.report, RowWriter(staged.path, options.shard_bytes, name)
            for token_ids, labels in make_rows(run):
                if report.rows == options.show:
                    report.shown = (token_ids, labels)
                report.rows += 1
                writer.write(token_ids, labels)
            writer.close()
        if not report.rows:
            raise InputError(
                "hold no row to train on",
                where=", ".join(report.files),
                found=f"{report.records} records",
            )
        if options.show is not None and report.shown is None:
            expected = f"0 to {report.rows - 1}"
            raise InputError("there is no such row", where="--show", expected=expected, found=options.show)
        report.shards = writer.names
        if not report.left_out:
            (staged.path / LEFT_OUT).unlink()
        write_file(staged.path / REPORT, dump_json(report.as_dict()))
        staged.commit()
    return report


class _Run:
    """The records of one run on their way to rows, counted."""

    def __init__(self, files: list[Path], options: Options, start: Start, left_out: IO[str], scratch: Path) -> None:
        self.report = Report([str(path) for path in files], options.row_length)
        self._files = files
        self._options = options
        self._left_out = left_out
        self._scratch = scratch
        self._bytes = sum(path.stat().st_size for path in files)
        self._advance = start(self._bytes)

    def _records(self) -> Iterator[Record]:
        for path in self._files:
            for record in read_records(path, self._advance):
                self.report.records += 1
                yield record

    def packed_rows(self, encoding: Encoding) -> Rows:
        report, length = self.report, self._options.row_length
        packer = Packer(length)
        for where, example, fault in encode_records(encoding, self._records(), self._bytes):
            if example is None:
                if not self._options.skip_bad:
                    raise InputError(fault, advice="Mend it, or leave such records out with --skip-bad.")
                report.bad += 1
                self._note(where, "bad", fault=fault)
                continue
            report.longest = max(report.longest, len(example))
            if len(example) > length:
                whole, example = example, example.cut(length)
                if self._options.overflow == "drop" or not example.trained.any():
                    self._drop(where, len(whole))
                    continue
                report.cut += 1
                self._note(where, "cut", tokens=len(whole))
            report.examples += 1
            report.tokens += len(example)
            report.trained_tokens += int(example.trained.sum())
            for row in packer.add(example):
                yield row.arrays()
        for row in packer.rest():
            yield row.arrays()

    def recipe_rows(self, recipe: Recipe) -> Rows:
        report = self.report
        with self._scratch.open("w+b") as scratch:
            for token_ids, labels in recipe.rows(self._records(), scratch, self._drop):
                report.tokens += int((token_ids != PADDING).sum())
                report.trained_tokens += int((labels != IGNORED).sum())
                yield token_ids, labels
        report.examples = report.records - report.dropped

    def _drop(self, where: str, tokens: int) -> None:
        self.report.dropped += 1
        self._note(where, "dropped", tokens=tokens)

    def _note(self, where: str, what: str, **more: object) -> None:
        entry = {"where": where, "what": what, **more}
        print(json.dumps(entry, ensure_ascii=False), file=self._left_out)
        if len(self.report.left_out) < 20:
            self.report.left_out.append(entry)
