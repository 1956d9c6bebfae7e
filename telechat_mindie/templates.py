"""The files of model_dir_template/, rendered: sandboxed, strict about names, every value through a quoting filter.

A value comes from a checkpoint or a user, so none may become syntax. The filters are

- `json` for JSON and YAML, keys, numbers and comments included: what it writes is one line and the same in both;
- `compose` for the values of a compose file, where `$` begins a variable even inside quotes;
- `block` for a text of several lines in YAML, which people are to read and edit;
- `shell` for bash.

A Dockerfile needs no filter of its own: a value goes into an exec form, which is a JSON list and meets no shell.
"""

from __future__ import annotations

import json
import re
import shlex
from importlib import resources
from typing import Any

from jinja2 import StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from telechat_mindie.errors import ConfigError

# Inside the quotes of JSON these stand for themselves; YAML 1.1 takes some for line breaks and refuses the others.
_ESCAPED = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")
_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")
_BLOCK_LINE = re.compile("[^\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]*")
_SHELL_CONTROL = re.compile(r"[\x01-\x1f\x7f'\\]")


def render(template: str, **values: Any) -> str:
    """`template` (a file name of model_dir_template/) with `values`.

    Raises:
        ConfigError: a value that the target cannot hold: NaN, infinity, a NUL character.
    """
    source = resources.files("telechat_mindie.model_dir_template").joinpath(template).read_text(encoding="utf-8")
    try:
        return environment().from_string(source).render(values)
    except ConfigError as error:
        raise ConfigError(str(error), where=template.removesuffix(".j2")) from None


def environment() -> ImmutableSandboxedEnvironment:
    """Jinja's, with the filters."""
    made = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
    made.filters |= FILTERS
    return made


def _json(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise ConfigError("JSON has no NaN and no infinity", found=repr(value)[:80]) from None
    if _NUL.search(text):
        raise ConfigError("holds a NUL character", found=text[:80])
    if isinstance(value, float) and "." not in text:
        text = text.replace("e", ".0e")  # YAML 1.1 takes 1e-05 for a text
    return _ESCAPED.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _compose(value: Any) -> str:
    """https://docs.docker.com/reference/compose-file/interpolation/: `$$` is a dollar sign."""
    return _json(value).replace("$", "$$")


def _block(text: str, indent: int) -> str:
    """A literal block below a key; a JSON string where a block could not hold the text exactly.

    Args:
        indent: of the text, two more than its key's.
    """
    lines = text.split("\n")
    if lines[-1] or len(lines) < 2 or not lines[-2] or not all(map(_BLOCK_LINE.fullmatch, lines)):
        return _json(text)
    # The 2 says how far the text is indented, or YAML would guess it from a first line that may begin with spaces.
    return "|2\n" + "\n".join(" " * indent + line if line else "" for line in lines[:-1])


def _shell(value: Any) -> str:
    """One word of bash, on one line."""
    text = str(value)
    if "\0" in text:
        raise ConfigError("holds a NUL character", found=repr(text))
    if not _SHELL_CONTROL.search(text):
        return shlex.quote(text)
    return "$'" + _SHELL_CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text) + "'"


FILTERS = {"json": _json, "compose": _compose, "block": _block, "shell": _shell}
