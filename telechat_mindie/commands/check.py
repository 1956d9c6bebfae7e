"""`telechat-mindie check`."""

from __future__ import annotations

from pathlib import Path

import typer

from telechat_mindie.commands.options import AnyGeneration, AsJson, CardMem, MindieHome, ModelPath


def check(
    model_path: ModelPath,
    service_config: Path = typer.Option(None, "--service-config", help="The conf/config.json that will serve it."),
    mindie: AnyGeneration = None,
    mindie_home: MindieHome = None,
    device_mem: CardMem = None,
    full: bool = typer.Option(False, "--full", help="Hash every file and compare with the manifest."),
    fix: bool = typer.Option(False, "--fix", help="Repair modes first; nothing else is changed."),
    timeout: float = typer.Option(300, "--timeout", min=1, help="Seconds for importing the modules."),
    as_json: AsJson = False,
) -> None:
    """Check a model directory, and the service config for it, as far as that goes without an NPU.

    Exit codes: 0 clean, 1 warnings, 2 errors.

    Examples:
        telechat-mindie check model
        telechat-mindie check model --service-config conf/config.json --full
    """
    from telechat_mindie.commands.findings import show_report
    from telechat_mindie.commands.output import byte_progress
    from telechat_mindie.service.check import CheckOptions
    from telechat_mindie.service.check import check as run
    from telechat_mindie.service.facts import generation_for

    options = CheckOptions(
        service_config=service_config,
        generation=mindie or generation_for(model_path),
        device_mem_gb=device_mem,
        full=full,
        fix=fix,
        mindie_home=mindie_home,
        timeout=timeout,
    )
    with byte_progress("hashing") as start:
        report = run(model_path, options, start)
    show_report(str(model_path), report, as_json=as_json)
