"""The files that TLS needs in MindIE's home, found and judged as the daemon does it.

A bare `:line` is in src/config_manager/server_config.cpp of MindIE-LLM v3.0.0.beta.2; backend_config.cpp and
param_checker.cpp are beside it, file_utils.cpp is in src/utils/log.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from telechat_mindie.service.schema import json_path
from telechat_mindie.service.schema.files import MAX_BYTES
from telechat_mindie.service.schema.rules_server import https_fields
from telechat_mindie.service.schema.settings import BACKEND, SERVER
from telechat_mindie.service.schema.violations import Location
from telechat_mindie.staging import FILE_MODE

Kind = Literal["file", "folder", "locked folder"]
Role = Literal["server", "server key", "authority", "revoked", "key store"]


@dataclass(frozen=True, slots=True)
class Certificate:
    """A file, or a folder of files, that a field of the config names.

    Attributes:
        path: JSON path of the field.
        file: relative to MindIE's home. MindIE joins the two as text, so that `/a` is a file of the home as well.
        present: whether it is there; None where MindIE's home is not known.
        role: what the file holds, or those of the folder: `revoked` are revocation lists.
        kind: of a `locked folder` MindIE wants the mode of a file.
    """

    path: str
    file: str
    present: bool | None
    role: Role
    kind: Kind = "file"

    @property
    def is_revocation(self) -> bool:
        return self.role == "revoked"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"is_revocation": self.is_revocation}


@dataclass(frozen=True, slots=True)
class Plane:
    """The fields for the TLS of one listener."""

    section: Location
    certificate: str
    key: str
    ca_folder: str
    ca_files: str
    crl_folder: str
    crl_files: str
    crl_folder_kind: Kind = "folder"


BUSINESS, MANAGEMENT, METRICS = (
    Plane(SERVER, f"{name}Cert", f"{name}Pk", "tlsCaPath", f"{name}CaFile", f"{name}CrlPath", f"{name}CrlFiles")
    for name in ("tls", "managementTls", "metricsTls")
)
BETWEEN_NODES = Plane(
    BACKEND,
    "interNodeTlsCert",
    "interNodeTlsPk",
    "interNodeTlsCaPath",
    "interNodeTlsCaFiles",
    "interNodeTlsCrlPath",
    "interNodeTlsCrlFiles",
    crl_folder_kind="locked folder",  # checked by the rule of a file: backend_config.cpp:125-127
)
"""Read by several machines only: config_manager_impl.cpp:332-335."""


def https_planes(config: Mapping[str, Any], generation: str) -> list[Plane]:
    """The listeners that a valid config gives TLS files of their own: none with httpsEnabled false, one where all share
    address and port."""
    server = config["ServerConfig"]
    if not server["httpsEnabled"]:
        return []
    needed = https_fields(server, generation)
    return [plane for plane in (BUSINESS, MANAGEMENT, METRICS) if plane.certificate in needed]


def https_certificates(config: Mapping[str, Any], generation: str, home: Path | None) -> tuple[Certificate, ...]:
    """Every certificate, key, CA file and revocation list that a valid config makes MindIE read for HTTPS."""
    return tuple(item for item in _https(config, generation, home) if item.kind == "file")


def tls_paths(config: Mapping[str, Any], generation: str, home: Path) -> Iterator[Certificate]:
    """The same with the folders around them, and those for the TLS between the machines of one instance."""
    yield from _https(config, generation, home)
    backend = config["BackendConfig"]
    if backend["multiNodesInferEnabled"] and backend["interNodeTLSEnabled"] and generation != "1.0":
        yield from _of_plane(backend, BETWEEN_NODES, home)


def _https(config: Mapping[str, Any], generation: str, home: Path | None) -> Iterator[Certificate]:
    server = config["ServerConfig"]
    for plane in https_planes(config, generation):
        yield from _of_plane(server, plane, home)
    if server["httpsEnabled"]:
        for name in https_fields(server, generation):
            if name.startswith("kmc"):
                yield _certificate((*SERVER, name), server[name], home, "key store")


def _of_plane(section: Mapping[str, Any], plane: Plane, home: Path | None) -> Iterator[Certificate]:
    """:428-474, :477-535, :566-619, backend_config.cpp:101-135. A folder and a name are joined as text."""
    here = plane.section
    ca_folder = section[plane.ca_folder]
    yield _certificate((*here, plane.certificate), section[plane.certificate], home, "server")
    yield _certificate((*here, plane.key), section[plane.key], home, "server key")
    yield _certificate((*here, plane.ca_folder), ca_folder, home, "authority", "folder")
    for name in section[plane.ca_files]:
        yield _certificate((*here, plane.ca_files), ca_folder + name, home, "authority")
    single = plane.crl_folder.removesuffix("Path")  # 1.0 names one file
    if section.get(single):
        yield _certificate((*here, single), section[single], home, "revoked")
    folder, files = section.get(plane.crl_folder), section.get(plane.crl_files)
    if folder and files:  # else none is read
        yield _certificate((*here, plane.crl_folder), folder, home, "revoked", plane.crl_folder_kind)
        for name in files:
            yield _certificate((*here, plane.crl_files), folder + name, home, "revoked")


def _certificate(location: Location, file: str, home: Path | None, role: Role, kind: Kind = "file") -> Certificate:
    is_there = os.path.isfile if kind == "file" else os.path.isdir  # pathlib's raise where this user may not look
    present = None if home is None else is_there(place(home, file))
    return Certificate(json_path(location), file, present, role, kind)


def place(home: Path, file: str) -> Path:
    """Where MindIE looks for a file of its home."""
    return Path(f"{home}/{file}")


def fault(certificate: Certificate, home: Path, uid: int) -> tuple[str, str] | None:
    """What MindIE has against a file, and what to do about it; None where it takes it.

    The rules of ParamChecker::CheckPath (param_checker.cpp:321-351, file_utils.cpp:175-351). Neither is root exempt
    from them, nor does MINDIE_CHECK_INPUTFILES_PERMISSION=0 help.

    Args:
        home: MindIE's home.
        uid: of the user that MindIE runs as.
    """
    path = place(home, certificate.file)
    try:
        status = path.lstat()
    except PermissionError:
        return "which this user may not look at", "Run the check as the user that runs MindIE."
    except (OSError, ValueError):
        status = None
    if status is None or not certificate.present:
        if certificate.file.startswith("/"):
            return f"which is not in {home}: MindIE looks for {path}", f"Write the path relative to {home}."
        advice = (
            "Put it there, or make a set to try HTTPS with (service-config --make-test-certificates), or serve "
            "without HTTPS where the network is trusted (--insecure-http)."
        )
        return f"which is not in {home}", advice
    if stat.S_ISLNK(status.st_mode):
        advice = f"Copy what it points to: cp -rL {path} {path}.copy && rm {path} && mv {path}.copy {path}"
        return "which is a symbolic link", advice
    real = path.resolve()
    if not real.is_relative_to(home.resolve()) or real == home.resolve():
        return f"which is outside {home}", "Copy it there; MindIE takes no file from elsewhere."
    if certificate.kind == "folder":
        return None
    if certificate.kind == "file" and not 0 < status.st_size <= MAX_BYTES:
        return f"which has {status.st_size} bytes", f"Put a PEM file of at most {MAX_BYTES} bytes there."
    if status.st_uid != uid:
        return f"which belongs to uid {status.st_uid}, and MindIE runs as {uid}", f"As root: chown {uid} {path}"
    if (mode := stat.S_IMODE(status.st_mode)) & ~FILE_MODE & 0o777:
        advice = f"chmod 640 {path}"
        if certificate.kind == "locked folder":  # which only root could then enter
            advice = f'Set {certificate.path} to "": MindIE judges this folder as if it were a file.'
        return f"which has mode {mode:04o}, over {FILE_MODE:04o}; root is not exempt", advice
    return None
