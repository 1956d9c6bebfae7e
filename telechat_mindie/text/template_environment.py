"""The Jinja in which chat templates are written: transformers' (4.46, utils/chat_template_utils.py), in a sandbox.

What a template makes is bounded: an operation whose result would be too long is refused before it begins, since it may
be one call of C that nothing interrupts and that takes all memory. Sums of many long strings are not counted.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from datetime import datetime
from string import Formatter
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context, markup_join, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter

from telechat_mindie.errors import InputError

_MAX_BITS = 1 << 16  # of an integer: Python divides those of a million digits in minutes
_ITEM = 8  # bytes of a list's
_UNBOUNDED = frozenset({"encode", "from_bytes", "to_bytes", "translate"})  # bytes, and long ones, of which none is text
_CONVERSION = re.compile(r"%(?:\([^)]*\))?[-#0 +]*(\*|\d*)(?:\.(\*|\d*))?")
_DIGITS = re.compile(r"\d+")


class Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: marks the model's words for training, and prints them."""

    tags = {"generation"}  # noqa: RUF012  an instance's in jinja2's annotation

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Buffer(list[str]):
    """What a macro or a block prints, counted as it grows."""

    def __init__(self, check: Callable[[int], None]) -> None:
        self._check, self._length = check, 0

    def append(self, piece: str) -> None:
        self._length += len(piece)
        self._check(self._length)
        super().append(piece)

    def extend(self, pieces: Iterable[str]) -> None:
        for piece in pieces:
            self.append(piece)


class _Generator(CodeGenerator):
    """Computes nothing while it compiles, and leaves what is joined to the environment."""

    def buffer(self, frame: Frame) -> None:
        frame.buffer = self.temporary_identifier()
        self.writeline(f"{frame.buffer} = environment.buffer()")

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.joined(context, (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def _output_child_to_const(self, node: nodes.Expr, frame: Frame, finalize: Any) -> str:
        if not isinstance(node, nodes.TemplateData):
            raise nodes.Impossible
        return super()._output_child_to_const(node, frame, finalize)


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """Undefined values are false and print nothing, which is Jinja's default.

    Args:
        longest: characters, or bytes of a list, of what an operation may make.
    """

    code_generator_class = _Generator
    intercepted_binops = frozenset({"+", "*", "%", "//", "**"})

    def __init__(self, longest: int) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            finalize=self.checked,
            extensions=["jinja2.ext.loopcontrols", Generation],
        )
        self._longest = longest
        self.globals["strftime_now"] = self._strftime_now
        # Jinja's own asks `str` for a copy first, and so for the masked text.
        self.filters["replace"] = lambda value, old, new, count=-1: (
            value if isinstance(value, str) else str(value)
        ).replace(old, new, -1 if count is None else count)
        for name, size in _FILTERS.items():
            self.filters[name] = self._bounded(self.filters[name], size)
        self.filters["join"] = self._bounded_join(self.filters["join"])

    def check(self, size: int) -> None:
        """Refuse to make something of this size.

        Raises:
            InputError: it is too long.
        """
        if size > self._longest:
            raise InputError(
                "makes too long a text or list", where="chat template", expected=f"at most {self._longest}"
            )

    def buffer(self) -> _Buffer:
        """For what a macro or a block prints."""
        return _Buffer(self.check)

    def concat(self, pieces: Iterable[str]) -> str:
        """The pieces as one string."""
        made, length = [], 0
        for piece in pieces:
            made.append(piece)
            length += len(piece)
            self.check(length)
        return "".join(made)

    def joined(self, context: Context, parts: tuple[Any, ...]) -> str:
        """What `~` makes."""
        self.check(_size(parts))
        return markup_join(parts) if context.eval_ctx.autoescape else str_join(parts)

    def json(self, value: Any, **options: Any) -> str:
        """As `json.dumps`."""
        if options.get("indent") is None:
            return json.dumps(value, **options)
        if isinstance(options["indent"], int):
            self.check(options["indent"])
        return self.concat(json.JSONEncoder(**options).iterencode(value))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in _UNBOUNDED and super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length(), right.bit_length()
            size = left.bit_length() * right if operator == "**" else sum(bits) if operator == "*" else max(bits)
            if size > _MAX_BITS:
                raise InputError(f"makes too long a number with {operator}", where="chat template")
        elif operator == "*":
            count = right if isinstance(right, int) else left if isinstance(left, int) else 0
            self.check(max(_length(left), _length(right)) * count)
        elif operator == "+":
            self.check(_length(left) + _length(right))
        elif operator == "%" and isinstance(left, str):
            self.check(_formatted(left, right))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, str) and name in _METHODS:
            if name == "join":
                args = tuple(map(list, args))
            named = {key: value for key, value in kwargs.items() if key not in ("_loop_vars", "_block_vars")}  # Jinja's
            __self.check(_METHODS[name](owner, *args, **named))
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        made = super().wrap_str_format(value)
        if made is None:
            return None

        @functools.wraps(made)
        def bounded(*args: Any, **kwargs: Any) -> str:
            given = ((), args[0]) if value.__name__ == "format_map" else (args, kwargs)
            _CountingFormatter(self).vformat(value.__self__, *given)
            return made(*args, **kwargs)

        return bounded

    def checked(self, value: Any) -> Any:
        """The value, whose print is not too long."""
        if not isinstance(value, str):
            self.check(_size(value))
        return value

    def _bounded(self, function: Callable[..., Any], size: Callable[..., int]) -> Callable[..., Any]:
        @functools.wraps(function)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            self.check(size(*args, **kwargs))
            return function(*args, **kwargs)

        return bounded

    def _bounded_join(self, join: Callable[..., str]) -> Callable[..., str]:
        @functools.wraps(join)
        def bounded(eval_context: Any, value: Iterable[Any], d: str = "", *args: Any, **kwargs: Any) -> str:
            items = list(value)
            self.check(_size(items) + len(items) * _size(d))
            return join(eval_context, items, d, *args, **kwargs)

        return bounded

    def _strftime_now(self, form: str) -> str:
        self.check(len(form) << 8)  # more than Python allots
        return datetime.now().strftime(form)


