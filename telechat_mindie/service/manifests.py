"""`manifests`: a model directory behind MindIE in containers, for docker compose or Kubernetes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from telechat_mindie import __version__
from telechat_mindie.errors import InputError
from telechat_mindie.mindie import DEFAULT_HOME, HOME_VARIABLES, rank_environment
from telechat_mindie.service import own_wheel, ports
from telechat_mindie.service.options import ModelFacts, ServiceOptions, device_groups
from telechat_mindie.service.render import RenderedConfig, render_service_config
from telechat_mindie.staging import StagedDirectory, write_file
from telechat_mindie.templates import render

KINDS = ("docker", "k8s")
DEFAULT_IMAGE = f"telechat-mindie:{__version__}"
MARKER = "start.sh"  # in every output of this module

MODELS_FOLDER = "/models"  # in the container
HOST_PORT_STEP = 10  # between the published ports of two containers of one machine

# MindIE-LLM v3.0.0.beta.2 docs/zh/user_guide/user_manual/environment_variable.md. Each container has a network of its
# own, so the default ports of the ranks cannot clash.
ENVIRONMENT = {
    **rank_environment(),
    "MINDIE_LOG_TO_STDOUT": "1",
    "MIES_SERVICE_MONITOR_MODE": "1",
}

_DOCKER_FILES = {"compose.yaml": "compose.yaml.j2"}
_K8S_FILES = {
    "kustomization.yaml": "k8s_kustomization.yaml.j2",
    "configmap.yaml": "k8s_configmap.yaml.j2",
    "deployment.yaml": "k8s_deployment.yaml.j2",
    "service.yaml": "k8s_service.yaml.j2",
    "poddisruptionbudget.yaml": "k8s_poddisruptionbudget.yaml.j2",
}


@dataclass(frozen=True)
class ManifestOptions:
    """What the user asked for.

    Attributes:
        kind: one of KINDS.
        image: an image with MindIE and this package; the Dockerfile that is written makes one.
        replicas: containers, each with tp cards.
        namespace: of Kubernetes.
        claim: a PersistentVolumeClaim that holds the model directory at its top; None mounts the node's own folder.
        tls_secret: a Secret of Kubernetes with the certificates; needed unless `service.insecure_http`.
        mindie_home: MindIE's home in the image.
        resource: the cards as the device plugin calls them.
        shm_gb: /dev/shm of a container, in GB of 2^30 bytes.
        wheel: of this package, which the image is given; None packs the code that runs here.
        index_url: where the image gets the package from instead, by its name and version.
        startup_minutes: how long loading may take before a pod counts as failed.
        service: options of the conf/config.json. Its devices are cards of the machine, for docker only.
    """

    kind: str
    image: str = DEFAULT_IMAGE
    replicas: int = 1
    namespace: str = "mindie"
    claim: str | None = None
    tls_secret: str | None = None
    mindie_home: str = DEFAULT_HOME
    resource: str = "huawei.com/Ascend910"
    shm_gb: int = 16
    startup_minutes: int = 30
    wheel: Path | None = None
    index_url: str | None = None
    service: ServiceOptions = field(default_factory=ServiceOptions)


def write_manifests(directory: Path, facts: ModelFacts, options: ManifestOptions, *, force: bool = False) -> list[str]:
    """Write the files of a deployment, all of them or none, and give their names.

    Raises:
        InputError: an option is malformed, or does not fit the model directory.
        ConfigError: MindIE would refuse the config.
        OutputError: the directory exists or cannot be written.
    """
    files: dict[str, bytes] = {}
    wheel = None
    if options.index_url is None:
        wheel, data = own_wheel.pack_wheel() if options.wheel is None else own_wheel.read_wheel(options.wheel)
        files[wheel] = data
    files |= {name: text.encode() for name, text in render_manifests(facts, options, wheel).items()}
    with StagedDirectory(directory, replace=force, marker=MARKER) as staged:
        for name, data in files.items():
            write_file(staged.path / name, data)
        staged.commit()
    return sorted(files)


def render_manifests(facts: ModelFacts, options: ManifestOptions, wheel: str | None) -> dict[str, str]:
    """The texts of a deployment by their files' names.

    Args:
        facts: of the model directory.
        options: of the user.
        wheel: the file beside the Dockerfile that it installs; None where the package comes from an index.

    Raises:
        InputError, ConfigError: as `write_manifests`.
    """
    _check(options)
    if not re.fullmatch(r"/[a-zA-Z0-9_./-]+", facts.model_path):
        raise InputError(
            "cannot be mounted", where=facts.model_path, expected="letters, digits, `_`, `-`, `.` and `/` only"
        )
    groups = device_groups(options.service.devices, facts.tp, options.replicas, "--replicas")
    config = _service_config(facts, options)
    server = config.config["ServerConfig"]
    values: dict[str, Any] = {
        **vars(options),
        "name": dns_label(facts.model_name),
        "wheel": wheel,
        "requirement": f"{own_wheel.DISTRIBUTION}=={__version__}",
        "cards": facts.tp,
        "groups": groups,
        "host_model_path": facts.model_path,
        "model_path": f"{MODELS_FOLDER}/{facts.model_name}",
        "startup_failures": options.startup_minutes * 6,  # a probe every ten seconds
        "https": server["httpsEnabled"],
        "port": server["port"],
        "management_port": server["managementPort"],
        "metrics_port": server["metricsPort"],
        "host_port_step": HOST_PORT_STEP,
        "home_variables": HOME_VARIABLES,
        "environment": ENVIRONMENT,
        "tls_files": {secret_key(item.file): item.file for item in config.certificates},
        "config": config.text,
    }
    values["start"] = render("start.sh.j2", **values)
    values["config_hash"] = hashlib.sha256((config.text + values["start"]).encode()).hexdigest()[:16]
    files = {"start.sh": values["start"], "Dockerfile": render("Dockerfile.j2", **values)}
    templates: Mapping[str, str] = _K8S_FILES
    if options.kind == "docker":
        templates, files["config.json"] = _DOCKER_FILES, config.text
    for file, template in templates.items():
        files[file] = render(template, **values)
        yaml.safe_load(files[file])
    return files


def dns_label(text: str) -> str:
    """A name that Kubernetes takes for any object, a Service included: lower case letters, digits and hyphens, a letter
    first, 63 at most."""
    label = re.sub(r"[^a-z0-9]+", "-", text.lower())[:50].strip("-")
    return label if label[:1].isalpha() else f"telechat-{label}".strip("-")


def secret_key(file: str) -> str:
    """The key of a Secret for a file below MindIE's home: `security/ca/ca.pem` as `security-ca-ca.pem`."""
    return file.replace("/", "-")


