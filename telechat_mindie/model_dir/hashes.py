"""`check --full`: every file of the manifest, hashed again."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator

from telechat_mindie.checkpoint.formats.tensors import open_regular
from telechat_mindie.errors import CheckpointError
from telechat_mindie.findings import Finding, error, ok, warning
from telechat_mindie.model_dir.contents import EDITABLE, safe_entry
from telechat_mindie.model_dir.parts import REBUILD, Parts

CHUNK = 8 << 20


def hashed_bytes(parts: Parts) -> int:
    """Bytes that `check_hashes` will read, for a progress bar."""
    sizes = (entry.get("nbytes") for entry in parts.listed_files.values() if isinstance(entry, dict))
    return sum(size for size in sizes if type(size) is int)


def check_hashes(parts: Parts, progress: Callable[[int], None] = lambda count: None) -> Iterator[Finding]:
    """sha256 of each file against the manifest. An edited json or yaml is a warning, other changes are errors."""
    changed = 0
    for name, entry in parts.listed_files.items():
        path = safe_entry(parts, name)
        if path is None or not isinstance(entry, dict):
            continue  # told by the rules for contents
        try:
            descriptor = open_regular(path, parts.path)
        except CheckpointError:
            continue  # told by the rules for contents and files
        digest = hashlib.sha256()
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
                progress(len(chunk))
        if digest.hexdigest() == entry.get("sha256"):
            continue
        changed += 1
        if path.suffix in EDITABLE:
            yield warning("edited", path, "was edited after the build", "Nothing to do if that was you.")
        else:
            yield error("hash", path, "has other bytes than build wrote: it is damaged or was replaced", REBUILD)
    if parts.listed_files and not changed:
        yield ok("hashes", parts.path, f"{len(parts.listed_files)} files have the bytes that build wrote")
