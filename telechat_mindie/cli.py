"""The command table of `telechat-mindie`."""

from __future__ import annotations

import sys

import typer

from telechat_mindie import __version__
from telechat_mindie.commands.bench import bench
from telechat_mindie.commands.build import build
from telechat_mindie.commands.chat import chat
from telechat_mindie.commands.check import check
from telechat_mindie.commands.convert import convert
from telechat_mindie.commands.doctor import doctor
from telechat_mindie.commands.export import export
from telechat_mindie.commands.finetune import finetune
from telechat_mindie.commands.generate import generate
from telechat_mindie.commands.info import info
from telechat_mindie.commands.launch import launch
from telechat_mindie.commands.logs import logs
from telechat_mindie.commands.manifests import manifests
from telechat_mindie.commands.nano import nano
from telechat_mindie.commands.plan import plan
from telechat_mindie.commands.preprocess import preprocess
from telechat_mindie.commands.serve import serve
from telechat_mindie.commands.service_config import service_config
from telechat_mindie.commands.status import status
from telechat_mindie.commands.stop import stop
from telechat_mindie.commands.verify import verify
from telechat_mindie.errors import TelechatMindieError

app = typer.Typer(
    help="Build, check and serve TeleChat2 models for MindIE on Ascend.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
COMMANDS = (
    build,
    chat,
    check,
    convert,
    doctor,
    export,
    finetune,
    generate,
    info,
    launch,
    logs,
    manifests,
    nano,
    plan,
    preprocess,
    serve,
    service_config,
    status,
    stop,
    verify,
)
for command in COMMANDS:
    app.command()(command)
app.add_typer(bench, name="bench")


@app.callback(invoke_without_command=True)
def _root(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if version:
        print(f"telechat-mindie {__version__}")
        raise typer.Exit


def main() -> None:
    """Run a command. Exit code 2, with one line on stderr, where the input is refused."""
    try:
        app()
    except TelechatMindieError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
