"""Probes of the cards: device files, npu-smi, memory, driver, CANN."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator

from telechat_mindie.findings import Finding, error, ok, warning
from telechat_mindie.service.card_rules import check_card, check_mask, check_toolkit
from telechat_mindie.service.cards import device_files
from telechat_mindie.service.doctor.machine import Machine
from telechat_mindie.service.doctor.support import same_version, stack_with, stacks
from telechat_mindie.soc import CANN_HOME_VARIABLE, SOURCE_CANN

DEVICE_FILES = ("davinci_manager", "devmm_svm", "hisi_hdc")
"""What a container needs beside /dev/davinciN: MindIE-LLM v3.0.0.beta.2 docs/zh/user_guide/install/source/
image_usage_guide.md."""

CANN_HOME = "/usr/local/Ascend/ascend-toolkit/latest"  # where its installer puts it


def check_cards(machine: Machine) -> Iterator[Finding]:
    """The NPUs, or what works without any."""
    numbers = device_files(machine.root)
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
    yield from check_mask(machine.cards)
    if machine.cards.trouble is not None:
        yield machine.cards.trouble
    for card in machine.cards.cards:
        yield from check_card(card, machine.held.get(card.device))


def cann_version(machine: Machine) -> str | None:
    """The toolkit's version, from the install info in its home."""
    home = machine.environment.get(CANN_HOME_VARIABLE) or machine.environment.get("ASCEND_TOOLKIT_HOME") or CANN_HOME
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
    if not device_files(machine.root):
        return
    cann, driver = cann_version(machine), driver_version(machine)
    yield from check_toolkit(machine.environment, machine.root)
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
        yield error("cann", "CANN", "no toolkit with a version was found", f"Install it, and {SOURCE_CANN}")
        return
    mindspore = machine.package("mindspore")
    row = stack_with(mindspore=mindspore.version) if mindspore and mindspore.version else None
    if row is not None and not same_version(row.cann, cann):
        fitting = next((stack.mindspore for stack in stacks() if same_version(stack.cann, cann)), None)
        advice = f"Install CANN {row.cann}" + (f", or MindSpore {fitting}." if fitting else ".")
        yield warning("cann", "CANN", f"is {cann}; MindSpore {row.mindspore} was released for {row.cann}", advice)
    else:
        yield ok("cann", "CANN", cann)
