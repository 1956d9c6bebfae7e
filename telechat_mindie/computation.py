"""What a config.json asks of the decoder beyond sizes: done, or refused by its value.

The weights are what they are either way, so only whoever runs a model asks here: a model directory and `build`, which
makes one. `convert` and `plan` take any.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from telechat_mindie.config import TelechatConfig
from telechat_mindie.config_json import SPELLINGS
from telechat_mindie.dtypes import WEIGHT_DTYPES
from telechat_mindie.errors import ConfigError

FIXED: dict[str, tuple[Any, ...]] = {
    "apply_residual_connection_post_layernorm": (False,),
    "hidden_act": ("silu", "swish"),
    "sliding_window": (None,),
    "norm_topk_prob": (True,),
}
"""Keys that would change the computation: the published modelling code knows no other value of them."""

ROTARY: dict[str, tuple[Any, ...]] = {
    "partial_rotary_factor": (1,),
    "rotary_pct": (1,),
    "rope_interleave": (False,),
    "rope_interleaved": (False,),
    "rotary_interleaved": (False,),
    "use_dynamic_ntk": (False,),
    "position_embedding_type": ("rope", "rotary"),
    # mindformers' yamls, which tools/get_config.py makes a config.json of. Both methods are the plain table up to the
    # trained length; a method that scales has a factor.
    "extend_method": ("None", "DYNAMIC_NTK"),
    "scaling_factor": (1,),
    "use_rope_slice": (False, True),  # how the table is read, not what is in it
    "rotary_dtype": WEIGHT_DTYPES,  # what the table is rounded to: the model directory's yaml decides it
}
"""Keys of the rotary embedding that other families and mindformers use -> the values that leave it as it is."""

OTHER_BASES = ("rotary_emb_base", "rotary_embedding_base", "rotary_base", "rope_base", "rope_freq_base")
"""Other families' names for rope_theta, which the published code does not read: they may only say the same."""

SECTIONS = ("rope_scaling", "rope_parameters")
"""transformers 4 and 5."""

TYPES = ("default", "dynamic")
"""Of `rope_type` (once `type`). `dynamic` grows the base with the length beyond max_position_embeddings: to
base * (factor * L / max - factor + 1)^(d / (d - 2)) in transformers, so up to there it is the plain embedding for any
factor. vLLM applies the same formula at L = factor * max to every token. Only with factor 1 are the two one, and the
published TeleChat2 code reads no factor: its own extension goes by training_seqlen and base_seqlen."""

_ROTARY_WORD = re.compile("rope(?!r)|rotary|theta|ntk|yarn", re.IGNORECASE)  # not "property"


def check_computation(config: TelechatConfig, where: Path | None = None) -> None:
    """Refuse what the decoder would not compute as the model's authors did.

    Args:
        where: the config.json, for the message.

    Raises:
        ConfigError: a key asks for it; it is named with its value.
    """
    for key, value in config.raw.items():
        try:
            _check_key(config, key, value)
        except ConfigError as error:
            raise error if where is None else ConfigError(str(error), where=where) from None


def refusal(config: TelechatConfig) -> str | None:
    """What `check_computation` says of a model that is not to be run now, or None."""
    try:
        check_computation(config)
    except ConfigError as error:
        return str(error)
    return None


def dynamic_ntk(length: int, training_seqlen: int, base_seqlen: int) -> tuple[float, float]:
    """(alpha, scale) of the published rotary extension for a sequence of `length` tokens (modeling_telechat.py of
    Tele-AI/TeleChat2): theta * alpha^(d / (d - 2)) is the base of the angles, and both tables are multiplied by scale.
    """
    length = max(length, training_seqlen)
    alpha = max(2.0 ** math.ceil(math.log(length / base_seqlen, 2) + 1) - 1, 1.0)
    scale = 1.0 if length <= training_seqlen else 0.1 * math.log(length / training_seqlen) + 1
    return alpha, scale


def trained_theta(config: TelechatConfig) -> float:
    """The base of the angles of every sequence up to `training_seqlen` tokens, where the extension is constant."""
    alpha, _ = dynamic_ntk(1, config.training_seqlen, config.base_seqlen)
    if alpha == 1.0:
        return config.rope_theta
    return float(config.rope_theta * alpha ** (config.head_dim / (config.head_dim - 2)))


def plain_length(config: TelechatConfig) -> int:
    """Tokens up to which the rotary embedding is the plain one, for engines that stretch none; 0 where it never is."""
    if dynamic_ntk(1, config.training_seqlen, config.base_seqlen) != (1.0, 1.0):
        return 0
    return min(config.seq_length, config.training_seqlen, config.base_seqlen)


def plain_context(config: TelechatConfig) -> int | None:
    """Tokens up to which a `dynamic` rope_type is the plain embedding; None for a model that has none.

    What it does beyond is not implemented. Without it the published extension goes on at any length.
    """
    return config.seq_length if any(_is_dynamic(config.raw.get(name)) for name in SECTIONS) else None


def _is_dynamic(section: Any) -> bool:
    return isinstance(section, Mapping) and "dynamic" in (section.get("rope_type"), section.get("type"))


def _check_key(config: TelechatConfig, key: str, value: Any) -> None:
    if key in FIXED:
        _one_of(key, value, FIXED[key])
    elif value is None or ("." not in key and key in SPELLINGS["rope_theta"]):
        return
    elif key in SECTIONS:
        _check_section(config, key, value)
    elif key in OTHER_BASES:
        _one_of(key, value, (config.rope_theta,))
    elif key in ROTARY or _ROTARY_WORD.search(key):
        _one_of(key, value, ROTARY.get(key, ()))


def _check_section(config: TelechatConfig, name: str, section: Any) -> None:
    if not isinstance(section, Mapping):
        raise ConfigError("is no JSON object", where=name, found=_short(section))
    given = {key: value for key, value in section.items() if value is not None}
    for key in ("rope_type", "type"):
        _one_of(f"{name}.{key}", given.pop(key, "default"), TYPES)
    if _is_dynamic(section):
        given.setdefault("factor", None)
    for key, value in given.items():
        if key == "original_max_position_embeddings" and type(value) is int and value >= config.seq_length:
            continue
        if key != "rope_theta":
            _one_of(f"{name}.{key}", value, (1,) if key == "factor" else ROTARY.get(key, ()))


def _one_of(where: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed):
        raise ConfigError(
            "would change what the model computes, and is not implemented",
            where=where,
            expected=" or ".join(str(one) for one in allowed) or "no such key",
            found=_short(value),
        )


def _short(value: Any) -> str:
    return repr(value)[:80]
