"""`telechat-mindie service-config`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from telechat_mindie.commands.messages import logger
from telechat_mindie.commands.options import (
    AnyGeneration,
    AsJson,
    CardMem,
    Devices,
    InsecureHttp,
    Instances,
    MaxInputLen,
    MaxSeqLen,
    ModelPath,
    Overwrite,
    Reserve,
    Set,
)

if TYPE_CHECKING:
    from telechat_mindie.service.cards import Cards
    from telechat_mindie.service.render import RenderedConfig


EXPLAIN_WIDTH = 76  # of the column of values; a longer one moves the rest of its line


def service_config(
    model_path: ModelPath,
    output: Path = typer.Option(None, "--output", "-o", help="File to write; default: print it."),
    devices: Devices = None,
    instances: Instances = None,
    device_mem: CardMem = None,
    reserve: Reserve = None,
    dynamic_kv: bool = typer.Option(False, "--dynamic-kv", help="npuMemSize -1: the KV cache takes what is left."),
    max_seq_len: MaxSeqLen = None,
    max_input_len: MaxInputLen = None,
    request_tokens: int = typer.Option(1024, "--request-tokens", help="Tokens of a typical request, to size batches."),
    port_base: int = typer.Option(None, "--port-base", help="First of three ports; default: MindIE's, 1025."),
    insecure_http: InsecureHttp = False,
    set_: Set = None,
    template: Path = typer.Option(None, "--template", help="A conf/config.json to change as little as possible."),
    mindie: AnyGeneration = None,
    mindie_home: Path = typer.Option(
        None, "--mindie-home", help="MindIE's folder: say which certificates are missing there, or make them there."
    ),
    make_test_certificates: bool = typer.Option(
        False, "--make-test-certificates", help="Make certificates in MindIE's home, to try HTTPS with; 30 days."
    ),
    force: Overwrite = False,
    explain: bool = typer.Option(False, "--explain", help="Print every value with where it comes from."),
    as_json: AsJson = False,
) -> None:
    """Render MindIE's conf/config.json for a model directory.

    Examples:
        telechat-mindie service-config model -o conf/config.json
        telechat-mindie service-config model --devices 0-3 --set ScheduleConfig.maxBatchSize=64 --explain
    """
    import os

    from telechat_mindie.mindie import certificate_home
    from telechat_mindie.service import ports
    from telechat_mindie.service.card_rules import card_memory
    from telechat_mindie.service.cards import read_cards
    from telechat_mindie.service.facts import generation_for, model_facts, open_model
    from telechat_mindie.service.options import ServiceOptions, parse_devices
    from telechat_mindie.service.render import render_service_config
    from telechat_mindie.staging import write_file

    home = certificate_home(os.environ, mindie_home) if mindie_home is not None or make_test_certificates else None
    cards = read_cards()
    assumed = None
    if device_mem is None:
        device_mem, assumed = card_memory(cards, None if devices is None else parse_devices(devices))
    options = ServiceOptions(
        devices=devices,
        instances=1 if instances is None else instances,
        device_mem_gb=device_mem,
        reserve_gb=reserve,
        dynamic_kv=dynamic_kv,
        max_seq_len=max_seq_len,
        max_input_len=max_input_len,
        request_tokens=request_tokens,
        port_base=port_base,
        insecure_http=insecure_http,
        generation=mindie or generation_for(model_path),
        template=template,
        overrides=tuple(set_ or ()),
        mindie_home=home,
    )
    directory = open_model(model_path, mindie)
    # The file may be for another machine; `launch` goes round the ports that are taken on its own.
    rendered = render_service_config(model_facts(directory, devices, options.instances), options, ports.assume_free)
    if output is not None:
        _prepare_output(output, replace=force or (template is not None and _same_file(output, template)))
    if make_test_certificates:
        rendered = _make_certificates(rendered, home, replace=force)
    if output is not None:
        write_file(output, rendered.text.encode())
    _tell(rendered, home)
    _tell_cards(rendered, cards, directory.dtype, assumed)
    if explain:
        _explain(rendered, str(output or model_path), as_json)
    elif as_json:
        _print_result(rendered, output)
    elif output is None:
        print(rendered.text, end="")
    else:
        print(
            f"{output}: for MindIE {options.generation}, {len(rendered.derived)} values derived; --explain lists them"
        )


def _make_certificates(rendered: RenderedConfig, home: Path | None, replace: bool) -> RenderedConfig:
    """Make them and say so on stderr."""
    from dataclasses import replace as changed

    from telechat_mindie.errors import InputError
    from telechat_mindie.service.certificates import https_certificates
    from telechat_mindie.service.trial_certificates import OPTION, make_trial_certificates

    if home is None:
        raise InputError("does not know MindIE's home", where=OPTION, advice="Name it: --mindie-home DIR.")
    generation = rendered.options.generation
    made = make_trial_certificates(rendered.config, generation, home, replace=replace)
    logger.warning(
        f"test certificates, not for production, in {home}: {len(made.files)} files until "
        f"{made.until:%Y-%m-%d}; {made.readme} lists them and says how a client uses its own"
    )
    if made.note:
        logger.warning(made.note)
    return changed(rendered, certificates=https_certificates(rendered.config, generation, home))


def _prepare_output(output: Path, replace: bool) -> None:
    """Refuse a target that MindIE or the user would not want written; make its folder."""
    from telechat_mindie.errors import OutputError
    from telechat_mindie.staging import DIR_MODE, reporting_os_errors

    if output.is_symlink():
        raise OutputError("is a symbolic link", where=output, advice="MindIE refuses links; name the real file.")
    if output.exists() and not replace:
        raise OutputError(
            "exists", where=output, advice=f"Patch it with --template {output}, or replace it with --force."
        )
    with reporting_os_errors(output):
        output.parent.mkdir(mode=DIR_MODE, parents=True, exist_ok=True)


def _tell(rendered: RenderedConfig, home: Path | None) -> None:
    """On stderr: what MindIE only warns about, and the certificates that are missing, refused or to be provided."""
    import os

    from telechat_mindie.service.certificates import fault

    for violation in rendered.warnings:
        logger.warning(violation)
    if home is not None:
        for item in rendered.certificates:
            if item.present and (reason := fault(item, home, os.geteuid())):
                logger.warning(f"{item.path}: names {item.file}, {reason[0]}. {reason[1]}")
    absent = [f"{item.file} ({item.path.rpartition('.')[2]})" for item in rendered.certificates if not item.present]
    if absent:
        state = "must be in MindIE's home" if home is None else f"are missing in {home}"
        note = f"note: HTTPS is on, and these files {state}: {', '.join(dict.fromkeys(absent))}."
        logger.info(f"{note} --insecure-http is without.")


def _tell_cards(rendered: RenderedConfig, cards: Cards, dtype: str, assumed: str | None) -> None:
    """On stderr: what this machine's cards say against the config, which may yet be meant for another machine."""
    import os

    from telechat_mindie.service.card_rules import check_devices
    from telechat_mindie.service.launch.rundir import cards_held, state_home

    held = cards_held(state_home(os.environ))
    rows: list[list[int]] = rendered.config["BackendConfig"]["npuDeviceIds"]
    for finding in check_devices(cards, [device for row in rows for device in row], dtype, held):
        logger.warning(f"{finding.where}: {finding.message}. {finding.advice}")
    if assumed is not None:
        logger.info(f"note: {assumed}")


def _explain(rendered: RenderedConfig, title: str, as_json: bool) -> None:
    from dataclasses import asdict

    from telechat_mindie.commands.output import print_json
    from telechat_mindie.service.explain import explain
    from telechat_mindie.service.schema.violations import show

    rows = explain(rendered)
    if as_json:
        print_json([asdict(row) for row in rows])
        return
    table = [(f"{row.path.removeprefix('$.')} = {show(row.value)}", row) for row in rows]
    width = min(EXPLAIN_WIDTH, max(len(text) for text, _ in table))
    print(f"{title} (*: other than in the file it was rendered over)")
    for text, row in table:
        print(f"{'*' if row.changed else ' '} {text:<{width}}  {row.origin:<14}  {row.reason}".rstrip())


def _print_result(rendered: RenderedConfig, output: Path | None) -> None:
    from telechat_mindie.commands.output import print_json

    print_json(
        {
            "output": None if output is None else str(output),
            "config": rendered.config,
            "warnings": [violation.as_dict() for violation in rendered.warnings],
            "certificates": [certificate.as_dict() for certificate in rendered.certificates],
        }
    )


def _same_file(first: Path, second: Path) -> bool:
    return first.exists() and second.exists() and first.samefile(second)
