"""The files that HTTPS needs in MindIE's home directory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from telechat_mindie.service.schema import json_path
from telechat_mindie.service.schema.rules_server import https_fields
from telechat_mindie.service.schema.settings import SERVER


@dataclass(frozen=True, slots=True)
class Certificate:
    """A file that a field of ServerConfig names; `present` is None where MindIE's home is not known."""

    path: str  # JSON path of the field
    file: str  # relative to MindIE's home
    present: bool | None


def https_certificates(config: Mapping[str, Any], generation: str, home: Path | None) -> tuple[Certificate, ...]:
    """Every certificate, key and CA file that a valid config makes MindIE read; none with httpsEnabled false.

    CA file names are appended to tlsCaPath as text, slash or not (MindIE-LLM v3.0.0.beta.2
    src/config_manager/server_config.cpp:465-469).
    """
    server = config["ServerConfig"]
    if not server["httpsEnabled"]:
        return ()
    return tuple(
        Certificate(json_path((*SERVER, name)), file, None if home is None else (home / file).is_file())
        for name in https_fields(server, generation)
        for file in _files(server, name)
    )


def _files(server: Mapping[str, Any], name: str) -> Iterator[str]:
    value = server[name]
    if isinstance(value, list):
        yield from (server["tlsCaPath"] + file for file in value)
    elif name != "tlsCaPath":
        yield value
