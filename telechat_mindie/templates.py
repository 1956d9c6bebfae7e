"""The files of model_dir_template/, rendered: sandboxed, strict about names, data always as JSON."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

from jinja2 import StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment


def render(template: str, **values: Any) -> str:
    """`template` (a file name of model_dir_template/) with `values`; the filter `json` quotes a value."""
    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
    environment.filters["json"] = _json
    source = resources.files("telechat_mindie.model_dir_template").joinpath(template).read_text(encoding="utf-8")
    return environment.from_string(source).render(values)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
