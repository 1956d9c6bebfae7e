"""The NPUs of this machine: the one reader of `npu-smi info`, for `doctor`, `service-config` and `launch`.

Three numbers name a card. NPU and chip say where it sits (a 910C module or a 300I Duo board has two chips), Phy-ID is
the N of /dev/davinciN, and MindIE's npuDeviceIds count the cards that a process sees, from 0 in the order of Phy-ID. On
a whole machine device and Phy-ID are the same; in a container that was given davinci4 and davinci5 they are devices 0
and 1 (MindIE-LLM v3.0.0.beta.2 docs/zh/user_guide/user_manual/service_parameter_configuration.md:94). Where
ASCEND_RT_VISIBLE_DEVICES is set, device i is the i-th that it lists.

Memory is in MB of 2^20 bytes, as npu-smi counts.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from telechat_mindie.findings import Finding, printable, warning

VISIBLE = "ASCEND_RT_VISIBLE_DEVICES"

NPU_SMI_FOLDERS = ("/usr/local/sbin", "/usr/local/bin")
"""Where the driver's installer puts npu-smi, and where it is mounted in a container: often not on PATH (MindIE-LLM
v3.0.0.beta.2 docs/zh/user_guide/install/source/installation_in_containerized.md)."""

NPU_SMI_SECONDS = 15.0  # it answers in a second or two; with a hung driver never

BUSY_MB = 4096
"""In use from here on means that something runs on the card. Idle ones show what the driver keeps for itself: 1.4 to
1.9 GB of a 310P, 2.7 to 3.4 GB of a 910B or 910C, whatever their size."""


@dataclass(frozen=True, slots=True)
class Process:
    """A process on a card, as the host numbers it; memory in MB."""

    pid: int
    name: str
    memory: int


@dataclass(frozen=True, slots=True)
class Card:
    """One chip that is a device of its own.

    Attributes:
        device: MindIE's number of it, without a mask.
        npu: of the board or module.
        chip: on that board.
        phy_id: N of /dev/davinciN.
        name: of the chip: `910B4`, `310P3`; `Ascend910` for a 910C.
        health: `OK`, `Warning`, `Alarm`, `Critical` or `UNKNOWN`.
        used: MB in use.
        total: MB; 0 where npu-smi does not say.
        processes: on it, where npu-smi lists them.
    """

    device: int
    npu: int
    chip: int
    phy_id: int
    name: str
    health: str
    used: int
    total: int
    processes: tuple[Process, ...] = ()

    def __str__(self) -> str:
        """`device 3 (NPU 1 chip 1)`, and the Phy-ID where it is another number."""
        other = "" if self.device == self.phy_id else f", davinci{self.phy_id}"
        return f"device {self.device} (NPU {self.npu} chip {self.chip}{other})"

    @property
    def memory(self) -> str:
        return f"{self.name}, {self.total} MB, {self.used} in use"

    @property
    def is_busy(self) -> bool:
        """Whether something runs on it."""
        return bool(self.processes) or self.used >= BUSY_MB


@dataclass(frozen=True)
class Cards:
    """What `read_cards` found.

    Attributes:
        cards: in the order of their device number.
        trouble: why there are none: npu-smi is missing (id `npu-smi-missing`) or says something else than a table (id
            `npu-smi`), in its own words, with advice. None where it listed cards.
        mask: the devices that ASCEND_RT_VISIBLE_DEVICES lists; None where it is not set or does not list numbers.
    """

    cards: tuple[Card, ...] = ()
    trouble: Finding | None = None
    mask: tuple[int, ...] | None = None

    def unmasked(self, device: int) -> int:
        """MindIE's `device` as every process of this machine counts it, whatever its own mask: two launches meet on a
        card where these numbers meet, npu-smi or not. A device that the mask has not got stays as it is."""
        return self.mask[device] if self.mask is not None and device < len(self.mask) else device

    def card(self, device: int) -> Card | None:
        """The card that MindIE's `device` is, the mask applied; None where there is none."""
        if self.mask is not None and device >= len(self.mask):
            return None
        return next((card for card in self.cards if card.device == self.unmasked(device)), None)

    def memory_gb(self, devices: Iterable[int] | None = None) -> float | None:
        """GB of 2^30 bytes, in tenths, of the smallest of MindIE's `devices`, or of all cards; None where nothing says.

        Devices that are not listed count as any card here.
        """
        chosen = [card for device in devices or () if (card := self.card(device))] or self.cards
        return min((card.total for card in chosen if card.total), default=0) * 10 // 1024 / 10 or None


