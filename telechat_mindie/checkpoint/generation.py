"""A checkpoint's generation_config.json, read as transformers reads it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from telechat_mindie.config import TelechatConfig, checked_token_ids
from telechat_mindie.errors import ConfigError
from telechat_mindie.reading import read_json

_MAX_NEW_TOKENS = 512
_DEFAULTS: dict[str, Any] = {
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 0,  # no limit: who gives none means none, whatever transformers' own class adds (T1 asks for top_p alone)
    "top_p": 1.0,
    "repetition_penalty": 1.0,
}


@dataclass(frozen=True)
class Generation:
    """What a checkpoint says of generation.

    Attributes:
        written: its generation_config.json without what is null there.
        values: the same with what sampling needs: do_sample, temperature, top_k (0: no limit), top_p and
            repetition_penalty.
        max_new_tokens: most tokens of an answer.
        eos_token_id: what ends an answer: an id or several. It is config.json's where this file names none.
    """

    written: dict[str, Any]
    values: dict[str, Any]
    max_new_tokens: int
    eos_token_id: int | tuple[int, ...]


def read_generation(checkpoint: Path, config: TelechatConfig) -> Generation:
    """From `checkpoint`/generation_config.json, which may be absent; null counts as absent.

    Raises:
        ConfigError: a value of the wrong type, a token that the vocabulary does not have.
    """
    path = checkpoint / "generation_config.json"
    written = read_json(path) if path.exists() else {}
    given = {key: value for key, value in written.items() if value is not None}
    for key, default in (_DEFAULTS | {"max_new_tokens": _MAX_NEW_TOKENS, "max_length": _MAX_NEW_TOKENS}).items():
        value = given.get(key, default)
        wanted = (int, float) if isinstance(default, float) else type(default)
        if not isinstance(value, wanted) or isinstance(value, bool) != isinstance(default, bool):
            raise ConfigError("has the wrong type", where=f"{path}: {key}", found=repr(value))
    for key in ("max_new_tokens", "max_length"):
        if given.get(key, 1) < 1:
            raise ConfigError("must be positive", where=f"{path}: {key}", found=given[key])
    ids = {
        key: checked_token_ids(value, config.vocab_size, f"{path}: {key}")
        for key, value in given.items()
        if key.endswith("_token_id")
    }
    return Generation(
        written=given,
        values=_DEFAULTS | given,
        # max_length counts the prompt too, which only the engine knows; its longest sequence bounds both.
        max_new_tokens=given.get("max_new_tokens", given.get("max_length", _MAX_NEW_TOKENS)),
        eos_token_id=ids.get("eos_token_id", config.eos_token_id),
    )
