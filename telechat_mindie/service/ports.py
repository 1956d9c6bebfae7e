"""Ports that MindIE's daemon would find free."""

from __future__ import annotations

import socket
from collections.abc import Callable, Collection

from telechat_mindie.errors import InputError

LOWEST, HIGHEST = 1024, 65535

IsFree = Callable[[int], bool]


def is_free(port: int) -> bool:
    """Whether a port can be bound at this moment, by MindIE's own test.

    The daemon binds each of its ports on all interfaces, without SO_REUSEADDR, before it listens (MindIE-LLM
    v3.0.0.beta.2 src/server/endpoint/http_wrapper/http_server.cpp:216-241, 380): a listener on any address, or a
    connection that is still winding down, keeps it from starting.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def assume_free(_port: int) -> bool:
    """For a config of another machine, whose ports this one knows nothing of."""
    return True


def free_run(base: int, count: int, avoid: Collection[int] = (), is_free: IsFree = is_free) -> int:
    """The first port, from `base` on, that begins `count` free ports in a row, none of them in `avoid`.

    Raises:
        InputError: `base` is outside 1024 to 65535, or there is no such run.
    """
    if not LOWEST <= base <= HIGHEST:
        raise InputError("is not a port for MindIE", where=f"--port-base {base}", expected=f"{LOWEST} to {HIGHEST}")
    free = 0
    for port in range(base, HIGHEST + 1):
        free = free + 1 if port not in avoid and is_free(port) else 0
        if free == count:
            return port - count + 1
    raise InputError(
        f"has no {count} free ports in a row behind it",
        where=f"--port-base {base}",
        advice="Stop the daemon that holds them, or start from a lower port.",
    )
