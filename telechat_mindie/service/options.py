"""What `service-config` starts from: facts of the model directory, and what the user asked for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from telechat_mindie.config import MAX_RANKS
from telechat_mindie.errors import InputError
from telechat_mindie.kv_budget import DEFAULT_CARD_GB
from telechat_mindie.mindie import MS
from telechat_mindie.service import DEFAULT_GENERATION


@dataclass(frozen=True)
class ModelFacts:
    """What a model directory says about itself. Lengths are tokens."""

    model_name: str
    model_path: str  # absolute
    tp: int
    max_seq_len: int
    block_size: int
    weight_bytes_per_rank: int
    kv_bytes_per_token_per_rank: int
    vocab_size: int
    backend: str = MS
    plain_length: int | None = None  # beyond it the backend does not compute what the model does
    allowed_tp: tuple[int, ...] = ()  # other numbers of cards that the same directory serves with

    @property
    def default_length(self) -> int:
        """maxSeqLen where nobody says."""
        return min(self.max_seq_len, self.plain_length or self.max_seq_len)


@dataclass(frozen=True)
class ServiceOptions:
    """What the user asked for; None leaves a value to be derived.

    Attributes:
        devices: card numbers as `0-7` or `0,2,4-5`; None takes the first ones.
        instances: copies of the model, each on tp devices.
        device_mem_gb: memory of one card, in GB of 2^30 bytes.
        reserve_gb: memory of a card kept for activations, communication buffers and the system; None for a share of
            the card.
        dynamic_kv: npuMemSize -1, where the runner supports it.
        max_seq_len: tokens of prompt and answer together.
        max_input_len: tokens of a prompt.
        request_tokens: tokens of a typical request, prompt and answer, for which the batch is sized.
        port_base: the first of three ports in a row; those that `is_free` denies are passed over.
        insecure_http: httpsEnabled false.
        generation: the generation of MindIE, a key of `schema.GENERATIONS`.
        template: an existing conf/config.json to patch; None renders MindIE's default.
        overrides: `ScheduleConfig.maxBatchSize=64`: values that win over every other source.
        mindie_home: where certificates are looked up; None leaves their presence open.
    """

    devices: str | None = None
    instances: int = 1
    device_mem_gb: float = DEFAULT_CARD_GB
    reserve_gb: float | None = None
    dynamic_kv: bool = False
    max_seq_len: int | None = None
    max_input_len: int | None = None
    request_tokens: int = 1024
    port_base: int | None = None
    insecure_http: bool = False
    generation: str = DEFAULT_GENERATION
    template: Path | None = None
    overrides: tuple[str, ...] = ()
    mindie_home: Path | None = None


def parse_devices(text: str) -> tuple[int, ...]:
    """`0-3,6` as (0, 1, 2, 3, 6), in the order given.

    Raises:
        InputError: not of that form, a range that runs backwards, a device twice, or over MAX_RANKS devices.
    """
    devices: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", part.strip())
        begin, end = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
        if not begin <= end < begin + MAX_RANKS:
            raise InputError(
                "is not a list of devices", where=f"--devices {text}", expected="0-7 or 0,2,4-5", found=repr(part)
            )
        devices.extend(range(begin, end + 1))
    if len(set(devices)) != len(devices) or len(devices) > MAX_RANKS:
        raise InputError(
            "names a device twice, or too many", where=f"--devices {text}", found=f"{len(devices)} devices"
        )
    return tuple(devices)


def device_groups(text: str | None, tp: int, copies: int, flag: str) -> list[list[int]]:
    """The devices of each of `copies` of the model, tp apiece: those of `--devices TEXT`, or the first ones.

    Args:
        flag: the option that says how many copies, for the message.

    Raises:
        InputError: `parse_devices` refuses the text, or there are not exactly as many.
    """
    needed = tp * copies
    devices = tuple(range(needed)) if text is None else parse_devices(text)
    if len(devices) != needed:
        whole, rest = divmod(len(devices), tp)
        raise InputError(
            "do not fit the model directory",
            where=f"--devices {text}",
            expected=f"{needed} devices: tp {tp}, {flag} {copies}",
            found=len(devices),
            advice=f"Name {needed}, or build the directory for another tp."
            if rest or not whole
            else f"Say {flag} {whole} for all of them.",
        )
    return [list(devices[start : start + tp]) for start in range(0, needed, tp)]
