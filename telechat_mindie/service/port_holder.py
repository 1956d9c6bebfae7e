"""Which process listens on a port, as far as /proc tells this user."""

from __future__ import annotations

import contextlib
from pathlib import Path

LISTENING = "0A"  # TCP_LISTEN of the kernel's include/net/tcp_states.h


def port_holder(port: int, proc: Path = Path("/proc")) -> str:
    """`python3 (pid 4711)`, or `another process` where /proc does not say: it is another user's, or in a container."""
    inodes = _inodes(port, proc)
    if inodes:
        for folder in proc.iterdir():
            if folder.name.isdigit() and inodes & _sockets(folder):
                return f"{_name(folder)} (pid {folder.name})"
    return "another process"


def _inodes(port: int, proc: Path) -> set[str]:
    """The inodes of the sockets that listen on `port` on any address."""
    found = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in (proc / "net" / table).read_text().splitlines()[1:]:
                fields = line.split()
                if len(fields) > 9 and fields[3] == LISTENING and fields[1].rpartition(":")[2] == f"{port:04X}":
                    found.add(fields[9])
    return found


def _sockets(folder: Path) -> set[str]:
    """The inodes of a process's open sockets; empty for a process of another user."""
    found = set()
    with contextlib.suppress(OSError):
        for link in (folder / "fd").iterdir():
            with contextlib.suppress(OSError):
                target = str(link.readlink())
                if target.startswith("socket:["):
                    found.add(target[len("socket:[") : -1])
    return found


def _name(folder: Path) -> str:
    with contextlib.suppress(OSError):
        return (folder / "comm").read_text().strip()
    return "a process"
