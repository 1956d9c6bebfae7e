"""How `check` and `doctor` show a report."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from telechat_mindie.findings import Finding, Report

STYLES = {"error": "bold red", "warning": "yellow", "ok": "green"}


def show_report(title: str, report: Report, *, as_json: bool) -> None:
    """Print a report, as JSON or for people: a table on a terminal, else two lines a finding, so that a path or a
    command to copy is never broken. Exits with the report's code."""
    from telechat_mindie.commands.output import print_json

    if as_json:
        print_json(report.as_dict())
        raise typer.Exit(report.exit_code)

    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    for repair in report.repairs:
        console.print(f"repaired: {repair}", markup=False)
    if console.is_terminal:
        _print_table(console, title, report)
    else:
        for finding in report.findings:
            console.print(f"{finding.severity} {finding.id}: {_text(finding)}", markup=False)
    counts = [f"{len(report.with_severity(severity))} {severity}s" for severity in ("error", "warning")]
    console.print(f"{title}: {', '.join(counts)}, {len(report.with_severity('ok'))} checks passed", markup=False)
    raise typer.Exit(report.exit_code)


def _print_table(console: Console, title: str, report: Report) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", show_header=False, show_lines=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in report.findings:
        table.add_row(Text(finding.severity, STYLES[finding.severity]), Text(_text(finding)))
    console.print(table, soft_wrap=False)


def _text(finding: Finding) -> str:
    advice = f"\n    {finding.advice}" if finding.advice else ""
    return f"{finding.where}: {finding.message}{advice}"
