"""Addresses that a daemon listens on, and where a client on its own host reaches it."""

from __future__ import annotations

import ipaddress

from telechat_mindie.errors import InputError

WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""Where a daemon that listens everywhere is reached from its own host."""


def listen_on(host: str) -> tuple[str, ...]:
    """The settings, as `--set` takes them, with which the business port listens on an address.

    The management and the metrics port stay where they are: on 127.0.0.2, unless the config says otherwise. MindIE
    takes a wildcard only with allowAllZeroIpListening (MindIE-LLM v3.0.0.beta.2
    src/server/endpoint/http_wrapper/http_server.cpp:369-378).

    Raises:
        InputError: not an IP address. MindIE resolves no names.
    """
    try:
        address = str(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        raise InputError("is no IP address", where=f"--host {host}", expected="as 127.0.0.1, 0.0.0.0 or ::1") from None
    wildcard = ("ServerConfig.allowAllZeroIpListening=true",) if address in WILDCARDS else ()
    return (f"ServerConfig.ipAddress={address}", *wildcard)


def url_of(scheme: str, address: str, port: int) -> str:
    """As a client on this host reaches it."""
    bare = address.strip("[]")
    bare = WILDCARDS.get(bare, bare)
    return f"{scheme}://[{bare}]:{port}" if ":" in bare else f"{scheme}://{bare}:{port}"
