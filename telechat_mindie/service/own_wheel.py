"""A wheel of the package that runs here, so that an image gets this very code and asks no registry for it."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import io
import zipfile
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path

import telechat_mindie
from telechat_mindie.errors import InputError

DISTRIBUTION = "telechat-mindie"

_INSTALLERS = {"RECORD", "INSTALLER", "REQUESTED", "direct_url.json"}
"""What an installer adds to a wheel's metadata; RECORD is written anew."""

_EPOCH = (1980, 1, 1, 0, 0, 0)  # of every member, so that the same code gives the same bytes


def pack_wheel() -> tuple[str, bytes]:
    """The name and the bytes of a wheel with the files of the package as they are imported here, whether it was
    installed or is a source tree that pip installed for editing.

    Nothing is built: the package has no compiled parts, so a wheel is its files with the metadata of the installation
    (https://packaging.python.org/en/latest/specifications/binary-distribution-format/).

    Raises:
        InputError: it is not installed, or its metadata are those of another version.
    """
    version = telechat_mindie.__version__
    name = f"telechat_mindie-{version}"
    # A source tree that is installed for editing may hold metadata of its own, which are not a wheel's.
    found = [(one.version, list(_metadata_files(one, f"{name}.dist-info"))) for one in _installations()]
    metadata = next((files for installed, files in found if files and installed == version), None)
    if metadata is None:
        raise InputError(
            "cannot be packed",
            where=f"telechat-mindie {version}",
            expected="an installation of this version, whose metadata go into the wheel",
            found=", ".join(sorted({installed for installed, files in found if files})) or "none",
            advice="Install it (pip install -e . in a source tree), or name a wheel with --wheel, or an index with "
            "--index-url.",
        )
    members = dict(sorted((*_package_files(), *metadata)))
    record = "".join(f"{path},{_digest(data)},{len(data)}\n" for path, data in members.items())
    members[f"{name}.dist-info/RECORD"] = (record + f"{name}.dist-info/RECORD,,\n").encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, data in members.items():
            entry = zipfile.ZipInfo(path, _EPOCH)
            entry.external_attr = 0o100644 << 16
            archive.writestr(entry, data, zipfile.ZIP_DEFLATED)
    return f"{name}-py3-none-any.whl", buffer.getvalue()


def _package_files() -> Iterator[tuple[str, bytes]]:
    """Of the package, and of the templates, which lie beside it in a source tree and inside it where installed."""
    package = "telechat_mindie"
    folders = {package: Path(telechat_mindie.__file__).parent}
    with resources.as_file(resources.files(f"{package}.model_dir_template")) as templates:
        folders[f"{package}/model_dir_template"] = templates
        for target, folder in folders.items():
            for path in folder.rglob("*"):
                parts = path.relative_to(folder).parts
                if path.is_file() and "__pycache__" not in parts and not any(part.startswith(".") for part in parts):
                    yield "/".join((target, *parts)), path.read_bytes()


def _installations() -> Iterable[importlib.metadata.Distribution]:
    return importlib.metadata.distributions(name=DISTRIBUTION)


def _metadata_files(installed: importlib.metadata.Distribution, folder: str) -> Iterator[tuple[str, bytes]]:
    for file in installed.files or ():
        if file.parts[0].endswith(".dist-info") and file.name not in _INSTALLERS:
            yield "/".join((folder, *file.parts[1:])), file.read_binary()


def _digest(data: bytes) -> str:
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def read_wheel(path: Path) -> tuple[str, bytes]:
    """The name and the bytes of a wheel of this package that the user names.

    Raises:
        InputError: it cannot be read, or is not a wheel of this package.
    """
    try:
        data = path.read_bytes()
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            found = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    except (OSError, zipfile.BadZipFile) as failure:
        raise InputError(f"cannot be read: {failure}", where=f"--wheel {path}", expected="a wheel") from None
    if path.suffix != ".whl" or not [name for name in found if name.startswith("telechat_mindie-")]:
        raise InputError("is no wheel of telechat-mindie", where=f"--wheel {path}", found=found or "no metadata")
    return path.name, data
