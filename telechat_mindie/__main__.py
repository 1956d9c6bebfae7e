"""`python -m telechat_mindie` and the console script. Signals come first: Ctrl-C may be as early as an import."""

from __future__ import annotations

from typing import NoReturn

from telechat_mindie.commands.ending import run


def main() -> NoReturn:
    """Run a command of this process's command line."""
    run(_command_line)


def _command_line() -> None:
    from telechat_mindie.cli import app

    app()


if __name__ == "__main__":
    main()
