"""The wall between what a template writes and what it prints of others.

A chat message is data. Whatever it contains, it must not end a turn, open one, or fake a tool's answer, so the tokens
of a rendered prompt have to come from the template alone. Every string that a template is given is therefore masked:
each of its characters that occurs in any token becomes a lone surrogate, U+D800 plus its code. No UTF-8 text contains
those, and they are refused in the input; lengths and positions stay, and unmasking restores every string exactly. A
token found in the masked prompt has no masked character, so all its characters were written by the template: none
begins or ends in content, and contents that stand side by side, or between pieces of a template, cannot form one.
(A character from U+0800 on has no mask; of a token with such characters all others come from the template.)

A template must still see the strings as they are, or `'</think>' in message.content` would fail: `Content` compares
and searches unmasked, and keeps each character's mask through cutting and joining. What it cannot follow (`~`, `join`,
macros) leaves plain strings that are still masked, and compare so: never unsafe.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, SupportsIndex

_FIRST, _COUNT = 0xD800, 0x800
_MASK = {code: _FIRST + code for code in range(_COUNT)}
_UNMASK = {_FIRST + code: code for code in range(_COUNT)}
_ANY_MASKED = re.compile("[\ud800-\udfff]")


def unmask(text: str) -> str:
    """The text as the template would have printed it from unmasked strings."""
    return text.translate(_UNMASK) if _ANY_MASKED.search(text) else str(text)


class Mask:
    """Masks the given characters, in either case; hashable, since compiled templates are kept by it."""

    def __init__(self, characters: frozenset[str]) -> None:
        self._key = characters
        both = {case for character in characters for case in character.lower() + character.upper()}
        self._table = {ord(c): _MASK[ord(c)] for c in both | characters if ord(c) < _COUNT}

    def __call__(self, text: str) -> Content:
        return Content(text.translate(self._table))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mask) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


class Content(str):
    """A string with masked characters that answers questions as if they were not masked."""

    __slots__ = ()

    def __hash__(self) -> int:
        return hash(unmask(self))

    def __repr__(self) -> str:
        # What is not ASCII or printable differs between a masked and a real string, so all of it is content.
        return repr(unmask(self)).translate(_MASK)

    def __iter__(self) -> Iterator[str]:
        return map(Content, super().__iter__())

    def __getitem__(self, index: SupportsIndex | slice) -> Content:
        return Content(super().__getitem__(index))

    def __add__(self, other: str) -> Content:
        return Content(str.__add__(self, other))

    def __radd__(self, other: str) -> Content:
        return Content(str.__add__(other, self))

    def strip(self, chars: str | None = None) -> Content:
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: str | None = None) -> Content:
        return self[len(self) - len(unmask(self).lstrip(_plain(chars))) :]

    def rstrip(self, chars: str | None = None) -> Content:
        return self[: len(unmask(self).rstrip(_plain(chars)))]

    def removeprefix(self, prefix: str) -> Content:
        return self[len(prefix) if self.startswith(prefix) else 0 :]

    def removesuffix(self, suffix: str) -> Content:
        return self[: len(self) - (len(suffix) if self.endswith(suffix) else 0)]

    def replace(self, old: str, new: str, count: SupportsIndex = -1) -> Content:
        if not old:
            return Content(str.replace(self, old, new, count))
        return Content(str.join(new, self.split(old, count)))

    def _pieces(self, pieces: Any) -> list[Any]:
        """Of this string what `pieces`, which stand in the unmasked one in this order, are of that."""
        plain, at, found = unmask(self), 0, []
        for piece in pieces:
            at = plain.find(piece, at)
            found.append(self[at : at + len(piece)])
            at += len(piece)
        return found

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[Any]:
        return self._separated(unmask(self).split(_plain(sep), maxsplit), sep)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[Any]:
        return self._separated(unmask(self).rsplit(_plain(sep), maxsplit), sep)

    def _separated(self, pieces: list[str], sep: str | None) -> list[Any]:
        if sep is None:
            return self._pieces(pieces)
        found, at = [], 0
        for piece in pieces:
            found.append(self[at : at + len(piece)])
            at += len(piece) + len(sep)
        return found

    def splitlines(self, keepends: bool = False) -> list[Any]:
        return self._pieces(unmask(self).splitlines(keepends))

    def partition(self, sep: str) -> Any:
        return tuple(self._pieces(unmask(self).partition(_plain(sep))))

    def rpartition(self, sep: str) -> Any:
        return tuple(self._pieces(unmask(self).rpartition(_plain(sep))))


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return unmask(value)
    return tuple(map(_plain, value)) if isinstance(value, tuple) else value


def _asking(name: str) -> Callable[..., Any]:
    def ask(self: Content, *arguments: Any) -> Any:
        return getattr(str, name)(unmask(self), *map(_plain, arguments))

    ask.__name__ = name
    return ask


def _recasing(name: str) -> Callable[..., Content]:
    def recase(self: Content) -> Content:
        # Characters that need no mask may become some that do; nothing says which came from a template.
        return Content(getattr(str, name)(unmask(self)).translate(_MASK))

    recase.__name__ = name
    return recase


_QUESTIONS = """
    __eq__ __ne__ __lt__ __le__ __gt__ __ge__ __contains__ startswith endswith find rfind index rindex count
    isalnum isalpha isascii isdecimal isdigit islower isnumeric isprintable isspace istitle isupper
"""
for _name in _QUESTIONS.split():
    setattr(Content, _name, _asking(_name))
for _name in ("lower", "upper", "title", "capitalize", "swapcase", "casefold"):
    setattr(Content, _name, _recasing(_name))
