"""What a service config needs to know of a model directory."""

from __future__ import annotations

import os
import re
from pathlib import Path

from telechat_mindie.errors import InputError
from telechat_mindie.mindie import ATB, MS
from telechat_mindie.model_dir.atb.layout import AtbDir, is_atb
from telechat_mindie.model_dir.atb.rules import BLOCK_SIZE, DTYPE
from telechat_mindie.model_dir.layout import ModelDir
from telechat_mindie.service import DEFAULT_GENERATIONS
from telechat_mindie.service.options import ModelFacts, parse_devices

FALLBACK_NAME = "telechat2"


def generation_for(path: Path) -> str:
    """The generation of MindIE to take for a directory where none is named."""
    return DEFAULT_GENERATIONS[ATB if is_atb(path) else MS]


def open_model(path: Path, generation: str | None = None) -> ModelDir | AtbDir:
    """A directory of either backend.

    Args:
        generation: of MindIE, where one is named: with one that has no ms, a Hugging Face checkpoint is one for atb.

    Raises:
        ModelDirError, ConfigError: it is incomplete, or its backend would not serve it right.
    """
    return AtbDir.open(path) if is_atb(path, generation) else ModelDir.open(path)


def model_facts(directory: ModelDir | AtbDir, devices: str | None = None, instances: int = 1) -> ModelFacts:
    """The facts of an opened model directory. Weights are counted for the fullest rank.

    Args:
        devices: the cards that are named, as `parse_devices` takes them. A directory for ms is cut for a number of
            ranks; one for atb is cut as it is loaded, for as many as each of the `instances` gets.

    Raises:
        InputError: the model cannot be shared by that many cards.
    """
    path = os.path.abspath(directory.path)  # noqa: PTH100 - resolve() would follow a link
    if isinstance(directory, AtbDir):
        tp = directory.tp if devices is None else _shared_by(directory, devices, instances)
        return atb_facts(directory, tp)
    return ModelFacts(
        model_name=model_name(os.path.basename(path)),  # noqa: PTH119
        model_path=path,
        tp=directory.tp,
        max_seq_len=directory.serving.max_seq_len,
        block_size=directory.serving.block_size,
        weight_bytes_per_rank=directory.rank_bytes,
        kv_bytes_per_token_per_rank=directory.config.kv_bytes_per_token(directory.serving.dtype, directory.tp),
        vocab_size=directory.config.vocab_size,
    )


def atb_facts(directory: AtbDir, tp: int) -> ModelFacts:
    """The same of a directory for atb, on so many cards an instance."""
    path = os.path.abspath(directory.path)  # noqa: PTH100
    return ModelFacts(
        model_name=model_name(os.path.basename(path)),  # noqa: PTH119
        model_path=path,
        tp=tp,
        max_seq_len=directory.config.seq_length,
        block_size=BLOCK_SIZE,
        weight_bytes_per_rank=directory.rank_bytes(tp),
        kv_bytes_per_token_per_rank=directory.config.kv_bytes_per_token(DTYPE, tp),
        vocab_size=directory.config.vocab_size,
        backend=ATB,
        plain_length=directory.plain_length,
        allowed_tp=directory.allowed_tp,
    )


def _shared_by(directory: AtbDir, devices: str, instances: int) -> int:
    count = len(parse_devices(devices))
    tp, rest = divmod(count, max(1, instances))
    if rest or tp not in directory.allowed_tp:
        raise InputError(
            "the model cannot be shared by that many cards",
            where=f"--devices {devices}",
            expected=f"{', '.join(map(str, directory.allowed_tp))} an instance",
            found=f"{count} for {instances} instance(s)",
            advice="atb_llm divides heads, key-value heads, feed-forward and vocabulary evenly by it.",
        )
    return tp


def model_name(folder: str) -> str:
    """The folder's name with what MindIE refuses in a modelName replaced (MindIE-LLM v3.0.0.beta.2
    src/config_manager/model_deploy_config.cpp:438-448): letters, digits, `_.-`, a letter or digit at both ends."""
    return re.sub(r"[^a-zA-Z0-9_.-]", "-", folder)[:256].strip("_.-") or FALLBACK_NAME
