"""What a user types to install what is missing: only names that a package index or this machine has."""

from __future__ import annotations

import shlex
import sys
from importlib import metadata
from pathlib import Path

from telechat_mindie import __version__
from telechat_mindie.errors import TelechatMindieError

DISTRIBUTION = "telechat-mindie"


class MissingExtraError(TelechatMindieError):
    """A library of an optional extra is not installed."""

    def __init__(self, library: str, extra: str) -> None:
        super().__init__(f"{library} is not installed", advice=f"It comes with `{install_extra(extra)}`.")


def install_extra(extra: str) -> str:
    """The command that installs an extra's libraries: by their own names, since this package is on no index."""
    wanted = [line for line in metadata.requires(DISTRIBUTION) or () if f'extra == "{extra}"' in line.replace("'", '"')]
    return shlex.join(["pip", "install", *(line.partition(";")[0].strip() for line in wanted)])


def install_here(python: str | Path | None = None) -> str:
    """The command that installs this package for an interpreter, by default this one."""
    tree = Path(__file__).parent.parent
    source = tree if (tree / "setup.cfg").is_file() else f"telechat_mindie-{__version__}-py3-none-any.whl"
    return shlex.join([str(python or sys.executable), "-m", "pip", "install", str(source)])