def _service_config(facts: ModelFacts, options: ManifestOptions) -> RenderedConfig:
    """As one container sees it: its cards are numbered from 0, its ports are all free, the model is mounted."""
    service = replace(options.service, devices=None, instances=1, mindie_home=None)
    inside = replace(facts, model_path=f"{MODELS_FOLDER}/{facts.model_name}")
    return render_service_config(inside, service, ports.assume_free)


def _check(options: ManifestOptions) -> None:
    if options.kind not in KINDS:
        raise InputError("unknown kind", where=f"--kind {options.kind}", expected=" or ".join(KINDS))
    for flag, text, pattern in (
        ("--image", options.image, r"[a-zA-Z0-9][a-zA-Z0-9._/:@-]{0,254}"),
        ("--namespace", options.namespace, r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"),
        ("--claim", options.claim, r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?"),
        ("--tls-secret", options.tls_secret, r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?"),
        ("--resource", options.resource, r"[a-z0-9.-]{1,253}/[a-zA-Z0-9._-]{1,63}"),
        ("--mindie-home", options.mindie_home, r"/[a-zA-Z0-9_./-]{0,4095}"),
        ("--index-url", options.index_url, r"https?://[a-zA-Z0-9][a-zA-Z0-9._~:/?=&%+-]{0,2000}"),
    ):
        if text is not None and not re.fullmatch(pattern, text):
            raise InputError("is malformed", where=f"{flag} {text}", expected=f"text that matches {pattern}")
    for flag, number, highest in (
        ("--replicas", options.replicas, 1000),
        ("--shm-gb", options.shm_gb, 1024),
        ("--startup-minutes", options.startup_minutes, 1440),
    ):
        if not 1 <= number <= highest:
            raise InputError("is out of range", where=f"{flag} {number}", expected=f"1 to {highest}")
    if options.wheel is not None and options.index_url is not None:
        raise InputError("exclude each other", where="--wheel and --index-url")
    if options.kind == "k8s":
        if options.service.devices is not None:
            raise InputError(
                "has no place in Kubernetes",
                where="--devices",
                advice="Leave it out: the device plugin chooses the cards of a pod.",
            )
        if not options.service.insecure_http and options.tls_secret is None:
            raise InputError(
                "is needed for HTTPS",
                where="--tls-secret",
                advice="Name a Secret with the certificates (docs/deploy.md), or say --insecure-http where the "
                "cluster's network is trusted.",
            )
    elif options.claim is not None or options.tls_secret is not None:
        raise InputError("is for --kind k8s", where="--claim, --tls-secret", advice="Leave it out.")
