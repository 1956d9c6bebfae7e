"""A command and a group of commands: help in sections, examples, and the options that every command has."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, ClassVar

import typer
from typer.core import TyperCommand, TyperGroup

from telechat_mindie.commands import messages

PROGRAM = "telechat-mindie"
EXAMPLES = "\nExamples:\n"
"""What parts a docstring: the text before, one command a line behind."""

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class _Common:
    """What a command and a group share; stands before typer's class of each."""

    def __init__(self, *arguments: Any, help: str | None = None, params: Any = (), **attributes: Any) -> None:
        text, _, examples = (help or "").partition(EXAMPLES)
        params = [*(params or ()), *message_options()]
        super().__init__(*arguments, help=text.strip(), params=params, **attributes)  # type: ignore[call-arg]
        self.examples = inspect.cleandoc(examples).splitlines()

    def invoke(self, ctx: Any) -> Any:
        messages.options(**{param.name: ctx.params.pop(param.name) for param in message_options()})
        return super().invoke(ctx)  # type: ignore[misc]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Arguments, then options: each section is a `rich_help_panel`, which typer itself shows with rich alone."""
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for param in self.get_params(ctx):  # type: ignore[attr-defined]
            if (record := param.get_help_record(ctx)) is not None:
                usual = "Arguments" if param.param_type_name == "argument" else "Options"
                sections.setdefault(getattr(param, "rich_help_panel", None) or usual, []).append(record)
        for title, records in sections.items():
            _write_section(formatter, title, records)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        if self.examples:
            with formatter.section("Examples"):
                formatter.write("".join(f"{'':>{formatter.current_indent}}{line}\n" for line in self.examples))


class Command(_Common, TyperCommand):
    """One function; its docstring may end with examples."""


class Group(_Common, TyperGroup):
    """Commands in the order in which they were added."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        super().format_options(ctx, formatter)
        self.format_commands(ctx, formatter)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        rows = [(name, summary(self.commands[name].help)) for name in self.list_commands(ctx)]
        _write_section(formatter, "Commands", rows)


class Sections(Group):
    """The whole program: sections of commands, each of which is imported and made when it is asked for.

    Attributes:
        sections: title -> names of commands, in the order in which they are used.
    """

    sections: ClassVar[Mapping[str, Sequence[str]]]

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands = _Lazy([name for names in self.sections.values() for name in names])  # type: ignore[assignment]

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        for title, names in self.sections.items():
            _write_section(formatter, title, [(name, summary(documentation(load(name)))) for name in names])

    def main(self, *arguments: Any, **options: Any) -> Any:
        with messages.on_stderr():
            return super().main(*arguments, **{"prog_name": PROGRAM, **options})


class _Lazy(Mapping[str, Any]):
    """Commands by their names, made at first use."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._made: dict[str, Any] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, name: str) -> Any:
        if name not in self._names:
            raise KeyError(name)
        if name not in self._made:
            self._made[name] = make(name, load(name))
        return self._made[name]


def load(name: str) -> Callable[..., Any] | typer.Typer:
    """A command's function, or a group, from the module of its name: `service-config` is service_config's."""
    python_name = name.replace("-", "_")
    found: Callable[..., Any] | typer.Typer = getattr(
        importlib.import_module(f"telechat_mindie.commands.{python_name}"), python_name
    )
    return found


def make(name: str, target: Callable[..., Any] | typer.Typer) -> Any:
    """typer's object of it."""
    if isinstance(target, typer.Typer):
        made = typer.main.get_command(target)
        made.name = name
        return made
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(name, cls=Command)(target)
    return typer.main.get_command(app)


def documentation(target: Callable[..., Any] | typer.Typer) -> str | None:
    return target.info.help if isinstance(target, typer.Typer) else target.__doc__


def summary(text: str | None) -> str:
    """The first paragraph in one line."""
    return " ".join(inspect.cleandoc(text or "").split("\n\n")[0].split())


@cache
def message_options() -> Sequence[Any]:
    """The parameters of `messages.options`, which every command has as well."""
    app = typer.Typer(add_completion=False)
    app.command()(messages.options)
    return tuple(typer.main.get_command(app).params)


def _write_section(formatter: Any, title: str, rows: Sequence[tuple[str, str]]) -> None:
    if rows:
        with formatter.section(title):
            formatter.write_dl(rows)
