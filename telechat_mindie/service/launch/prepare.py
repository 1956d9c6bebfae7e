"""Everything about a launch that is settled before anything starts: config, ports, environment, command."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from telechat_mindie.errors import InputError
from telechat_mindie.findings import Finding, error
from telechat_mindie.mindie import DAEMON, MS, RANK_PORTS, SERVER_PORTS
from telechat_mindie.service import ports, schema
from telechat_mindie.service.addresses import listen_on, url_of
from telechat_mindie.service.card_rules import card_memory, check_devices, check_toolkit
from telechat_mindie.service.cards import Cards, read_cards
from telechat_mindie.service.check import CheckOptions, check, check_config
from telechat_mindie.service.check.service_file import device_rows
from telechat_mindie.service.facts import generation_for, model_facts, open_model
from telechat_mindie.service.launch.client import OWN_FILES, ClientFiles
from telechat_mindie.service.launch.environment import daemon_environment
from telechat_mindie.service.launch.installation import (
    Installation,
    NotInstalledError,
    find_installation,
)
from telechat_mindie.service.launch.processes import Identity
from telechat_mindie.service.launch.reuse import as_it_stands, changes, find_usual, is_for
from telechat_mindie.service.launch.rundir import LaunchPlan, RunDirectory, active_runs, cards_of
from telechat_mindie.service.options import ModelFacts, ServiceOptions, parse_devices
from telechat_mindie.service.render import RenderedConfig, render_service_config
from telechat_mindie.service.schema.settings import SERVER
from telechat_mindie.service.schema.violations import typed_at
from telechat_mindie.service.trial_certificates import OPTION as TRIAL_OPTION

MAX_NAME = 200  # characters of a run's name, which is a folder's; MindIE takes 256 of a model's, a file system 255


@dataclass(frozen=True)
class LaunchOptions:
    """What a launch is told beside the options of its config.

    Attributes:
        named: the fields of ServiceOptions that the user gave; others stay as a config has them that is started from.
        generation: of MindIE's config; None takes that of the MindIE found.
        host: address that the business port listens on; None leaves it to the config.
        name: of the run; None for the model's name and its port.
        reuse: start from a config at a usual place that was rendered for this directory.
        need_mindie: refuse where there is no MindIE. Otherwise the command is what would be run if there were one.
        client: the files of this host's own clients of HTTPS.
    """

    named: frozenset[str] = frozenset()
    generation: str | None = None
    host: str | None = None
    name: str | None = None
    reuse: bool = True
    need_mindie: bool = True
    client: ClientFiles = OWN_FILES


PLAIN = LaunchOptions()


@dataclass(frozen=True)
class Prepared:
    """A launch that could start.

    Attributes:
        run: where its files go.
        plan: what is to be started.
        rendered: the config.
        facts: of the model directory.
        installation: the MindIE that was found; None where there is none.
        environment: the daemon's whole environment.
        cards: findings on the cards that it takes.
        notes: what the user should know of how the config came about, a sentence each.
    """

    run: RunDirectory
    plan: LaunchPlan
    rendered: RenderedConfig
    facts: ModelFacts
    installation: Installation | None
    environment: Mapping[str, str]
    cards: tuple[Finding, ...]
    notes: tuple[str, ...]


def prepare(
    model_path: Path,
    options: ServiceOptions,
    home: Path,
    environment: Mapping[str, str],
    launch: LaunchOptions = PLAIN,
) -> Prepared:
    """Find MindIE, choose ports that neither this host nor another launch uses, and render the config for them.

    Args:
        model_path: a model directory.
        options: of the config; its generation is replaced, and what is not named may be.
        home: the folder of all runs.
        environment: the caller's.
        launch: the other options.

    Raises:
        LaunchError: no MindIE that can serve TeleChat2.
        ModelDirError, ConfigError: the directory is incomplete, or the config would be refused.
        InputError: an option does not fit the directory or the host.
    """
    directory = open_model(model_path, launch.generation)
    facts = model_facts(directory, options.devices, options.instances)
    installation: Installation | None = None
    try:
        installation = find_installation(options.mindie_home, environment, facts.backend)
    except NotInstalledError:
        if launch.need_mindie:
            raise
    generation = launch.generation or (installation.generation if installation else generation_for(model_path))
    mindie_home = installation.home if installation else None
    active = active_runs(home)
    taken = {port for run in active for port in run.plan().ports.values()}

    def is_free(port: int) -> bool:
        return port not in taken and ports.is_free(port)

    seen = read_cards(environment)
    options = replace(options, generation=generation, mindie_home=mindie_home)
    options, config, notes = _sourced(options, launch, facts, mindie_home, seen)
    facts = model_facts(directory, options.devices, options.instances)  # which a config may name
    rendered = render_service_config(facts, _with_free_ports(options, config, is_free), is_free)
    if options.template is not None and (changed := changes(rendered)):
        notes.append(f"config: changed in a copy: {'; '.join(changed)}")
    server = rendered.config["ServerConfig"]
    used = {name: int(server.get(name, server["port"])) for name in SERVER_PORTS}
    for name, default in RANK_PORTS.items() if facts.backend == MS else ():
        wanted = environment.get(name, "")
        base = int(wanted) if wanted.isdigit() and ports.LOWEST <= int(wanted) <= ports.HIGHEST else default
        used[name] = ports.free_run(base, 1, set(used.values()), is_free)
    model_name = str(rendered.config["BackendConfig"]["ModelDeployConfig"]["ModelConfig"][0]["modelName"])
    run = RunDirectory(home / _run_name(launch.name or f"{model_name[: MAX_NAME - 6]}-{used['port']}", active))
    variables = daemon_environment(
        environment,
        run,
        used,
        generation=generation,
        home=mindie_home,
        shadow=installation is None or not installation.has_mindformers,
        backend=facts.backend,
    )
    if launch.host is not None and environment.get("MIES_CONTAINER_IP"):
        variables["MIES_CONTAINER_IP"] = str(server["ipAddress"])  # it would win over the config
    devices = [device for row in device_rows(rendered.config) for device in row]
    plan = LaunchPlan(
        name=run.name,
        model_path=facts.model_path,
        generation=generation,
        command=installation.command if installation else (DAEMON,),
        environment=variables,
        ports=used,
        urls=_urls(server, {**environment, **variables}),
        tls_home=str(mindie_home) if server["httpsEnabled"] and mindie_home else None,
        model_name=model_name,
        launcher=Identity.of(os.getpid()),
        client=launch.client,
        cards=tuple(seen.unmasked(device) for device in devices),
    )
    cards = (*check_devices(seen, devices, directory.dtype, cards_of(active)), *check_toolkit(environment))
    return Prepared(
        run, plan, rendered, facts, installation, {**environment, **variables}, cards=cards, notes=tuple(notes)
    )


def _sourced(
    options: ServiceOptions, launch: LaunchOptions, facts: ModelFacts, mindie_home: Path | None, cards: Cards
) -> tuple[ServiceOptions, dict[str, Any] | None, list[str]]:
    """The options with a config to start from and the memory of a card filled in; that config; what to say of it."""
    named, notes = set(launch.named), []
    template, config, how = options.template, None, "named by --service-config"
    if template is not None:
        config = schema.load(template)
    elif launch.reuse and (usual := find_usual(facts, mindie_home)):
        template, config = usual
        how = "which was rendered for this directory; --new-config renders another"
    if template is None or config is None:
        notes.append("config: rendered for this launch")
    elif is_for(config, facts):
        notes.append(f"config: started from {template}, {how}")
        options = as_it_stands(template, config, options, named)
    else:
        notes.append(f"config: started from {template}, whose model is another: what follows from this one is changed")
    if launch.host is not None:
        options = replace(options, overrides=(*listen_on(launch.host), *options.overrides))
    if "device_mem_gb" not in named:
        devices = parse_devices(options.devices) if options.devices is not None else None
        size, assumed = card_memory(cards, devices)
        options = replace(options, device_mem_gb=size)
        if assumed is not None and template is None:
            notes.append(assumed)
    return options, config, notes


def _run_name(name: str, active: list[RunDirectory]) -> str:
    if not re.fullmatch(rf"[a-zA-Z0-9][a-zA-Z0-9_.-]{{0,{MAX_NAME - 1}}}", name):
        raise InputError(
            "is no name for a run", where=f"--name {name}", expected=f"letters, digits, `_.-`, at most {MAX_NAME}"
        )
    if name in {run.name for run in active}:
        raise InputError("is the name of a run that is active", where=f"--name {name}", advice="Choose another.")
    return name


def check_prepared(prepared: Prepared) -> list[Finding]:
    """The findings of `check` for the model directory, and of its rules for the config, the environment, the cards."""
    options = CheckOptions(
        generation=prepared.plan.generation,
        device_mem_gb=prepared.rendered.options.device_mem_gb,
        environment=prepared.environment,
        mindie_home=prepared.installation.home if prepared.installation else None,
    )
    report = check(Path(prepared.plan.model_path), options)
    config = list(check_config(prepared.rendered.config, prepared.run.config, prepared.facts, options))
    if missing := list(_https(prepared, config)):
        config = [*missing, *(finding for finding in config if finding.id != "certificate")]
    if options.home is None:  # else check_config has told it
        without_effect = (item for item in prepared.rendered.warnings if item.rule == "other-file")
        config += [replace(item, where=f"{prepared.run.config}: {item.where}") for item in without_effect]
    found = (*report.findings, *config, *prepared.cards)
    return [finding for finding in found if finding.severity != "ok"]


def _https(prepared: Prepared, config: list[Finding]) -> Iterator[Finding]:
    """Certificates that are missing, in one finding: what HTTPS, MindIE's default, meets first."""
    refused = any(finding.id == "certificate" and finding.severity == "error" for finding in config)
    missing = dict.fromkeys(item.file for item in prepared.rendered.certificates if item.present is False)
    if refused and missing and prepared.installation is not None:
        home, model_path = prepared.installation.home, prepared.plan.model_path
        yield error(
            "certificate",
            "HTTPS",
            f"is on, as MindIE has it by default, and {home} lacks {', '.join(missing)}",
            "Launch with --insecure-http where the network is trusted; or put them there; or try it with a set of your "
            f"own making: telechat-mindie service-config {model_path} --mindie-home {home} {TRIAL_OPTION}",
        )


def _with_free_ports(
    options: ServiceOptions, config: Mapping[str, Any] | None, is_free: ports.IsFree
) -> ServiceOptions:
    """A template's ports are kept while they are free; else the next free ones from there on are taken."""
    if config is None or options.port_base is not None:
        return options
    named = [port for name in SERVER_PORTS if (port := typed_at(config, (*SERVER, name))) is not None]
    if all(map(is_free, named)):
        return options
    return replace(options, port_base=min(named))


def _urls(server: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, str]:
    """Business and management address; MIES_CONTAINER_IP and its sister win over the config."""
    scheme = "https" if server["httpsEnabled"] else "http"
    business = environment.get("MIES_CONTAINER_IP") or server["ipAddress"]
    management = environment.get("MIES_CONTAINER_MANAGEMENT_IP") or server.get("managementIpAddress", business)
    return {
        "business": url_of(scheme, business, server["port"]),
        "management": url_of(scheme, management, server.get("managementPort", server["port"])),
    }
