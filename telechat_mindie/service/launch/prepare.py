"""Everything about a launch that is settled before anything starts: config, ports, environment, command."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from telechat_mindie.findings import Finding
from telechat_mindie.mindie import DAEMON, RANK_PORTS, SERVER_PORTS
from telechat_mindie.model_dir.layout import ModelDir
from telechat_mindie.service import DEFAULT_GENERATION, ports, schema
from telechat_mindie.service.check import CheckOptions, check, check_config
from telechat_mindie.service.facts import model_facts
from telechat_mindie.service.launch.client import OWN_FILES, ClientFiles
from telechat_mindie.service.launch.environment import daemon_environment
from telechat_mindie.service.launch.installation import (
    Installation,
    NotInstalledError,
    find_installation,
)
from telechat_mindie.service.launch.processes import Identity
from telechat_mindie.service.launch.rundir import LaunchPlan, RunDirectory, all_runs
from telechat_mindie.service.options import ModelFacts, ServiceOptions
from telechat_mindie.service.render import RenderedConfig, render_service_config
from telechat_mindie.service.schema.settings import SERVER
from telechat_mindie.service.schema.violations import typed_at

WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""Where a daemon that listens everywhere is reached from its own host."""

MAX_NAME = 200  # characters of a model's name in a folder's name; MindIE takes 256, a file system 255


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
    """

    run: RunDirectory
    plan: LaunchPlan
    rendered: RenderedConfig
    facts: ModelFacts
    installation: Installation | None
    environment: Mapping[str, str]


def prepare(
    model_path: Path,
    options: ServiceOptions,
    home: Path,
    environment: Mapping[str, str],
    *,
    generation: str | None = None,
    need_mindie: bool = True,
    client: ClientFiles = OWN_FILES,
) -> Prepared:
    """Find MindIE, choose ports that neither this host nor another launch uses, and render the config for them.

    Args:
        model_path: a model directory.
        options: of the config; its generation is replaced.
        home: the folder of all runs.
        environment: the caller's.
        generation: of MindIE's config; None takes that of the MindIE found.
        client: the files of this host's own clients of HTTPS.
        need_mindie: refuse where there is no MindIE. Otherwise the command is what would be run if there were one.

    Raises:
        LaunchError: no MindIE that can serve TeleChat2.
        ModelDirError, ConfigError: the directory is incomplete, or the config would be refused.
        InputError: an option does not fit the directory or the host.
    """
    facts = model_facts(ModelDir.open(model_path))
    installation: Installation | None = None
    try:
        installation = find_installation(options.mindie_home, environment)
    except NotInstalledError:
        if need_mindie:
            raise
    chosen = generation or (installation.generation if installation else DEFAULT_GENERATION)
    mindie_home = installation.home if installation else None
    taken = reserved_ports(home)

    def is_free(port: int) -> bool:
        return port not in taken and ports.is_free(port)

    options = replace(options, generation=chosen, mindie_home=mindie_home)
    rendered = render_service_config(facts, _with_free_ports(options, is_free), is_free)
    server = rendered.config["ServerConfig"]
    used = {name: int(server.get(name, server["port"])) for name in SERVER_PORTS}
    for name, default in RANK_PORTS.items():
        wanted = environment.get(name, "")
        base = int(wanted) if wanted.isdigit() and ports.LOWEST <= int(wanted) <= ports.HIGHEST else default
        used[name] = ports.free_run(base, 1, set(used.values()), is_free)
    model_name = str(rendered.config["BackendConfig"]["ModelDeployConfig"]["ModelConfig"][0]["modelName"])
    run = RunDirectory(home / f"{model_name[:MAX_NAME]}-{used['port']}")
    variables = daemon_environment(
        environment,
        run,
        used,
        generation=chosen,
        home=mindie_home,
        shadow=installation is None or not installation.has_mindformers,
    )
    plan = LaunchPlan(
        name=run.name,
        model_path=facts.model_path,
        generation=chosen,
        command=installation.command if installation else (DAEMON,),
        environment=variables,
        ports=used,
        urls=_urls(server, environment),
        tls_home=str(mindie_home) if server["httpsEnabled"] and mindie_home else None,
        model_name=model_name,
        launcher=Identity.of(os.getpid()),
        client=client,
    )
    return Prepared(run, plan, rendered, facts, installation, {**environment, **variables})


def check_prepared(prepared: Prepared, device_mem_gb: float) -> list[Finding]:
    """The findings of `check` for the model directory, and of its rules for the config and the environment."""
    options = CheckOptions(
        generation=prepared.plan.generation,
        device_mem_gb=device_mem_gb,
        environment=prepared.environment,
        mindie_home=prepared.installation.home if prepared.installation else None,
    )
    report = check(Path(prepared.plan.model_path), options)
    config = check_config(prepared.rendered.config, prepared.run.config, prepared.facts, options)
    return [finding for finding in (*report.findings, *config) if finding.severity != "ok"]


def reserved_ports(home: Path) -> set[int]:
    """Ports of the launches that are active. A daemon binds its own only when the model is loaded."""
    return {port for run in all_runs(home) if run.is_active() for port in run.plan().ports.values()}


def _with_free_ports(options: ServiceOptions, is_free: ports.IsFree) -> ServiceOptions:
    """A template's ports are kept while they are free; else the next free ones from there on are taken."""
    if options.template is None or options.port_base is not None:
        return options
    config = schema.load(options.template)
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
        "business": _url(scheme, business, server["port"]),
        "management": _url(scheme, management, server.get("managementPort", server["port"])),
    }


def _url(scheme: str, address: str, port: int) -> str:
    bare = address.strip("[]")
    bare = WILDCARDS.get(bare, bare)
    return f"{scheme}://[{bare}]:{port}" if ":" in bare else f"{scheme}://{bare}:{port}"
