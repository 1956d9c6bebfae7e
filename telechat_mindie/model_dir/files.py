"""The files of a model directory against its manifest: all there, none too many, of the size and content they had."""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from telechat_mindie.checkpoint.formats.tensors import open_regular
from telechat_mindie.errors import CheckpointError, name_some
from telechat_mindie.findings import Finding, error, ok, warning
from telechat_mindie.model_dir.manifest import MANIFEST, REBUILD_AS, Entry, section
from telechat_mindie.model_dir.modes import file_status
from telechat_mindie.text.settings import template_names

REQUIRED = ("config.json", "tokenizer.model", "tokenizer_config.json")

_YAMLS = (".yaml", ".yml")
EDITABLE = (".json", ".jinja", *_YAMLS)
"""What a person may change after a build, within what the other rules allow."""

CHUNK = 8 << 20


class Described(Protocol):
    """A directory of any backend, as far as its manifest describes it."""

    path: Path
    manifest: dict[str, Any] | None
    files: dict[str, Entry]

    @property
    def backend(self) -> str: ...


def differences(path: Path, listed: Mapping[str, object]) -> tuple[list[str], list[str]]:
    """Names that the manifest lists and that are not there, and names that are there and not listed."""
    present = {str(entry.relative_to(path)) for entry in path.rglob("*") if entry.is_symlink() or not entry.is_dir()}
    return sorted(listed.keys() - present), sorted(present - listed.keys() - {MANIFEST})


def changes(
    path: Path, listed: Mapping[str, Entry], progress: Callable[[int], object] | None = None
) -> Iterator[tuple[str, str]]:
    """Files of another size or content than the manifest says, each with what it has; those that are not there are
    passed over. All bytes are read."""
    buffer = memoryview(bytearray(CHUNK))
    for name, entry in sorted(listed.items()):
        if file_status(path / name) is None:
            continue
        digest, nbytes = hashlib.sha256(), 0
        try:
            with open(open_regular(path / name, path), "rb", buffering=0) as file:
                while count := file.readinto(buffer):
                    digest.update(buffer[:count])
                    nbytes += count
                    if progress:
                        progress(count)
        except (CheckpointError, OSError) as failure:
            yield name, str(failure).removeprefix(f"{path / name}: ")
            continue
        if nbytes != entry.nbytes:
            yield name, f"has {nbytes} bytes instead of {entry.nbytes}"
        elif digest.hexdigest() != entry.sha256:
            yield name, "has another sha256 than when it was built"


def check_files(parts: Described, required: Sequence[str] = REQUIRED) -> Iterator[Finding]:
    """Files that are missing, extra, or of another size."""
    listed, rebuild = section(parts.manifest, "files"), REBUILD_AS[parts.backend]
    missing, extra = differences(parts.path, dict.fromkeys(required) | parts.files)
    found = []
    if missing := [name for name in missing if name != "config.json"]:  # its absence was told when it was read
        found.append(error("missing-file", parts.path, f"lacks {name_some(missing)}", rebuild))
    for name, entry in parts.files.items():
        status = file_status(parts.path / name)
        if status is None or not stat.S_ISREG(status.st_mode) or name.endswith(EDITABLE):
            continue
        if status.st_size != entry.nbytes:
            message = f"has {status.st_size} bytes, {entry.nbytes} when it was built"
            found.append(error("size", parts.path / name, message, rebuild))
    # A second yaml has a rule of its own, and a model may be given its template later.
    known = {*listed, *template_names(parts.path)}
    strange = {name for name in extra if name not in known and not ("/" not in name and name.endswith(_YAMLS))}
    if weights := {name for name in strange if name.endswith(".safetensors")}:
        message = f"holds weights that build did not write: {name_some(weights)}"
        advice = "Move them away: every safetensors file is loaded."
        found.append(error("extra-weights", parts.path, message, advice))
    if others := strange - weights:
        message = f"holds files that build did not write: {name_some(others)}"
        found.append(warning("extra-file", parts.path, message, "Move them away."))
    yield from found
    if parts.manifest is not None and not found:
        yield ok("contents", parts.path, f"all {len(parts.files)} files of the manifest, and no others")


def check_hashes(parts: Described, progress: Callable[[int], object] | None = None) -> Iterator[Finding]:
    """Every file hashed again. An edited json or yaml is a warning, other changes are errors."""
    changed = 0
    for name, message in changes(parts.path, parts.files, progress):
        changed += 1
        if name.endswith(EDITABLE):
            yield warning("edited", parts.path / name, "was edited after the build", "Nothing to do if that was you.")
        else:
            yield error(
                "hash", parts.path / name, f"{message}: it is damaged or was replaced", REBUILD_AS[parts.backend]
            )
    if parts.files and not changed:
        yield ok("hashes", parts.path, f"{len(parts.files)} files have the bytes that build wrote")
