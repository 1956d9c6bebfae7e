"""Rules between the fields of ServerConfig, and between its ports and the others. Sources as in `base`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from telechat_mindie.mindie import is_since
from telechat_mindie.service.addresses import WILDCARDS
from telechat_mindie.service.ports import HIGHEST, LOWEST
from telechat_mindie.service.schema.base import is_address
from telechat_mindie.service.schema.settings import BACKEND, SERVER, Rule, Settings
from telechat_mindie.service.schema.violations import NOTHING, Violation, Words, error, warning

MAX_TLS_FILES = 3  # server_config.cpp:442, backend_config.cpp:22

LAYERWISE: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "layerwiseDisaggregatedRoleType": ("master or slave", lambda role: role in ("master", "slave")),
    "layerwiseDisaggregatedMasterIpAddress": ("IPv4 or IPv6 addresses in digits", is_address),
    "layerwiseDisaggregatedSlaveIpAddress": ("IPv4 or IPv6 addresses in digits", is_address),
    "layerwiseDisaggregatedDataPort": (f"ports from {LOWEST} to {HIGHEST}", lambda port: LOWEST <= port <= HIGHEST),
    "layerwiseDisaggregatedCrtlPort": (f"ports from {LOWEST} to {HIGHEST}", lambda port: LOWEST <= port <= HIGHEST),
}
"""What layerwise disaggregation wants of each field, or of each item of its list (server_config.cpp:537-564)."""


def all_zero_address(settings: Settings) -> Iterator[Violation]:
    """Listening on every interface needs allowAllZeroIpListening (src/utils/common_util.cpp:727, 753)."""
    if settings.server.get("allowAllZeroIpListening") is not False:
        return
    # 1.0.RC3 has no such switch, and what it does with 0.0.0.0 is not documented.
    known = settings.generation != "1.0" or settings.given(*SERVER, "allowAllZeroIpListening")
    report = error if known else warning
    expected = "the address of one interface, or allowAllZeroIpListening true"
    repair = "Name the interface to serve on, or set allowAllZeroIpListening to true behind a firewall."
    for name, address in _written(settings).items():
        if name in ("ipAddress", "managementIpAddress") and address.strip("[]") in WILDCARDS:
            yield report((*SERVER, name), "all-zero-ip", expected, address, repair)


def planes(settings: Settings) -> Iterator[Violation]:
    """Business and metrics plane cannot share a port of one address without management (http_server.cpp:389-423 in
    src/server/endpoint/http_wrapper: the one combination that falls through every branch)."""
    address, port, management, management_port, metrics_port = _planes(_written(settings))
    known = None not in (address, port, management, management_port)
    if known and address == management and metrics_port == port != management_port:
        expected = f"a port other than {port}, or managementPort {port} as well"
        repair = "Give the metrics a port of their own, or merge all three planes on one port."
        yield error((*SERVER, "metricsPort"), "planes", expected, metrics_port, repair)


def ports_apart(settings: Settings) -> Iterator[Violation]:
    """The port between machines is not the business port (config_manager_impl.cpp:338), whether or not it is used."""
    server, port = settings.server, settings.server.get("port")
    if port is not None and port == settings.backend.get("multiNodesInferPort"):
        repair = "Change port, or BackendConfig.multiNodesInferPort."
        yield error((*SERVER, "port"), "port-clash", "a port other than multiNodesInferPort", port, repair)
    inter = server.get("interCommPort") if server.get("inferMode") == "dmi" else None
    for name in ("port", "managementPort", "metricsPort"):
        if inter is not None and server.get(name) == inter:
            repair = "Each listening port of the daemon must differ; change interCommPort."
            yield error((*SERVER, "interCommPort"), "port-clash", f"a port other than {name}", inter, repair)


def https_fields(server: Mapping[str, Any], generation: str) -> list[str]:
    """The fields that httpsEnabled makes compulsory (doc:31-34, 38-40, 44-46).

    The two inner planes are spared where all share address and port (server_config.cpp:392-397).
    """
    needed = ["tlsCaPath", "tlsCaFile", "tlsCert", "tlsPk"]
    address, port, management, management_port, metrics_port = _planes(server)
    if address != management or not port == management_port == metrics_port:
        needed += ["managementTlsCaFile", "managementTlsCert", "managementTlsPk"]
        # 2.0 ships without certificates for the metrics; of 2.1 and 2.2 it is not known.
        if is_since(generation, "2.3") or "metricsTlsCert" in server:
            needed += ["metricsTlsCaFile", "metricsTlsCert", "metricsTlsPk"]
    if generation == "1.0":
        needed += ["kmcKsfMaster", "kmcKsfStandby"]  # doc:50-51; a later 2.x dropped them, which one is not known
    return needed


def https_certificates(settings: Settings) -> Iterator[Violation]:
    """With httpsEnabled, each plane names its certificate, key and 1 to 3 CA files (server_config.cpp:428-475,
    477-535, 566-619)."""
    server, rule = settings.server, "https-certificates"
    if server.get("httpsEnabled") is not True:
        return
    repair = "Name what is there, or render it without HTTPS for a trusted network: service-config --insecure-http."
    for name in https_fields(_written(settings), settings.generation):
        value = server.get(name)
        if not settings.given(*SERVER, name):
            expected = "its file below MindIE's home, since httpsEnabled is true"
            yield error((*SERVER, name), rule, expected, NOTHING, repair)
        elif value is not None and (not value or (isinstance(value, list) and len(value) > MAX_TLS_FILES)):
            expected = f"1 to {MAX_TLS_FILES} file names" if isinstance(value, list) else "a path"
            yield error((*SERVER, name), rule, expected, value, repair)
    for name in ("tlsCrl", "managementTlsCrl", "metricsTlsCrl"):
        files, expected = server.get(f"{name}Files", []), f"at most {MAX_TLS_FILES} file names"
        if server.get(f"{name}Path") and len(files) > MAX_TLS_FILES:
            yield error((*SERVER, f"{name}Files"), rule, expected, files, "Merge the revocation lists.")


def node_certificates(settings: Settings) -> Iterator[Violation]:
    """interNodeTLSEnabled reads its files' names even on a single machine (backend_config.cpp:59-98, 192-202).

    1.0 names single files, of which nothing is known; so it is left out.
    """
    if settings.backend.get("interNodeTLSEnabled") is not True or settings.generation == "1.0":
        return
    repair = "Name it, or set interNodeTLSEnabled to false on a single machine."
    why = "since interNodeTLSEnabled is true"
    for name in ("interNodeTlsCert", "interNodeTlsPk", "interNodeTlsCaPath", "interNodeTlsCrlPath"):
        if not settings.given(*BACKEND, name):
            yield error((*BACKEND, name), "inter-node-tls", f"a path below MindIE's home, {why}", NOTHING, repair)
    for name, least in (("interNodeTlsCaFiles", 1), ("interNodeTlsCrlFiles", 0)):
        files = settings.backend.get(name) if settings.given(*BACKEND, name) else []
        if files is not None and not least <= len(files) <= MAX_TLS_FILES:
            expected = f"{least} to {MAX_TLS_FILES} file names, {why}"
            yield error((*BACKEND, name), "inter-node-tls", expected, files, repair)


def layerwise_server(settings: Settings) -> Iterator[Violation]:
    """Layerwise disaggregation (ATB only): roles, ports and what excludes it (server_config.cpp:537-564,
    config_manager_impl.cpp:223-320)."""
    server, backend, schedule = settings.server, settings.backend, settings.schedule
    if server.get("layerwiseDisaggregated") is not True:
        return
    for name, (expected, holds) in LAYERWISE.items():
        value, repair = server.get(name, []), "Correct it, or set layerwiseDisaggregated to false."
        for item in value if isinstance(value, list) else [value]:
            if not holds(item):
                yield error((*SERVER, name), "layerwise", expected, item, repair)
    conflicts = {
        "multiNodesInferEnabled": backend.get("multiNodesInferEnabled"),
        "distDPServerEnabled": server.get("distDPServerEnabled"),
        "supportSelectBatch": schedule.get("supportSelectBatch"),
        "bufferResponseEnabled": schedule.get("bufferResponseEnabled"),
        "templateType": schedule.get("templateType") == "Mix",
        "backendType": settings.serves_with("ms") or settings.serves_with("torch"),
    }
    if clash := [name for name, on in conflicts.items() if on]:
        here, found = (*SERVER, "layerwiseDisaggregated"), Words(f"true beside {', '.join(clash)}")
        expected = "false, or ATB with templateType Standard and none of the features it excludes"
        repair = "Set layerwiseDisaggregated to false: TeleChat2's MindSpore backend does not know it."
        yield error(here, "layerwise", expected, found, repair)


def _written(settings: Settings) -> dict[str, Any]:
    """The sound values of ServerConfig that stand in the file, without defaults."""
    return {name: value for name, value in settings.server.items() if settings.given(*SERVER, name)}


def _planes(server: Mapping[str, Any]) -> tuple[Any, Any, Any, Any, Any]:
    """Address and port of the business and the management plane, and the metrics port (server_config.cpp:299-306)."""
    address, port = server.get("ipAddress"), server.get("port")
    management = server.get("managementIpAddress", address), server.get("managementPort", port)
    return (address, port, *management, server.get("metricsPort"))


RULES: tuple[Rule, ...] = (
    all_zero_address,
    planes,
    ports_apart,
    https_certificates,
    node_certificates,
    layerwise_server,
)
