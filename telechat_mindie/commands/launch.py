"""`telechat-mindie launch`."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

import typer

from telechat_mindie.commands.completion import names_in
from telechat_mindie.commands.messages import logger
from telechat_mindie.commands.options import (
    GENERATION_NAMES,
    AsJson,
    CaCert,
    CardMem,
    ClientCert,
    ClientKey,
    Devices,
    InsecureHttp,
    Instances,
    MaxInputLen,
    MaxSeqLen,
    MindieHome,
    ModelPath,
    PortBase,
    Reserve,
    Set,
)

if TYPE_CHECKING:
    from telechat_mindie.findings import Finding
    from telechat_mindie.service.launch.client import Answer
    from telechat_mindie.service.launch.prepare import Prepared
    from telechat_mindie.service.launch.running import Launch

STYLES = {"error": "bold red", "warning": "yellow", "noise": "dim", "text": ""}


def launch(
    model_path: ModelPath,
    devices: Devices = None,
    instances: Instances = None,
    device_mem: CardMem = None,
    reserve: Reserve = None,
    max_seq_len: MaxSeqLen = None,
    max_input_len: MaxInputLen = None,
    host: str = typer.Option(None, "--host", help="Address to listen on; default: the config's, 127.0.0.1."),
    port_base: PortBase = None,
    insecure_http: InsecureHttp = False,
    set_: Set = None,
    template: Path = typer.Option(
        None,
        "--service-config",
        help="A conf/config.json to start from, which is not changed; default: conf/config.json here or in MindIE's "
        "home, where it was rendered for this directory.",
    ),
    new_config: bool = typer.Option(False, "--new-config", help="Render a config, whatever lies there."),
    name: str = typer.Option(None, "--name", help="What to call the run; default: the model's name and its port."),
    mindie_home: MindieHome = None,
    mindie: str = typer.Option(
        None,
        "--mindie",
        help=f"Generation of MindIE: {GENERATION_NAMES}; default: the installed one's.",
        autocompletion=names_in("mindie", "GENERATIONS"),
    ),
    timeout: float = typer.Option(1800, "--timeout", min=1, help="Seconds for the model to load."),
    prompt: str = typer.Option("你好", "--prompt", help="The first request."),
    max_tokens: int = typer.Option(32, "--max-tokens", min=1, help="Tokens of its answer, at most."),
    detach: bool = typer.Option(False, "--detach", help="Leave it running; see `status` and `stop`."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Print config, environment and command; start nothing."),
    ca_cert: CaCert = None,
    client_cert: ClientCert = None,
    client_key: ClientKey = None,
    as_json: AsJson = False,
) -> None:
    """Start MindIE's daemon for a model directory, ask it something, and keep it until Ctrl-C.

    The directory and the config are checked first. Config and log lie in a folder of their own, never in MindIE's.

    Exit codes: 1 where the daemon is up, but its first request failed; 2 where it did not start or has ended by itself.

    Examples:
        telechat-mindie launch model --insecure-http
        telechat-mindie launch model --service-config conf/config.json --detach
        telechat-mindie launch model --dry-run
    """
    from telechat_mindie.errors import InputError
    from telechat_mindie.service.launch.client_tls import client_files
    from telechat_mindie.service.launch.prepare import LaunchOptions, check_prepared, prepare
    from telechat_mindie.service.launch.rundir import locked, state_home
    from telechat_mindie.service.launch.running import Launch
    from telechat_mindie.service.options import ServiceOptions

    if new_config and template is not None:
        raise InputError("exclude each other", where="--new-config and --service-config")
    wanted = {
        "devices": devices,
        "instances": instances,
        "device_mem_gb": device_mem,
        "reserve_gb": reserve,
        "max_seq_len": max_seq_len,
        "max_input_len": max_input_len,
        "port_base": port_base,
    }
    named = {field: value for field, value in wanted.items() if value is not None}
    options = ServiceOptions(
        **named,  # type: ignore[arg-type]
        insecure_http=insecure_http,
        template=template,
        overrides=tuple(set_ or ()),
        mindie_home=mindie_home,
    )
    how = LaunchOptions(
        named=frozenset(named),
        generation=mindie,
        host=host,
        name=name,
        reuse=not new_config,
        need_mindie=not dry_run,
        client=client_files(ca_cert, client_cert, client_key),
    )
    environment = dict(os.environ)
    home = state_home(environment)
    with contextlib.nullcontext() if dry_run else locked(home):
        prepared = prepare(model_path, options, home, environment, how)
        if not dry_run:
            prepared.run.create(prepared.plan, prepared.rendered.text)
    try:
        for note in prepared.notes:
            logger.info(f"note: {note}")
        _tell(check_prepared(prepared), model_path)
    except BaseException:
        if not dry_run:
            prepared.run.remove()
        raise
    if dry_run:
        _print_plan(prepared, as_json)
        return
    with _signals_as_interrupts():
        daemon = Launch(prepared.run, detached=detach, on_line=_log_printer())
        is_up, fault = False, None
        try:
            daemon.wait_until_up(timeout)
            is_up = True  # from here on an interrupt means the service
            answer, fault = _first_answer(daemon, prompt, max_tokens, timeout)
            _announce(prepared, prompt, answer, fault, as_json)
            if not detach:
                daemon.follow()
                logger.info(f"{prepared.plan.name}: was stopped")
        except KeyboardInterrupt:
            if not is_up:
                daemon.stop()
                logger.info(f"{prepared.plan.name}: stopped before it was up")
                raise typer.Exit(130) from None
            _stop(daemon)
    if fault is not None:
        raise typer.Exit(1)


def _first_answer(daemon: Launch, prompt: str, max_tokens: int, timeout: float) -> tuple[Answer | None, str | None]:
    """The daemon's answer, or why there is none: it stays up either way."""
    from telechat_mindie.service.launch.client import UnansweredError

    try:
        return daemon.first_request(prompt, max_tokens, timeout), None
    except UnansweredError as failure:
        return None, str(failure)


