"""The client's side of HTTPS for the commands that ask a service."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import ssl


def service_tls(url: str, ca_cert: Path | None, cert: Path | None, key: Path | None) -> ssl.SSLContext | None:
    """From the files named; where none is, as `launch` was told for a daemon of this host that runs at this address.

    Raises:
        InputError: a file is not what it is named for.
        ClientRefusedError: the files that `launch` was told of cannot be used.
    """
    if (ca_cert, cert, key) == (None, None, None) and url.startswith("https://"):
        from telechat_mindie.service.launch.client_tls import remembered_tls
        from telechat_mindie.service.launch.rundir import state_home

        return remembered_tls(state_home(os.environ), url)
    from telechat_mindie.client.client import client_tls

    return client_tls(ca_cert, cert, key)
