"""Probes of the host: limits, shared memory, ports, the user."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from fnmatch import fnmatch

from telechat_mindie.findings import Finding, ok, warning
from telechat_mindie.mindie import RANK_PORTS, SERVER_PORTS
from telechat_mindie.service import ports
from telechat_mindie.service.doctor.machine import Machine
from telechat_mindie.service.port_holder import port_holder
from telechat_mindie.units import GB, format_bytes

DEFAULT_PORTS = (*SERVER_PORTS.values(), *RANK_PORTS.values())

SHM_BYTES = GB  # --shm-size=1g of docs/zh/user_guide/install/source/image_usage_guide.md

SHM_LEFTOVERS = ("*llm_backend_*", "llm_tokenizer_shared_memory_*")
"""Names that a daemon which died leaves behind: user_manual/prefill_decode_mixed_deployment.md:283-287."""

OPEN_FILES = 4096  # maxLinkNum is 1000 as shipped, and twice as many may wait: a descriptor each, and the shards
PROCESSES = 4096  # a thread counts: tokenizers, workers, and the pools of MindSpore and HCCL in each


def check_limits(machine: Machine) -> Iterator[Finding]:
    """ulimit -n and -u of this shell, which the daemon inherits."""
    for name, kind, flag, least in (
        ("open files", resource.RLIMIT_NOFILE, "-n", OPEN_FILES),
        ("processes", resource.RLIMIT_NPROC, "-u", PROCESSES),
    ):
        soft, _ = resource.getrlimit(kind)
        shown = "unlimited" if soft == resource.RLIM_INFINITY else str(soft)
        if soft != resource.RLIM_INFINITY and soft < least:
            yield warning("ulimit", f"ulimit {flag}", f"allows {shown} {name}", f"ulimit {flag} {least}")
        else:
            yield ok("ulimit", f"ulimit {flag}", f"{shown} {name}")


def check_shared_memory(machine: Machine) -> Iterator[Finding]:
    """/dev/shm, through which the daemon and its workers talk."""
    folder = machine.path("/dev/shm")
    try:
        total = shutil.disk_usage(folder).total
        names = [entry.name for entry in folder.iterdir()]
    except OSError:
        yield warning("shm", folder, "cannot be read", "Mount a tmpfs there: docker run --shm-size=1g")
        return
    if total < SHM_BYTES:
        yield warning("shm", folder, f"has {format_bytes(total)}, 1 GiB is asked for", "docker run --shm-size=1g")
    else:
        yield ok("shm", folder, format_bytes(total))
    left = [name for name in names if any(fnmatch(name, pattern) for pattern in SHM_LEFTOVERS)]
    if left:
        patterns = " -o ".join(f"-name '{pattern}'" for pattern in SHM_LEFTOVERS)
        yield warning(
            "shm-leftovers",
            folder,
            f"{len(left)} objects of a daemon, such as {left[0]}",
            f"If none runs: find {folder} \\( {patterns} \\) -delete",
        )


def check_ports(machine: Machine) -> Iterator[Finding]:
    """MindIE's default ports."""
    held = {port: port_holder(port) for port in DEFAULT_PORTS if not ports.is_free(port)}
    for port, holder in held.items():
        yield warning(
            "port", f"port {port}", f"is held by {holder}", "Stop it, or choose another --port-base or MS_SCHED_PORT."
        )
    free = [str(port) for port in DEFAULT_PORTS if port not in held]
    if free:
        yield ok("port", "ports", f"{', '.join(free)} are free")


def check_user(machine: Machine) -> Iterator[Finding]:
    """Root passes MindIE's file rules; others must own the model directory."""
    if machine.uid == 0:
        yield ok("user", "root", "MindIE lets root pass its tests of owner and mode; other users are held to them")
    else:
        yield ok("user", f"uid {machine.uid}", "must own the model directory and conf/config.json, modes 0750 and 0640")


def check_memory(machine: Machine) -> Iterator[Finding]:
    """Memory of the host, which a worker needs while it loads."""
    for line in (machine.read("/proc/meminfo") or "").splitlines():
        if line.startswith("MemAvailable:") and (words := line.split())[1].isdigit():
            yield ok("host-memory", "memory", f"{format_bytes(int(words[1]) << 10)} free, {os.cpu_count()} CPU cores")
