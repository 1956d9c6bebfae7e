"""generation_config.json as atb_llm reads it: it makes a chat of the token ids there, without a template."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from telechat_mindie.checkpoint.elsewhere.layout import TURN_IDS
from telechat_mindie.config import TelechatConfig
from telechat_mindie.findings import Finding, error, warning
from telechat_mindie.text.control_tokens import CONTROL_IDS

TOKEN_IDS = TURN_IDS | {"eos_token_id": CONTROL_IDS["<_end>"]}
"""Each one integer, put into a chat's list of ids (input_builder_telechat.py:36-52). Without a system_token_id the
user's stands before a system text."""

LENGTHS = ("max_new_tokens", "max_length")

LEAST_PROMPT = 3
"""Tokens that must be left for a prompt, or every chat is refused (input_builder_telechat.py:27-33)."""

RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0, 2),
    "top_p": (0, 1),
    "repetition_penalty": (0, 2),
}
"""What the router lets pass (models/base/router.py:336-386); it ends at anything else."""

ADVICE = "Write it there, or build the directory again: telechat-mindie build MODEL_PATH --checkpoint DIR --backend atb"


def complete(values: Mapping[str, Any], config: TelechatConfig) -> dict[str, Any]:
    """A model's generation_config.json with all that atb_llm needs beside its own values.

    `eos_token_id` becomes one integer. atb_llm keeps seq_length - max_new_tokens tokens of a question, and so at least
    half; requests say themselves how long an answer may be.
    """
    eos = values.get("eos_token_id", config.eos_token_id)
    ids = TOKEN_IDS | {key: values[key] for key in TOKEN_IDS if type(values.get(key)) is int}
    longest = max(values.get("max_new_tokens") or values.get("max_length") or 1, 1)
    kept = {key: value for key, value in values.items() if key != "max_length"}
    return {
        "do_sample": False,
        **kept,
        **ids,
        "eos_token_id": eos[0] if isinstance(eos, (list, tuple)) else eos,
        "max_new_tokens": min(longest, config.seq_length // 2),
    }


def check_generation(data: Mapping[str, Any], config: TelechatConfig | None, where: object) -> Iterator[Finding]:
    """The rules. Errors are where MindIE does not start, or every chat fails or is built of other tokens."""
    vocab_size = config.vocab_size if config else None
    for key, usual in TOKEN_IDS.items():
        value = data.get(key)
        if value is None and key == "system_token_id":
            message = "is missing: a system text gets the user's token"
            yield warning("atb-token-id", f"{where}: {key}", message, f'Write "{key}": {usual} there.')
        elif type(value) is not int:
            message = f"is {value!r}, where atb_llm puts one integer into every chat"
            yield error("atb-token-id", f"{where}: {key}", message, f'Write "{key}": {usual} there.')
        elif vocab_size is not None and not 0 <= value < vocab_size:
            message = f"is {value}, and the vocabulary has {vocab_size} tokens"
            yield error("atb-token-id", f"{where}: {key}", message, f'Write "{key}": {usual} there.')
    if type(data.get("do_sample", False)) is not bool:
        yield error("atb-generation", f"{where}: do_sample", "is neither true nor false", ADVICE)
    for key, (low, high) in RANGES.items():
        value = data.get(key)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and not (number and low <= value <= high and (key, value) != ("repetition_penalty", 0)):
            yield error("atb-generation", f"{where}: {key}", f"is {value!r}, expected {low:g} to {high:g}", ADVICE)
    limit = data.get("top_k")
    if limit is not None and not (type(limit) is int and -1 <= limit <= (vocab_size or limit)):
        message = f"is {limit!r}, expected -1 to the vocabulary's {vocab_size}"
        yield error("atb-generation", f"{where}: top_k", message, ADVICE)
    yield from _room(data, config, where)


def _room(data: Mapping[str, Any], config: TelechatConfig | None, where: object) -> Iterator[Finding]:
    key = next((key for key in LENGTHS if data.get(key) is not None), None)
    if key is None:
        message = "is missing, and so is max_length: every chat fails"
        yield error("atb-length", f"{where}: max_new_tokens", message, ADVICE)
        return
    value = data[key]
    if type(value) is not int or value < 0:
        yield error("atb-length", f"{where}: {key}", f"is {value!r}, where atb_llm reads a number of tokens", ADVICE)
    elif key == "max_length" and value < LEAST_PROMPT:
        yield error("atb-length", f"{where}: {key}", f"is {value}, expected {LEAST_PROMPT} or more", ADVICE)
    elif key == "max_new_tokens" and config is not None and config.seq_length - value < LEAST_PROMPT:
        message = (
            f"is {value}, and config.json's seq_length is {config.seq_length}: atb_llm keeps the difference for the "
            "question, so every chat fails"
        )
        yield error("atb-length", f"{where}: {key}", message, f"Write at most {config.seq_length // 2} there.")
