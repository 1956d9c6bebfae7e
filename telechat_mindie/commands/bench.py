"""`telechat-mindie bench`: a group of commands that measure."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from telechat_mindie.commands.group import Command, Group
from telechat_mindie.commands.messages import logger
from telechat_mindie.commands.options import AsJson, CaCert, ClientCert, ClientKey, ServedModel

if TYPE_CHECKING:
    from telechat_mindie.loadtest.run import Outcome, Plan

Plot = Annotated[
    Path | None, typer.Option("--plot", help="Draw them into this file: .png, .svg, .pdf, as its ending says.")
]

bench = typer.Typer(
    cls=Group, help="Measure a service.", no_args_is_help=True, add_completion=False, rich_markup_mode=None
)


class Api(str, enum.Enum):
    """MindIE's streaming formats."""

    openai = "openai"
    tgi = "tgi"


@bench.callback()
def _group() -> None:
    """Measure a service."""


@bench.command(cls=Command)
def serve(
    url: str = typer.Option("http://127.0.0.1:1025", "--url", help="The service: MindIE, or `telechat-mindie serve`."),
    api: Api = typer.Option(Api.openai, "--api", help="/v1/chat/completions, or TGI's /generate_stream."),
    concurrency: int = typer.Option(None, "--concurrency", min=1, max=4096, help="Requests at a time; default: 8."),
    rate: float = typer.Option(None, "--rate", help="Requests a second at random times, in the place of a number."),
    requests: int = typer.Option(None, "--requests", min=1, help="Requests to send; default: 64."),
    duration: float = typer.Option(None, "--duration", help="Seconds to send for, in the place of a number."),
    prompt_tokens: str = typer.Option("128", "--prompt-tokens", help="Length of the prompts: 128, or 64:256."),
    output_tokens: str = typer.Option("128", "--output-tokens", help="Most tokens of an answer: 128, or 64:256."),
    prompts: Path = typer.Option(None, "--prompts", help="Prompts of your own: one a line, or .jsonl."),
    fixed_output: bool = typer.Option(
        None, "--fixed-output/--natural-output", help="Ignore the end of an answer; default: for random prompts."
    ),
    warm_up: int = typer.Option(2, "--warm-up", min=0, help="Requests to send before."),
    temperature: float = typer.Option(None, "--temperature", help="Default: the service's."),
    seed: int = typer.Option(0, "--seed", help="Seed of prompts, lengths and times."),
    model: ServedModel = None,
    timeout: float = typer.Option(600, "--timeout", min=1, help="Most seconds of a request."),
    ca_cert: CaCert = None,
    client_cert: ClientCert = None,
    client_key: ClientKey = None,
    as_json: AsJson = False,
    output: Path = typer.Option(None, "-o", "--output", help="Write the JSON into this file, for `bench compare`."),
    plot: Plot = None,
) -> None:
    """Load a service and report TTFT, TPOT, ITL, end-to-end latency and throughput.

    Exit code 1 where no request succeeded. Ctrl-C ends the test early and reports what it has.

    Examples:
        telechat-mindie bench serve --concurrency 16 --requests 200 --output before.json
        telechat-mindie bench serve --url http://127.0.0.1:1025 --rate 2 --duration 60 --plot load.svg
    """
    from telechat_mindie.commands.service_tls import service_tls
    from telechat_mindie.errors import InputError
    from telechat_mindie.loadtest.driver import Load
    from telechat_mindie.loadtest.prompts import Range
    from telechat_mindie.loadtest.run import Plan

    _check_targets(output, plot)
    if rate is not None and concurrency is not None:
        raise InputError("exclude each other", where="--rate and --concurrency")
    for name, value in (("--rate", rate), ("--duration", duration)):
        if value is not None and not 0 < value < 1e6:
            raise InputError("is out of range", where=name, expected="above 0", found=value)
    if requests is None and duration is None:
        requests = 64
    plan = Plan(
        url=url,
        api=api.value,
        load=Load(concurrency or 8, rate, requests, duration),
        prompt_tokens=Range.parse(prompt_tokens, "--prompt-tokens"),
        output_tokens=Range.parse(output_tokens, "--output-tokens"),
        prompts=prompts,
        fixed_output=(prompts is None and api is Api.openai) if fixed_output is None else fixed_output,
        warm_up=warm_up,
        temperature=temperature,
        seed=seed,
        model=model,
        timeout=timeout,
        tls=service_tls(url, ca_cert, client_cert, client_key),
    )
    _report(plan, _measure(plan), as_json=as_json, output=output, plot=plot)


