"""`telechat-mindie doctor`."""

from __future__ import annotations

import typer

from telechat_mindie.commands.options import AnyGeneration, AsJson


def doctor(
    mindie: AnyGeneration = None,
    matrix: bool = typer.Option(False, "--matrix", help="Print which versions work together, with the sources."),
    as_json: AsJson = False,
) -> None:
    """Say what this machine has of what MindIE needs, and what works without the rest.

    With `--mindie 3.0` that is what its atb needs; else MindSpore, for backendType ms.

    Exit codes: 0 ready to launch, 1 warnings, 2 errors.

    Examples:
        telechat-mindie doctor
        telechat-mindie doctor --matrix
    """
    if matrix:
        _print_matrix(as_json)
        return
    from telechat_mindie.commands.findings import show_report
    from telechat_mindie.mindie import ATB, MS, generation_named
    from telechat_mindie.service.doctor import diagnose

    backend = MS if mindie is None or generation_named(mindie).ms_backend else ATB
    show_report("this machine", diagnose(backend=backend), as_json=as_json)


def _print_matrix(as_json: bool) -> None:
    from dataclasses import asdict

    from telechat_mindie.commands.output import print_json, print_table
    from telechat_mindie.service.doctor import support

    if as_json:
        print_json(
            {
                "matrix": [asdict(row) for row in support.matrix()],
                "mindie": [asdict(row) | {"ms_backend": row.ms_backend} for row in support.mindie_releases()],
                "mindspore": [asdict(stack) for stack in support.stacks()],
                "mindspore_source": support.stacks_source(),
            }
        )
        return
    print_table("Support", [support.cells(row) for row in support.matrix()], support.cells(support.HEADINGS["en"]))
    print_table(
        "MindIE",
        [
            (row.versions, "yes" if row.ms_backend else "no", row.config, row.source)
            for row in support.mindie_releases()
        ],
        ("MindIE", "backendType ms", "--mindie", "source"),
    )
    print_table(
        "MindSpore",
        [
            (row.mindformers, row.mindspore, row.cann, row.driver or "?", row.telechat_mindie)
            for row in support.stacks()
        ],
        ("mindformers", "MindSpore", "CANN", "driver", "telechat-mindie"),
    )
    print(f"source: {support.stacks_source()}")
