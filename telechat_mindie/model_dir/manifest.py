"""manifest.json: what `build` made, and every file of it with size and hash."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from telechat_mindie.config import MAX_RANKS
from telechat_mindie.errors import ConfigError
from telechat_mindie.findings import Finding, error
from telechat_mindie.mindie import ATB, MS
from telechat_mindie.reading import read_json

MANIFEST = "manifest.json"
REBUILD = "Build the directory again: telechat-mindie build MODEL_PATH --checkpoint DIR --force"
REBUILD_AS = {MS: REBUILD, ATB: f"{REBUILD} --backend atb"}
"""By the backend that a directory is for."""

MAX_FILE_BYTES = 1 << 60  # beyond any file system; sums of sizes stay exact


def section(data: Mapping[str, Any] | None, *keys: str) -> Mapping[str, Any]:
    """The mapping at a path of keys, empty where there is none."""
    value: Any = data
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, Mapping) else {}


def backend_of(path: Path) -> str | None:
    """The backend that a directory was built for, ms where its manifest names none; None where it cannot be read."""
    with contextlib.suppress(ConfigError):
        return str(read_json(path / MANIFEST).get("backend", MS))
    return None


class Entry(NamedTuple):
    """One of the manifest's files: its size, and its sha256 in hex."""

    nbytes: int
    sha256: str


def sound_entries(manifest: Mapping[str, Any]) -> dict[str, Entry]:
    """The manifest's files by path; `check_manifest` tells of those that are left out."""
    files = section(manifest, "files")
    return {name: Entry(**entry) for name, entry in files.items() if not _fault(name, entry)}


KEYS: dict[str, type] = {"tp": int, "dtype": str, "qkv_concat": bool, "files": dict}
"""What a manifest must have; only weights for ms can be packed."""


def check_manifest(manifest: Mapping[str, Any], where: object, backend: str = MS) -> Iterator[Finding]:
    """The form of a manifest, key by key and file by file."""
    advice = REBUILD_AS[backend]
    for key, kind in KEYS.items():
        if key == "qkv_concat" and backend != MS:
            continue
        if type(manifest.get(key)) is not kind:
            yield error("manifest", where, f"manifest lacks {key}", advice)
    tp = manifest.get("tp")
    if type(tp) is int and not 1 <= tp <= MAX_RANKS:
        yield error("manifest", where, f"tp is out of range (expected 1 to {MAX_RANKS}, found {tp})", advice)
    for name, entry in section(manifest, "files").items():
        if fault := _fault(name, entry):
            yield error("manifest", f"{where}: files", f"{name!r} {fault}", advice)


def _fault(name: str, entry: object) -> str:
    if "\0" in name or not {"", ".", ".."}.isdisjoint(name.split("/")):
        return "is no file of this directory"
    if not isinstance(entry, dict) or entry.keys() != {"nbytes", "sha256"}:
        return "is described by something else than nbytes and sha256"
    size = entry["nbytes"]
    if type(size) is not int or not 0 <= size < MAX_FILE_BYTES:
        return f"has an nbytes that is no size: {size!r}"
    return "" if isinstance(entry["sha256"], str) else "has no sha256"
