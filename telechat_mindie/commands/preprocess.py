"""`telechat-mindie preprocess`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from telechat_mindie.commands.completion import names_in
from telechat_mindie.commands.options import AsJson, Force

if TYPE_CHECKING:
    from telechat_mindie.data.preprocess import Report
    from telechat_mindie.text.tokenizer import TelechatTokenizer


def preprocess(
    data: list[str] = typer.Argument(help="Files of JSON lines or of one JSON array, or patterns in quotes."),
    output: Path = typer.Option(..., "-o", "--output", help="Directory to make."),
    tokenizer: Path = typer.Option(..., "--tokenizer", help="Directory of tokenizer.model: the checkpoint's."),
    max_length: int = typer.Option(8192, "--max-length", help="Tokens of a row that the model is trained to say."),
    form: str = typer.Option(
        None,
        "--format",
        help="messages, sharegpt, dialog, alpaca or pair; default: each record's fields tell.",
        autocompletion=names_in("data.conversations", "FORMS"),
    ),
    train_on: str = typer.Option(
        "all",
        "--train-on",
        help="all answers of a conversation, or the last.",
        autocompletion=names_in("data.examples", "TRAIN_ON"),
    ),
    overflow: str = typer.Option(
        "cut",
        "--overflow",
        help="cut or drop conversations that are longer than a row.",
        autocompletion=names_in("data.preprocess", "OVERFLOW"),
    ),
    skip_bad: bool = typer.Option(False, "--skip-bad", help="Leave out records that cannot be read."),
    shard_size: float = typer.Option(1.0, "--shard-size", min=0.001, help="GiB of rows in one file."),
    compat: bool = typer.Option(
        False, "--compat", help="The rows of mindformers' telechat_preprocess.py, bit for bit."
    ),
    show: int = typer.Option(None, "--show", min=0, help="Print row N, from 0: what is trained in colour or brackets."),
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Turn conversations into the mindrecord files that training reads.

    Examples:
        telechat-mindie preprocess "data/*.jsonl" -o rows --tokenizer TeleChat2-7B
        telechat-mindie preprocess chats.json -o rows --tokenizer TeleChat2-7B --max-length 4096 --show 0
    """
    from telechat_mindie.commands.output import byte_progress, print_json
    from telechat_mindie.data.conversations import FORMS
    from telechat_mindie.data.encoding import Encoding
    from telechat_mindie.data.examples import TRAIN_ON
    from telechat_mindie.data.preprocess import Options, preprocess_as_recipe
    from telechat_mindie.data.preprocess import preprocess as run
    from telechat_mindie.data.recipe import Recipe
    from telechat_mindie.errors import InputError
    from telechat_mindie.text.tokenizer import TelechatTokenizer

    if form is not None and form not in FORMS:
        raise InputError("is unknown", where="--format", expected=" or ".join(FORMS), found=form)
    if train_on not in TRAIN_ON:
        raise InputError("is unknown", where="--train-on", expected=" or ".join(TRAIN_ON), found=train_on)
    if compat and (form is not None or train_on != "all" or overflow != "cut" or skip_bad or shard_size != 1.0):
        raise InputError("knows no --format, --train-on, --overflow, --skip-bad and --shard-size", where="--compat")
    options = Options(max_length, overflow, skip_bad, int(shard_size * 2**30), show, force)
    with byte_progress("preprocessing") as start:
        if compat:
            report = preprocess_as_recipe(
                data, output, Recipe(tokenizer / "tokenizer.model", max_length), options, start
            )
        else:
            report = run(data, output, Encoding(tokenizer, form, train_on), options, start)
    if as_json:
        print_json(report.as_dict() | {"output": str(output)})
    else:
        _print(report, output)
    if show is not None:
        _show(report, show, TelechatTokenizer.from_pretrained(tokenizer), sys.stderr if as_json else sys.stdout)


def _print(report: Report, output: Path) -> None:
    from telechat_mindie.commands.output import print_table
    from telechat_mindie.data.preprocess import LEFT_OUT

    rows = [
        ("examples", f"{report.examples:,} of {report.records:,} records"),
        ("tokens", f"{report.tokens:,}, of which {report.trained_tokens:,} are trained"),
        ("rows", f"{report.rows:,} of {report.row_length:,} tokens, {report.fill:.1%} filled"),
    ]
    if report.longest:
        rows.append(("longest example", f"{report.longest:,} tokens"))
    for count, what in (
        (report.cut, "cut at the end of a row"),
        (report.dropped, "in no row"),
        (report.bad, "that could not be read"),
    ):
        if count:
            rows.append(("records " + what, f"{count:,}"))
    print_table(str(output), rows)
    for entry in report.left_out:
        print(entry.get("fault") or f"{entry['where']}: {entry['what']} ({entry['tokens']:,} tokens)")
    left = report.cut + report.dropped + report.bad - len(report.left_out)
    if left > 0:
        print(f"... and {left:,} more in {output / LEFT_OUT}")


def _show(report: Report, number: int, tokenizer: TelechatTokenizer, file: object) -> None:
    """A row's text: what is trained in green on a terminal, elsewhere in brackets."""
    from itertools import groupby

    from rich.console import Console
    from rich.text import Text

    from telechat_mindie.data.packing import IGNORED, PADDING

    assert report.shown is not None
    console = Console(file=file, highlight=False)  # type: ignore[arg-type]
    text = Text(f"row {number}\n")
    pairs = zip(*(array.tolist() for array in report.shown), strict=True)
    for trained, group in groupby(pairs, key=lambda pair: pair[1] != IGNORED):
        ids = [token for token, _ in group if token != PADDING or trained]
        words = tokenizer.decode(ids) if ids else ""
        if trained:
            text.append(words if console.is_terminal else f"[{words}]", style="bold green")
        else:
            text.append(words, style="dim")
    console.print(text)
