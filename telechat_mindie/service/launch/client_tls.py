"""The client's side of HTTPS for a run, as `launch` was told it and wrote it down."""

from __future__ import annotations

import ssl
from pathlib import Path

from telechat_mindie.errors import InputError
from telechat_mindie.reading import read_json
from telechat_mindie.service.launch.client import ClientFiles, Listener, tls_context
from telechat_mindie.service.launch.rundir import RunDirectory, all_runs


def client_files(ca_cert: Path | None, cert: Path | None, key: Path | None) -> ClientFiles:
    """What the user named, as another command finds it from another folder.

    Raises:
        InputError: a file is not there, or a key has no certificate.
    """
    if key is not None and cert is None:
        raise InputError("needs a certificate", where="--client-key", advice="Name it with --client-cert.")
    named = {"--ca-cert": ca_cert, "--client-cert": cert, "--client-key": key}
    for flag, path in named.items():
        if path is not None and not path.is_file():
            raise InputError("is not there", where=f"{flag} {path}", expected="a PEM file")
    return ClientFiles(*(None if path is None else str(path.absolute()) for path in named.values()))


def client_tls(run: RunDirectory, listener: Listener = "business") -> ssl.SSLContext | None:
    """For one of a run's listeners; None without HTTPS.

    Raises:
        ClientRefusedError: there is no certificate that this process may use.
        ConfigError: the run's config cannot be read.
    """
    plan = run.plan()
    if not plan.urls[listener].startswith("https:"):
        return None
    return tls_context(read_json(run.config), Path(plan.tls_home or "/"), plan.client, listener)


def remembered_tls(home: Path, url: str) -> ssl.SSLContext | None:
    """For the address of a run that is active, so that who launched it need not name its certificates again.

    Returns:
        None where no active run has this address.

    Raises:
        ClientRefusedError: its certificates cannot be used.
    """
    wanted = url.rstrip("/").removesuffix("/v1")
    for run in reversed(all_runs(home)):
        if run.plan().urls["business"] == wanted and run.is_active():
            return client_tls(run)
    return None