class _CountingFormatter(SandboxedFormatter):
    """Makes what `str.format` makes, piece by piece."""

    def __init__(self, environment: ChatEnvironment) -> None:
        super().__init__(environment)
        self._check, self._length = environment.check, 0

    def format_field(self, value: Any, format_spec: str) -> str:
        self._check(_size(value) + max(map(int, _DIGITS.findall(format_spec)), default=0))
        made: str = Formatter.format_field(self, value, format_spec)
        self._length += len(made)
        self._check(self._length)
        return made


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str) else _ITEM * len(value) if isinstance(value, (list, tuple)) else 0


def _size(value: Any) -> int:
    """At least about the characters that a value prints; what stands in it twice counts twice."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(_size(key) + _size(item) + 4 for key, item in value.items())
    if isinstance(value, Collection):
        return sum(_size(item) + 2 for item in value)
    return 0


def _formatted(form: str, values: Any) -> int:
    """Characters that `form % values` makes at most."""
    found = _CONVERSION.findall(form)
    numbers = [number for pair in found for number in pair]
    widths = [int(number) for number in numbers if number.isdigit()]
    if "*" in numbers and isinstance(values, tuple):
        widths += [abs(value) for value in values if isinstance(value, int)]
    size = _size(values) * (len(found) if isinstance(values, Mapping) else 1)
    return len(form) + len(found) * max(widths, default=0) + size


def _width(text: str, width: int = 80, *_: Any) -> int:
    return width


def _replaced(text: Any, old: str, new: str, *_: Any, **__: Any) -> int:
    text = text if isinstance(text, str) else str(text)
    count: int = text.count(old)
    return len(text) + count * len(new)


def _wrapped(
    _: Any, text: str, width: int = 79, break_long_words: bool = True, wrapstring: str | None = None, *__: Any
) -> int:
    return len(text) * (1 + len(wrapstring or ""))


_METHODS: dict[str, Callable[..., int]] = {
    **dict.fromkeys(("center", "ljust", "rjust", "zfill"), _width),
    "expandtabs": lambda text, tabsize=8: len(text) + text.count("\t") * tabsize,
    "join": lambda text, items: _size(items) + len(text) * len(items),
    "replace": _replaced,
}
"""Characters of the result of a string's method."""

_FILTERS: dict[str, Callable[..., int]] = {
    "batch": lambda value, linecount, *_, **__: _ITEM * linecount,
    "center": _width,
    "format": lambda form, *args, **kwargs: _formatted(str(form), kwargs or args),
    "indent": lambda text, width=4, *_, **__: (
        len(text) + (1 + text.count("\n")) * (width if isinstance(width, int) else len(width))
    ),
    "replace": _replaced,
    "round": lambda value, precision=0, *_, **__: precision << 10,
    "wordwrap": _wrapped,
}
"""The same of filters."""
