"""The Jinja in which chat templates are written: transformers' (4.46, utils/chat_template_utils.py), in a sandbox."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from telechat_mindie.errors import InputError


class Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: marks the model's words for training, and prints them."""

    tags = {"generation"}  # noqa: RUF012  an instance's in jinja2's annotation

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """Undefined values are false and print nothing, which is Jinja's default.

    Args:
        longest: characters or items of what `*` may make, and bits of what `**` may.
    """

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self, longest: int) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation])
        self._longest = longest
        self.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        # Jinja's own asks `str` for a copy first, and so for the masked text.
        self.filters["replace"] = lambda value, old, new, count=-1: (
            value if isinstance(value, str) else str(value)
        ).replace(old, new, -1 if count is None else count)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        size = 0
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            size = left.bit_length() * right
        elif operator == "*" and isinstance(left, (str, list, tuple)) and isinstance(right, int):
            size = len(left) * right
        elif operator == "*" and isinstance(right, (str, list, tuple)) and isinstance(left, int):
            size = len(right) * left
        if size > self._longest:
            raise InputError(f"makes too long a value with {operator}", where="chat template")
        return super().call_binop(context, operator, left, right)
