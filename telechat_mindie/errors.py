"""Errors that a user sees: one sentence that says what, where, expected against found, and what to do next."""

from __future__ import annotations


class TelechatMindieError(Exception):
    """Base of every error that is the user's to mend. Commands print it in one line and exit with code 2.

    Args:
        what: the fault, as a clause without a full stop.
        where: the file, tensor, key or argument concerned.
        expected: what would have been right.
        found: what was there instead.
        advice: the next thing to do, as a full sentence.
    """

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        expected: object = None,
        found: object = None,
        advice: str | None = None,
    ) -> None:
        text = what if where is None else f"{where}: {what}"
        facts = []
        if expected is not None:
            facts.append(f"expected {expected}")
        if found is not None:
            facts.append(f"found {found}")
        if facts:
            text += f" ({', '.join(facts)})"
        if advice:
            text += f". {advice}"
        super().__init__(" ".join(text.split()))


class ConfigError(TelechatMindieError):
    """A config.json, generation_config.json or yaml that is missing, malformed or contradicts itself."""


class CheckpointError(TelechatMindieError):
    """Weights that are missing, damaged, hostile, or do not fit the config."""


class TokenizerError(TelechatMindieError):
    """A tokenizer that cannot be read, does not fit the vocabulary, or a text it cannot encode."""


class ModelDirError(TelechatMindieError):
    """A model directory that `build` did not complete, or that was changed since."""


class InputError(TelechatMindieError):
    """An argument of a call or a command that the interface does not allow."""


class OutputError(TelechatMindieError):
    """A target that cannot be written: it exists, is read-only, or the disk is full."""


def name_some(names: object, limit: int = 5) -> str:
    """`a, b, c, d, e and 12 more`: the first `limit` of an iterable of names, for an error message."""
    listed = sorted(str(name) for name in names)  # type: ignore[attr-defined]
    shown = ", ".join(listed[:limit])
    return shown if len(listed) <= limit else f"{shown} and {len(listed) - limit} more"
