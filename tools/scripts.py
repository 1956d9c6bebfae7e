"""What the scripts beside this file share: one-line errors, and flags as mindformers spells them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from telechat_mindie.dtypes import WEIGHT_DTYPES
from telechat_mindie.errors import TelechatMindieError

DTYPES = ("auto", *WEIGHT_DTYPES)
"""Choices of --dtype; auto keeps what is stored."""


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help is a script's docstring as it stands."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, help="folder of the config.json, if it is not with the weights")


def run(main: Callable[[], None]) -> None:
    """Call `main`; exit with code 2 and one line on stderr where it refuses its input."""
    try:
        main()
    except TelechatMindieError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def flag(text: str) -> bool:
    """`True`, `false`, `1`, `no` and the like."""
    values = {"true": True, "1": True, "yes": True, "y": True, "false": False, "0": False, "no": False, "n": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"expected True or False, found {text!r}")
    return values[text.lower()]


def container_of(path: Path) -> str:
    """The format that a file's name asks for."""
    return "safetensors" if path.suffix == ".safetensors" else "ckpt"