def read_cards(
    environment: Mapping[str, str] | None = None, *, root: Path = Path("/"), timeout: float = NPU_SMI_SECONDS
) -> Cards:
    """Run `npu-smi info` once. Never raises, and returns within about `timeout` seconds whatever the driver does.

    Args:
        environment: of the process that would use the cards; None for this one's.
        root: stands for `/`.
        timeout: seconds for npu-smi to answer.
    """
    environment = os.environ if environment is None else environment
    mask = visible_devices(environment)
    search = [environment.get("PATH", ""), *(str(root / folder.lstrip("/")) for folder in NPU_SMI_FOLDERS)]
    path = os.pathsep.join(filter(None, search))
    command = shutil.which("npu-smi", path=path) or shutil.which("npu-smi", os.F_OK, path)  # the latter fails in words
    if command is None:
        return Cards(trouble=_MISSING, mask=mask)
    said = _run([command, "info"], environment, timeout)
    if said is None:
        return Cards(trouble=replace(_SILENT, message=f"does not answer within {timeout:g} s"), mask=mask)
    cards = parse_npu_smi(said)
    return Cards(tuple(cards), None if cards else trouble_in(said), mask)


def visible_devices(environment: Mapping[str, str]) -> tuple[int, ...] | None:
    """The devices in ASCEND_RT_VISIBLE_DEVICES; None where it is not set or not a list of numbers."""
    items = environment.get(VISIBLE, "").split(",")
    return tuple(map(int, items)) if all(re.fullmatch(r"\s*[0-9]{1,9}\s*", item) for item in items) else None


def device_files(root: Path = Path("/")) -> list[int]:
    """N of each /dev/davinciN: the cards that were given to this machine or container, npu-smi or not."""
    try:
        names = [entry.name for entry in (root / "dev").iterdir()]
    except OSError:
        return []
    return sorted(int(match[1]) for name in names if (match := re.fullmatch(r"davinci(\d+)", name)))


# ---- the table ----

_NUMBER = re.compile(r"\d{1,9}")
_BOARD = re.compile(r"(\d{1,9})\s+(\S.*)")  # NPU and name
_CHIP = re.compile(r"(\d{1,9})(?:\s+(\d{1,9}))?")  # chip and, where the table has that column, Phy-ID
_USAGE = re.compile(r"(\d{1,9})\s*/\s*(\d{1,9})")


def parse_npu_smi(text: str) -> list[Card]:
    """The cards in the table of `npu-smi info`, in the order of Phy-ID; none where there is no table.

    A card takes two lines. The second has the Phy-ID (headed `Phy-ID`, on a 310P `Device`) where a board may have
    several chips; without that column it is the NPU's number. Of the memory columns the greatest is meant: a 910 has
    HBM beside a DDR of 0 MB. Lists of processes follow, by NPU and chip.
    """
    cards: list[Card] = []
    processes: dict[tuple[int, int], list[Process]] = {}
    board: re.Match[str] | None = None
    health = ""
    for line in text.splitlines():
        if not line.startswith("|"):
            continue
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) == 4:
            if (chip := _CHIP.fullmatch(cells[0])) and chip[2] and all(_NUMBER.fullmatch(cells[n]) for n in (1, 3)):
                process = Process(int(cells[1]), cells[2], int(cells[3]))
                processes.setdefault((int(chip[1]), int(chip[2])), []).append(process)
        elif len(cells) == 3 and board is not None and (chip := _CHIP.fullmatch(cells[0])):
            usages = [(int(total), int(used)) for used, total in _USAGE.findall(cells[2])]
            total, used = max(usages, default=(0, 0))
            phy_id = int(chip[2] or board[1])
            cards.append(Card(0, int(board[1]), int(chip[1]), phy_id, board[2], health, used, total))
            board = None
        elif len(cells) == 3 and (match := _BOARD.fullmatch(cells[0])):
            board, health = match, cells[1]
    cards.sort(key=lambda card: card.phy_id)
    return [
        replace(card, device=device, processes=tuple(processes.get((card.npu, card.chip), ())))
        for device, card in enumerate(cards)
    ]


