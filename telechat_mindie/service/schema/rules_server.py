"""Rules between the fields of ServerConfig, and between its ports and the others. Sources as in `base`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from telechat_mindie.service.schema.base import is_address
from telechat_mindie.service.schema.settings import BACKEND, SERVER, Rule, Settings
from telechat_mindie.service.schema.violations import Violation, error, show, warning

MAX_TLS_FILES = 3  # server_config.cpp:442, backend_config.cpp:22


def all_zero_address(settings: Settings) -> Iterator[Violation]:
    """Listening on every interface needs allowAllZeroIpListening (src/utils/common_util.cpp:727, 753)."""
    if settings.server.get("allowAllZeroIpListening") is not False:
        return
    # 1.0.RC3 has no such switch, and what it does with 0.0.0.0 is not documented.
    known = settings.generation != "1.0" or settings.given(*SERVER, "allowAllZeroIpListening")
    report = error if known else warning
    for name in ("ipAddress", "managementIpAddress"):
        address = settings.server.get(name)
        if settings.given(*SERVER, name) and address is not None and address.strip("[]") in ("0.0.0.0", "::"):
            yield report(
                (*SERVER, name),
                "all-zero-ip",
                expected="the address of one interface, or allowAllZeroIpListening true",
                found=show(address),
                repair="Name the interface to serve on, or set allowAllZeroIpListening to true behind a firewall.",
            )


def planes(settings: Settings) -> Iterator[Violation]:
    """Business and metrics plane cannot share a port of one address without management (http_server.cpp:389-423 in
    src/server/endpoint/http_wrapper: the one combination that falls through every branch)."""
    address, port, management, management_port, metrics_port = _planes(_written(settings))
    if (
        None not in (address, port, management, management_port)
        and address == management
        and metrics_port == port != management_port
    ):
        yield error(
            (*SERVER, "metricsPort"),
            "planes",
            expected=f"a port other than {port}, or managementPort {port} as well",
            found=show(metrics_port),
            repair="Give the metrics a port of their own, or merge all three planes on one port.",
        )


def ports_apart(settings: Settings) -> Iterator[Violation]:
    """The port between machines is not the business port (config_manager_impl.cpp:338), whether or not it is used."""
    port, between = settings.server.get("port"), settings.backend.get("multiNodesInferPort")
    if port is not None and port == between:
        yield error(
            (*SERVER, "port"),
            "port-clash",
            expected="a port other than multiNodesInferPort",
            found=show(port),
            repair="Change port, or BackendConfig.multiNodesInferPort.",
        )
    if settings.server.get("inferMode") != "dmi":
        return
    inter = settings.server.get("interCommPort")
    for name in ("port", "managementPort", "metricsPort"):
        if inter is not None and settings.server.get(name) == inter:
            yield error(
                (*SERVER, "interCommPort"),
                "port-clash",
                expected=f"a port other than {name}",
                found=show(inter),
                repair="Each listening port of the daemon must differ; change interCommPort.",
            )


def https_fields(server: Mapping[str, Any], generation: str) -> list[str]:
    """The fields that httpsEnabled makes compulsory (doc:31-34, 38-40, 44-46).

    The two inner planes are spared where all share address and port (server_config.cpp:392-397).
    """
    needed = ["tlsCaPath", "tlsCaFile", "tlsCert", "tlsPk"]
    address, port, management, management_port, metrics_port = _planes(server)
    if address != management or not port == management_port == metrics_port:
        needed += ["managementTlsCaFile", "managementTlsCert", "managementTlsPk"]
        if generation == "3.0.0.beta":  # 2.0 ships without certificates for the metrics
            needed += ["metricsTlsCaFile", "metricsTlsCert", "metricsTlsPk"]
    if generation == "1.0":
        needed += ["kmcKsfMaster", "kmcKsfStandby"]  # doc:50-51; a later 2.x dropped them, which one is not known
    return needed


def https_certificates(settings: Settings) -> Iterator[Violation]:
    """With httpsEnabled, each plane names its certificate, key and 1 to 3 CA files (server_config.cpp:428-475,
    477-535, 566-619)."""
    server = settings.server
    if server.get("httpsEnabled") is not True:
        return
    for name in https_fields(_written(settings), settings.generation):
        value = server.get(name)
        if not _given(settings, name):
            yield error(
                (*SERVER, name),
                "https-certificates",
                expected="its file below MindIE's home, since httpsEnabled is true",
                found="nothing",
                repair="Name it, or set httpsEnabled to false where the network is trusted.",
            )
        elif value is not None and (not value or (isinstance(value, list) and len(value) > MAX_TLS_FILES)):
            yield error(
                (*SERVER, name),
                "https-certificates",
                expected=f"1 to {MAX_TLS_FILES} file names" if isinstance(value, list) else "a path",
                found=show(value),
                repair="Name what is there, or set httpsEnabled to false where the network is trusted.",
            )
    for name in ("tlsCrl", "managementTlsCrl", "metricsTlsCrl"):
        files = server.get(f"{name}Files", [])
        if server.get(f"{name}Path") and len(files) > MAX_TLS_FILES:
            yield error(
                (*SERVER, f"{name}Files"),
                "https-certificates",
                expected=f"at most {MAX_TLS_FILES} file names",
                found=show(files),
                repair="Merge the revocation lists.",
            )


def node_certificates(settings: Settings) -> Iterator[Violation]:
    """interNodeTLSEnabled reads its files' names even on a single machine (backend_config.cpp:59-98, 192-202).

    1.0 names single files, of which nothing is known; so it is left out.
    """
    if settings.backend.get("interNodeTLSEnabled") is not True or settings.generation == "1.0":
        return
    for name in ("interNodeTlsCert", "interNodeTlsPk", "interNodeTlsCaPath", "interNodeTlsCrlPath"):
        if not settings.given(*BACKEND, name):
            yield _node_violation(name, "a path below MindIE's home", "nothing")
    for name, least in (("interNodeTlsCaFiles", 1), ("interNodeTlsCrlFiles", 0)):
        files = settings.backend.get(name) if settings.given(*BACKEND, name) else []
        if files is not None and not least <= len(files) <= MAX_TLS_FILES:
            yield _node_violation(name, f"{least} to {MAX_TLS_FILES} file names", show(files))


def _node_violation(name: str, expected: str, found: str) -> Violation:
    return error(
        (*BACKEND, name),
        "inter-node-tls",
        expected=f"{expected}, since interNodeTLSEnabled is true",
        found=found,
        repair="Name it, or set interNodeTLSEnabled to false on a single machine.",
    )


def layerwise_server(settings: Settings) -> Iterator[Violation]:
    """Layerwise disaggregation (ATB only): roles, ports and what excludes it (server_config.cpp:537-564,
    config_manager_impl.cpp:223-320)."""
    server, backend, schedule = settings.server, settings.backend, settings.schedule
    if server.get("layerwiseDisaggregated") is not True:
        return
    role = server.get("layerwiseDisaggregatedRoleType")
    if role is not None and role not in ("master", "slave"):
        yield error(
            (*SERVER, "layerwiseDisaggregatedRoleType"),
            "layerwise",
            expected="master or slave",
            found=show(role),
            repair="Set the role, or layerwiseDisaggregated to false.",
        )
    for name in ("layerwiseDisaggregatedMasterIpAddress", "layerwiseDisaggregatedSlaveIpAddress"):
        for address in _as_list(server.get(name)):
            if not is_address(address):
                yield _layerwise_value(name, "IPv4 or IPv6 addresses in digits", address)
    for name in ("layerwiseDisaggregatedDataPort", "layerwiseDisaggregatedCrtlPort"):
        for port in _as_list(server.get(name)):
            if not 1024 <= port <= 65535:
                yield _layerwise_value(name, "ports from 1024 to 65535", port)
    conflicts = {
        "multiNodesInferEnabled": backend.get("multiNodesInferEnabled"),
        "distDPServerEnabled": server.get("distDPServerEnabled"),
        "supportSelectBatch": schedule.get("supportSelectBatch"),
        "bufferResponseEnabled": schedule.get("bufferResponseEnabled"),
        "templateType": schedule.get("templateType") == "Mix",
        "backendType": any(entry.get("backendType") not in (None, "atb") for entry in settings.models),
    }
    if clash := [name for name, on in conflicts.items() if on]:
        yield error(
            (*SERVER, "layerwiseDisaggregated"),
            "layerwise",
            expected="false, or ATB with templateType Standard and none of the features it excludes",
            found=f"true beside {', '.join(clash)}",
            repair="Set layerwiseDisaggregated to false: TeleChat2's MindSpore backend does not know it.",
        )


def _layerwise_value(name: str, expected: str, found: object) -> Violation:
    return error(
        (*SERVER, name),
        "layerwise",
        expected=expected,
        found=show(found),
        repair="Correct it, or set layerwiseDisaggregated to false.",
    )


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _given(settings: Settings, name: str) -> bool:
    return settings.given(*SERVER, name)


def _written(settings: Settings) -> dict[str, Any]:
    """The sound values of ServerConfig that stand in the file, without defaults."""
    return {name: value for name, value in settings.server.items() if _given(settings, name)}


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
