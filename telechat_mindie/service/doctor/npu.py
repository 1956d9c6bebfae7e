"""Probes of the cards: device files, npu-smi, memory, driver, CANN."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass

from telechat_mindie.findings import Finding, error, ok, warning
from telechat_mindie.service.doctor.machine import Machine
from telechat_mindie.service.doctor.support import same_version, stack_with, stacks

DEVICE_FILES = ("davinci_manager", "devmm_svm", "hisi_hdc")
"""What a container needs beside /dev/davinciN: MindIE-LLM v3.0.0.beta.2 docs/zh/user_guide/install/source/
image_usage_guide.md."""

BUSY_SHARE = 0.1  # of a card's memory; an idle card of Atlas 800 A2 shows about 5 % in use

CANN_HOME = "/usr/local/Ascend/ascend-toolkit/latest"


@dataclass(frozen=True, slots=True)
class Card:
    """One NPU of `npu-smi info`. Memory in MB."""

    number: int
    name: str
    health: str
    used: int
    total: int


def device_numbers(machine: Machine) -> list[int]:
    """N of each /dev/davinciN."""
    try:
        names = [entry.name for entry in machine.path("/dev").iterdir()]
    except OSError:
        return []
    return sorted(int(match[1]) for name in names if (match := re.fullmatch(r"davinci(\d+)", name)))


def parse_npu_smi(text: str) -> list[Card]:
    """The cards in the table that `npu-smi info` prints: two lines a card, memory last on the second."""
    cards: list[Card] = []
    head: re.Match[str] | None = None
    for line in text.splitlines():
        if match := re.match(r"\|\s*(\d+)\s+(\S*\d{3}\S*)\s*\|\s*([A-Za-z]+)\s*\|", line):
            head = match
        elif head is not None and (pairs := re.findall(r"(\d+)\s*/\s*(\d+)", line)):
            used, total = max(((int(used), int(total)) for used, total in pairs), key=lambda pair: pair[1])
            cards.append(Card(int(head[1]), head[2], head[3], used, total))
            head = None
    return cards


def check_cards(machine: Machine) -> Iterator[Finding]:
    """The NPUs, or what works without any."""
    numbers = device_numbers(machine)
    if not numbers:
        yield warning(
            "npu",
            "/dev/davinci*",
            "there is no NPU here: a model can be built, checked and run on the CPU, and its service config and "
            "manifests rendered; only launch needs the cards",
            "Nothing to do on a machine without cards; in a container, pass --device=/dev/davinci0 and so on.",
        )
        return
    missing = [name for name in DEVICE_FILES if not machine.path(f"/dev/{name}").exists()]
    if missing:
        yield error(
            "npu-devices",
            "/dev",
            f"shows {len(numbers)} card(s), but not {', '.join(missing)}",
            "Pass " + " ".join(f"--device=/dev/{name}" for name in missing) + " to the container.",
        )
    closed = [n for n in numbers if not os.access(machine.path(f"/dev/davinci{n}"), os.R_OK | os.W_OK)]
    if closed:
        yield error(
            "npu-access",
            "/dev",
            f"this user may not open davinci{', davinci'.join(map(str, closed))}",
            "Add the user to the driver's group: usermod -aG HwHiAiUser USER",
        )
    text = machine.run("npu-smi", "info")
    if text is None:
        yield warning(
            "npu-smi",
            "npu-smi",
            f"is missing, fails, or does not answer within {machine.timeout:g} s",
            "Mount /usr/local/sbin or /usr/local/bin/npu-smi and /usr/local/Ascend/driver into a container; on a host "
            "reinstall the driver.",
        )
        return
    cards = parse_npu_smi(text)
    if not cards:
        yield warning("npu-smi", "npu-smi info", "lists no card", "Reinstall the driver, or restart the machine.")
    for card in cards:
        yield _card(card)


def _card(card: Card) -> Finding:
    where = f"NPU {card.number}"
    memory = f"{card.name}, {card.total} MB, {card.used} in use"
    if card.health.upper() != "OK":
        return error("npu-health", where, f"{memory}, health {card.health}", f"npu-smi info -t health -i {card.number}")
    if card.total and card.used > card.total * BUSY_SHARE:
        return warning(
            "npu-memory",
            where,
            f"{memory}: something runs on it",
            "Stop it, choose other --devices, or give service-config what is left as --device-mem.",
        )
    return ok("npu", where, memory)


def cann_version(machine: Machine) -> str | None:
    """The toolkit's version, from the install info in its home."""
    home = machine.environment.get("ASCEND_HOME_PATH") or machine.environment.get("ASCEND_TOOLKIT_HOME") or CANN_HOME
    architecture = platform.machine()
    for name in (f"{architecture}-linux/ascend_toolkit_install.info", "version.cfg", "compiler/version.info"):
        text = machine.read(f"{home}/{name}") or ""
        if match := re.search(r"(?im)^\s*(?:version|toolkit_installed_version)\s*=\s*\[?([\w.]+)", text):
            return match[1]
    return None


def driver_version(machine: Machine) -> str | None:
    """The driver's version, from its version.info."""
    text = machine.read("/usr/local/Ascend/driver/version.info") or ""
    match = re.search(r"(?im)^\s*version\s*=\s*(\S+)", text)
    return match[1] if match else None


def check_cann(machine: Machine) -> Iterator[Finding]:
    """CANN and driver beside MindSpore's version; only where there are cards."""
    if not device_numbers(machine):
        return
    cann, driver = cann_version(machine), driver_version(machine)
    if driver is None:
        yield warning(
            "driver",
            "/usr/local/Ascend/driver",
            "has no readable version.info",
            "Mount /usr/local/Ascend/driver into the container.",
        )
    else:
        yield ok("driver", "/usr/local/Ascend/driver", driver)
    if cann is None:
        yield error(
            "cann",
            "ASCEND_HOME_PATH",
            "no CANN toolkit was found",
            "source /usr/local/Ascend/ascend-toolkit/set_env.sh, or install the toolkit.",
        )
        return
    mindspore = machine.package("mindspore")
    row = stack_with(mindspore=mindspore.version) if mindspore and mindspore.version else None
    if row is not None and not same_version(row.cann, cann):
        fitting = next((stack.mindspore for stack in stacks() if same_version(stack.cann, cann)), None)
        advice = f"Install CANN {row.cann}" + (f", or MindSpore {fitting}." if fitting else ".")
        yield warning("cann", "CANN", f"is {cann}; MindSpore {row.mindspore} was released for {row.cann}", advice)
    else:
        yield ok("cann", "CANN", cann)
