"""`doctor`: the machine, probe by probe. None of them raises or hangs."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from telechat_mindie.findings import Finding, Report
from telechat_mindie.mindie import ATB, MS
from telechat_mindie.service.doctor.host import check_limits, check_memory, check_ports, check_shared_memory, check_user
from telechat_mindie.service.doctor.machine import Machine
from telechat_mindie.service.doctor.npu import check_cann, check_cards
from telechat_mindie.service.doctor.software import (
    check_atb,
    check_mindformers,
    check_mindie,
    check_mindspore,
    check_python,
)

Probe = Callable[[Machine], Iterable[Finding]]

HOST: tuple[Probe, ...] = (
    check_cards,
    check_cann,
    check_limits,
    check_shared_memory,
    check_ports,
    check_user,
    check_memory,
)

PROBES: dict[str, tuple[Probe, ...]] = {
    MS: (check_python, check_mindspore, check_mindformers, check_mindie, *HOST),
    ATB: (check_python, check_atb, *HOST),
}
"""By the backend that shall serve."""


def diagnose(machine: Machine | None = None, backend: str = MS) -> Report:
    """Run every probe on this machine, or on a staged one."""
    machine = machine or Machine()
    return Report.of(finding for probe in PROBES[backend] for finding in probe(machine))
