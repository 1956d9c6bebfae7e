"""The command table of `telechat-mindie`; `__main__` runs it."""

from __future__ import annotations

from typing import ClassVar

import typer

from telechat_mindie import __version__
from telechat_mindie.commands.group import SETTINGS, Sections


class _Program(Sections):
    """Each command is the function of that name in the module of that name in `telechat_mindie.commands`."""

    sections: ClassVar = {
        "Begin": ("nano", "info", "plan"),
        "Train": ("preprocess", "finetune"),
        "Build": ("convert", "build", "verify", "check"),
        "Run MindIE": ("service-config", "doctor", "launch", "status", "logs", "stop"),
        "Run without an NPU": ("serve", "generate", "chat", "bench"),
        "Take elsewhere": ("manifests", "export"),
    }


app = typer.Typer(
    cls=_Program,
    help="""Build, check and serve TeleChat2 models for MindIE on Ascend.

    Examples:
        telechat-mindie nano ckpt
        telechat-mindie build model --checkpoint ckpt
        telechat-mindie check model
        telechat-mindie generate model "What is MindIE?"
        telechat-mindie serve model
    """,
    no_args_is_help=True,
    context_settings=SETTINGS,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def _root(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if version:
        print(f"telechat-mindie {__version__}")
        raise typer.Exit
