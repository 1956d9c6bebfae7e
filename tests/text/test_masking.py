"""Masked strings: to a template they are what they were, to the search for tokens they are not."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from telechat_mindie.text.masking import Content, Mask, unmask

TOKENS = ["<_user>", "</think>", "[INST]", "é"]
MASK = Mask(frozenset().union(*TOKENS))
fragments = ["<", "_", "/", "think>", "</think>", " ", "\n", "a", "T", "ß", "北", "é", "[INST]"]
texts = st.lists(st.sampled_from(fragments), max_size=10).map("".join)


def plain(value: Any) -> Any:
    if isinstance(value, str):
        return unmask(value)
    return type(value)(map(plain, value)) if isinstance(value, (list, tuple)) else value


@given(text=texts)
def test_no_character_of_a_token_is_left(text: str) -> None:
    masked = MASK(text)
    assert not set("".join(TOKENS)) & set(str(masked))
    assert len(masked) == len(text)
    assert unmask(masked) == text


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        *[(name, ()) for name in ("strip", "lstrip", "rstrip", "split", "rsplit", "splitlines")],
        *[(name, ()) for name in ("lower", "upper", "title", "capitalize", "__repr__", "isupper", "__len__")],
        *[(name, ("</think>",)) for name in ("split", "rsplit", "partition", "rpartition", "__contains__", "count")],
        *[
            (name, ("</think>",))
            for name in ("startswith", "endswith", "removeprefix", "removesuffix", "find", "__eq__")
        ],
        *[(name, ("<a>\n",)) for name in ("strip", "lstrip", "rstrip", "__add__", "__lt__")],
        *[(name, ("<", 1)) for name in ("split", "rsplit")],
        ("startswith", (("</", "_"),)),
        ("replace", ("<", "_T")),
        ("replace", ("think", "")),
        ("__getitem__", (slice(2, -1),)),
    ],
)
@given(text=texts)
def test_answers_as_the_unmasked_string(method: str, arguments: tuple[Any, ...], text: str) -> None:
    assert plain(getattr(MASK(text), method)(*arguments)) == getattr(text, method)(*arguments)


@given(text=texts)
def test_what_is_made_of_content_stays_masked(text: str) -> None:
    masked = MASK(text)
    made = [*masked.split("</think>"), masked.strip(), masked.lower(), masked.upper(), repr(masked), *masked]
    made += [masked[1:], masked.replace("a", ""), *masked.partition("_"), *masked.splitlines()]
    assert not set("".join(TOKENS)) & set("".join(map(str.__str__, made)))


def test_what_a_template_adds_stays_its_own() -> None:
    joined = "<_user>" + MASK("<_user> ") + "<_user>"
    assert isinstance(joined, Content)
    assert str.count(joined.strip(), "<_user>") == 2
    assert str.count(joined.split("> ")[-1], "<_user>") == 1
    assert unmask(joined) == "<_user><_user> <_user>"


def test_keys_of_an_object() -> None:
    masked = {MASK("<a>"): 1}
    assert masked["<a>"] == 1  # type: ignore[index]
    assert MASK("<a>") in {"<a>": 1}