def _announce(prepared: Prepared, prompt: str, answer: Answer | None, fault: str | None, as_json: bool) -> None:
    plan = prepared.plan
    if as_json:
        from telechat_mindie.commands.output import print_json

        print_json(
            {
                "name": plan.name,
                "urls": plan.urls,
                "ports": plan.ports,
                "config": str(prepared.run.config),
                "log": str(prepared.run.log),
                "prompt": prompt,
                "answer": None if answer is None else answer.text,
                "seconds": None if answer is None else round(answer.seconds, 3),
                "warning": fault,
            }
        )
    else:
        print(f"{plan.name} is up: {plan.urls['business']}, log {prepared.run.log}")
        if answer is not None:
            print(f"{prompt!r} was answered in {answer.seconds:.2f} s: {answer.text}")
    if fault is not None:
        logger.warning(f"it is up and stays up, but the first request failed: {fault}")
    sys.stdout.flush()


def _stop(daemon: Launch) -> None:
    """At the user's first interrupt; another one kills it."""
    from telechat_mindie.service.launch.errors import LaunchError

    logger.info(f"{daemon.plan.name}: stopping; once more to kill it")
    state = daemon.stop()
    if state is not None and state.survivors:
        raise LaunchError(
            "left processes that do not die", where=daemon.plan.name, found=list(state.survivors)
        ) from None


def _tell(findings: list[Finding], model_path: Path) -> None:
    """On stderr: what `check` finds. Errors refuse the launch."""
    from telechat_mindie.service.launch.errors import LaunchError

    for finding in findings:
        say = logger.error if finding.severity == "error" else logger.warning
        say(f"{finding.where}: {finding.message}. {finding.advice}".rstrip())
    errors = sum(finding.severity == "error" for finding in findings)
    if errors:
        raise LaunchError(
            "is not fit to be launched",
            where=model_path,
            found=f"{errors} error{'s' if errors > 1 else ''}, listed above",
            advice="Nothing was started.",
        )


def _print_plan(prepared: Prepared, as_json: bool) -> None:
    """What would be written, exported and run."""
    import shlex

    from telechat_mindie.commands.output import print_json

    plan, config = prepared.plan, prepared.run.config
    if as_json:
        print_json(
            {
                "config_path": str(config),
                "config": prepared.rendered.config,
                "environment": plan.environment,
                "command": list(plan.command),
                "ports": plan.ports,
                "urls": plan.urls,
            }
        )
        return
    print(f"# {config} (mode 0640)")
    print(prepared.rendered.text, end="" if prepared.rendered.text.endswith("\n") else "\n")
    print("# environment")
    for name, value in plan.environment.items():
        print(f"export {name}={shlex.quote(value)}")
    print("# command" if prepared.installation else "# command; no MindIE was found on this machine")
    print(shlex.join(plan.command))


def _log_printer() -> Callable[[str], None]:
    """Prints a line of the daemon's log on stderr, what says little dimmed where that can be seen."""
    from rich.console import Console
    from rich.text import Text

    from telechat_mindie.service.launch.log_advice import level

    console = Console(stderr=True, highlight=False, soft_wrap=True)

    def on_line(line: str) -> None:
        console.print(Text(line, STYLES[level(line)]))

    return on_line


@contextlib.contextmanager
def _signals_as_interrupts() -> Iterator[None]:
    """SIGTERM and SIGHUP as Ctrl-C, so that each of them ends the daemon first."""

    def interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, interrupt) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
