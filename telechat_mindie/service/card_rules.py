"""What `doctor`, `service-config` and `launch` say of the cards: whether they fit, are free and well, and how large."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from telechat_mindie import soc
from telechat_mindie.findings import Finding, error, ok, warning
from telechat_mindie.kv_budget import DEFAULT_CARD_GB
from telechat_mindie.service.cards import VISIBLE, Card, Cards, device_files
from telechat_mindie.soc import CANN_HOME_VARIABLE, SOURCE_CANN


def check_card(card: Card, holder: str | None = None) -> Iterator[Finding]:
    """One card by itself: its chip, its health, and what runs on it; one `ok` where all is well.

    Args:
        holder: the name of the launch that holds it.
    """
    found = [*_chip(card), *_health(card), *(_busy(card) if holder is None else [_held(card, holder)])]
    yield from found or [ok("npu", card, card.memory)]


def check_devices(
    cards: Cards, devices: Collection[int], dtype: str, held: Mapping[int, str] | None = None
) -> Iterator[Finding]:
    """The cards that a service is to run on; what is right is passed over, and nothing is said where nothing is known.

    Args:
        cards: of this machine.
        devices: MindIE's, of all instances together.
        dtype: that the model directory computes in.
        held: names of launches that are active, by the devices that they hold, counted as `Cards.unmasked` gives them.
    """
    yield from check_mask(cards)
    for device in devices:
        card = cards.card(device)
        if holder := (held or {}).get(cards.unmasked(device)):
            yield _held(card or f"device {device}", holder)
        elif card is not None:
            yield from _busy(card)
        if card is None and cards.cards:
            yield error(
                "npu-absent",
                f"device {device}",
                f"does not exist: {_known(cards)}",
                "MindIE counts the cards that a process sees, from 0: choose other --devices.",
            )
        elif card is not None:
            yield from _chip(card)
            yield from _health(card)
            yield from _dtype(card, dtype)


def check_mask(cards: Cards) -> Iterator[Finding]:
    """ASCEND_RT_VISIBLE_DEVICES: it lists cards that exist, each once, in ascending order; CANN refuses the rest."""
    mask = cards.mask
    if mask is None:
        return
    listed = ",".join(map(str, mask))
    if list(mask) != sorted(set(mask)):
        fixed = ",".join(map(str, sorted(set(mask))))
        yield error(
            "visible-devices", VISIBLE, f"is {listed}, which is not in ascending order", f"export {VISIBLE}={fixed}"
        )
    absent = [number for number in mask if cards.cards and number >= len(cards.cards)]
    if absent:
        yield error(
            "visible-devices",
            VISIBLE,
            f"lists {', '.join(map(str, absent))}, and here are devices 0 to {len(cards.cards) - 1}",
            "CANN counts the cards that a machine or container sees, from 0: list those, or unset it.",
        )


def check_toolkit(environment: Mapping[str, str], root: Path = Path("/")) -> Iterator[Finding]:
    """CANN's ASCEND_HOME_PATH, where there are cards: MindSpore's library of Ascend kernels raises without it."""
    if not device_files(root):
        return
    home = environment.get(CANN_HOME_VARIABLE, "")
    if not home:
        yield error(
            "cann-home", CANN_HOME_VARIABLE, "is not set, without which kernels for the cards fail", SOURCE_CANN
        )
    elif not (root / home.lstrip("/")).is_dir():
        yield error("cann-home", CANN_HOME_VARIABLE, f"names {home}, which is not a folder", SOURCE_CANN)


def card_memory(cards: Cards, devices: Sequence[int] | None = None) -> tuple[float, str | None]:
    """GB of the smallest of MindIE's `devices`, or of all cards; and a sentence where it is only assumed."""
    known = cards.memory_gb(devices)
    if known is not None:
        return known, None
    why = "no card is known here" if cards.trouble is None else f"{cards.trouble.where} {cards.trouble.message}"
    return DEFAULT_CARD_GB, f"cards of {DEFAULT_CARD_GB} GB are assumed, as {why}; --device-mem says what they have"


def _health(card: Card) -> Iterator[Finding]:
    if card.health.upper() != "OK":
        rule = warning if card.health.upper() in ("WARNING", "ALARM") else error  # it may work, or it does not run
        advice = f"npu-smi info -t health -i {card.npu} says why."
        yield rule("npu-health", card, f"{card.memory}, health {card.health}", advice)


def _chip(card: Card) -> Iterator[Finding]:
    if family := refused_family(card):
        yield error("npu-chip", card, f"is a {card.name} ({family}), which the Ascend path cannot run on", soc.ADVICE)


def _busy(card: Card) -> Iterator[Finding]:
    if card.is_busy:
        names = ", ".join(f"{process.name} (pid {process.pid}, {process.memory} MB)" for process in card.processes[:3])
        yield warning(
            "npu-memory",
            card,
            f"{card.memory}: {names or 'something'} runs on it",
            "Stop it, choose other --devices, or give what is left as --device-mem.",
        )


def _held(where: Card | str, holder: str) -> Finding:
    return warning(
        "npu-held",
        where,
        f"is held by the launch {holder}",
        f"Choose other --devices, or end it: telechat-mindie stop {holder}",
    )


def _dtype(card: Card, dtype: str) -> Iterator[Finding]:
    if dtype == "bfloat16" and refused_family(card):
        yield error("npu-dtype", card, f"is a {card.name}, which knows no {dtype}, the model's dtype", soc.ADVICE)


def refused_family(card: Card) -> str | None:
    """`soc.refused_family`. To npu-smi an `Ascend910` is the 910C of an A3, and the first generation has a letter
    (910A, 910ProB); to MindSpore it is the first generation."""
    return None if card.name == "Ascend910" else soc.refused_family(card.name)


def _known(cards: Cards) -> str:
    listed = ", ".join(map(str, cards.cards))
    masked = f", of which {VISIBLE} shows {','.join(map(str, cards.mask))}" if cards.mask is not None else ""
    return f"npu-smi lists {listed}{masked}"
