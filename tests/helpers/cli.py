"""A command line in the test's own process."""

from __future__ import annotations

import sys

from telechat_mindie.cli import app
from telechat_mindie.errors import TelechatMindieError


def main() -> None:
    """The command of `sys.argv`, as `telechat_mindie.__main__` runs it, but without its hold on signals and the end.

    Raises:
        SystemExit: always.
    """
    try:
        app()
    except TelechatMindieError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