@bench.command(cls=Command)
def compare(
    before: Path = typer.Argument(help="A report that `bench serve --output` or `--json` wrote."),
    after: Path = typer.Argument(help="Another."),
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Compare two load tests: what became better or worse, and by how much.

    Examples:
        telechat-mindie bench compare before.json after.json
        telechat-mindie bench compare before.json after.json --plot change.svg
    """
    from telechat_mindie.commands.output import print_json, print_table
    from telechat_mindie.loadtest.compare import compare as run

    _check_targets(None, plot)
    comparison = run(before, after)
    if as_json:
        print_json(comparison.as_dict())
    else:
        rows = [measure.row() for measure in comparison.measures]
        print_table(f"{before} and {after}", rows, ("", "before", "after", "change", ""))
    for name, (first, second) in comparison.differing.items():
        logger.info(f"note: other {name}: {first} before, {second} after")
    if plot is not None:
        from telechat_mindie.loadtest.plot import write_comparison

        write_comparison(plot, comparison)


def _measure(plan: Plan) -> Outcome:
    import asyncio

    from telechat_mindie.commands.output import count_progress
    from telechat_mindie.errors import InputError
    from telechat_mindie.loadtest.run import Outcome, run

    outcome = Outcome()
    try:
        with count_progress("requests") as start:
            advance = start(plan.load.requests)
            asyncio.run(run(plan, outcome, lambda: advance(1)))
    except KeyboardInterrupt:
        if not outcome.records:
            raise
        outcome.notes.append("interrupted: the requests that ran then are left out")
    if not outcome.records:
        raise InputError("ended before a request was sent", where="the test", advice="Raise --duration or --rate.")
    if outcome.busy > 0.8:
        outcome.notes.append(f"this client computed {outcome.busy:.0%} of the time: it may be what was measured")
    return outcome


def _check_targets(output: Path | None, plot: Path | None) -> None:
    """Refuse before a test what could not be written after it: also where matplotlib is missing."""
    from telechat_mindie.staging import check_file_target

    if output is not None:
        check_file_target(output)
    if plot is not None:
        from telechat_mindie.loadtest.plot import check_target

        check_target(plot)


def _report(plan: Plan, outcome: Outcome, *, as_json: bool, output: Path | None, plot: Path | None) -> None:
    from telechat_mindie.commands.output import print_json, print_table
    from telechat_mindie.loadtest.report import Report
    from telechat_mindie.staging import dump_json, write_file

    report = Report.of(outcome.records)
    load = plan.load
    how = f"{load.concurrency} at a time" if load.rate is None else f"{load.rate:g} requests/s"
    title = f"{plan.url}, {plan.api}: {report.requests} requests, {how}"
    data = {
        "settings": plan.settings(),
        **report.as_dict(),
        "client_busy": outcome.busy,
        "notes": outcome.notes,
    }
    if output is not None:
        write_file(output, dump_json(data))
    if as_json:
        print_json(data)
    else:
        print_table(title, report.rows(), ("", "mean", "p50", "p90", "p95", "p99", "max"))
        print(
            f"{report.output_tokens_per_second:,.1f} output tokens/s, {report.total_tokens_per_second:,.1f} tokens/s "
            f"with prompts, {report.requests_per_second:,.2f} requests/s over {report.seconds:.1f} s, "
            f"at most {report.peak_concurrency} at a time"
        )
        for note in outcome.notes:
            print(f"note: {note}")
    for kind, count in report.failed.items():
        example = next(record.message for record in outcome.records if record.error == kind)
        logger.warning(f"{count} failed, {kind}: {example}")
    if report.succeeded == 0:
        raise typer.Exit(1)
    if plot is not None:
        from telechat_mindie.loadtest.plot import write_plot

        write_plot(plot, outcome.records, title)