# ---- what else npu-smi says ----

_MISSING = warning(
    "npu-smi-missing",
    "npu-smi",
    f"is neither on PATH nor in {' or '.join(NPU_SMI_FOLDERS)}: nothing is known of the cards",
    "In a container mount it from the host, with /usr/local/Ascend/driver; on a host install the driver.",
)

_SILENT = warning(
    "npu-smi",
    "npu-smi info",
    "",
    "The driver hangs, or resets a card: look at dmesg, and restart the machine if it stays so.",
)

_TROUBLES = {
    "ret is -8020": (
        "another container or process holds the card",
        "Stop the container that was given the same /dev/davinciN (docker ps), or give this one other cards.",
    ),
    "ret is -8005": (
        "the driver refuses this container, for want of privilege or because another one holds the card",
        "Start it with the Ascend Docker Runtime or --privileged, as root or in the group HwHiAiUser, and see that no "
        "other container was given the same /dev/davinciN.",
    ),
    "ret is -8002": ("this user may not ask the driver", "Run it as root, or as a user of the group HwHiAiUser."),
    "ret is -8008": ("the card does not exist or does not run", "Look at dmesg and at the list of lspci -d 19e5:."),
    "ret is -8012": ("the card is not ready yet", "Wait a minute, and try again."),
    "ret is -8017": ("the card's firmware is being upgraded", "Wait until that is done."),
    "error while loading shared libraries": (
        "its own libraries, which belong to the driver, are not found",
        "In a container mount /usr/local/Ascend/driver, and export LD_LIBRARY_PATH=/usr/local/Ascend/driver/lib64/"
        "common:/usr/local/Ascend/driver/lib64/driver:$LD_LIBRARY_PATH",
    ),
    "Permission denied": ("this user may not run it", "chmod 555 it, or run it as root."),
}
"""What npu-smi says instead of a table: cause and advice. The codes are DCMI's (Atlas 200I A2 25.3.RC1 API reference,
return codes: -8002 permission, -8005 internal, -8008 no device, -8012 not ready, -8017 upgrading, -8020 occupied); that
-8005 in a container means privilege, or a card held by another one: vllm-ascend issue 2698, HAMi issue 1696."""

QUOTED_LINES, QUOTED_CHARACTERS = 3, 300  # of npu-smi's own words


def trouble_in(said: str) -> Finding:
    """What is wrong where npu-smi printed no table, with its own last lines."""
    lines = [line.strip() for line in said.splitlines() if line.strip() and not line.startswith(("+", "|"))]
    words = printable(" / ".join(lines[-QUOTED_LINES:]))[-QUOTED_CHARACTERS:]
    for sign, (cause, advice) in _TROUBLES.items():
        if re.search(rf"{sign}\b", said):
            return warning("npu-smi", "npu-smi info", f"{cause}; it says: {words}", advice)
    return warning(
        "npu-smi",
        "npu-smi info",
        f"lists no card; it says: {words}" if words else "lists no card, and says nothing",
        "Look at dmesg; in a container, at its --device options and mounts; on a host reinstall the driver.",
    )


def _run(command: Sequence[str], environment: Mapping[str, str], timeout: float) -> str | None:
    """What a command prints on both streams; None where it does not end in time.

    Into a file and without a last wait: one that hangs in the driver cannot be killed, and a pipe that a child of it
    keeps open would never end.
    """
    try:
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen(
                command,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
            try:
                process.wait(timeout)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(OSError):
                    os.killpg(process.pid, signal.SIGKILL)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(1)
                return None
            output.seek(0)
            return output.read(1 << 20).decode(errors="replace")
    except OSError as failure:
        return f"{command[0]}: {failure.strerror}"
