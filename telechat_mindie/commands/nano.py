"""`telechat-mindie nano`."""

from __future__ import annotations

from pathlib import Path

import typer

from telechat_mindie.commands.options import Force


def nano(
    directory: Path = typer.Argument(help="Directory to make."),
    force: Force = False,
) -> None:
    """Write out telechat2-nano, the tiny TeleChat2 checkpoint that ships with the package.

    Examples:
        telechat-mindie nano ckpt
    """
    from telechat_mindie.nano import write_checkpoint

    write_checkpoint(directory, replace=force)
    print(f"{directory}: telechat2-nano, a checkpoint in the Hugging Face format")
