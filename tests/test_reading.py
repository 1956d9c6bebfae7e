"""One reader of JSON for every file: what it takes, what it refuses, and how it says so."""

from __future__ import annotations

import json
import os
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from telechat_mindie.errors import ConfigError, TokenizerError
from telechat_mindie.reading import depth, parse_json, read_bytes, read_json, read_text, read_yaml, text_depth


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", r"here:1:1: is not valid JSON"),
        ('{"a": 1,}', r"here:1:[89]: is not valid JSON.*no comments, no single quotes and no comma"),
        ('{\n  "a": 1 // note\n}', r"here:2:10: is not valid JSON"),
        ("[1]", r"here: holds no JSON object \(expected \{\.\.\.\}, found list\)"),
        ('{"a": {"b": 1, "b": 1}}', "key 'b' stands twice"),
        ('{"a": NaN}', "NaN"),
        ('{"a": -Infinity}', "-Infinity"),
        ('{"a": 1e999}', "1e999"),
        ('{"a": ' + "9" * 5000 + "}", "here: is not valid JSON"),
        ('{"a":' + "[" * 100_000, "nested too deeply.*at most 64 levels, found 100001"),
    ],
)
def test_what_is_refused(text, sentence):
    with pytest.raises(ConfigError, match=sentence):
        parse_json(text, "here")


def test_the_bound_of_depth_is_the_callers():
    nested = '{"a": [[1]]}'
    assert parse_json(nested, "here", max_depth=3) == {"a": [[1]]}
    with pytest.raises(ConfigError, match="at most 2 levels, found 3"):
        parse_json(nested, "here", max_depth=2)


def test_brackets_in_strings_are_no_depth():
    text = json.dumps({"a": '\\"' + "[" * 1000})
    assert text_depth(text) == 1
    assert parse_json(text, "here")["a"].endswith("[" * 1000)


def test_a_string_without_an_end_takes_no_time():
    begin = time.perf_counter()
    with pytest.raises(ConfigError, match="not valid JSON"):
        parse_json('{"a' + '\\"[' * 300_000, "here")
    assert time.perf_counter() - begin < 5


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(alphabet='"\\[]{}a', max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(alphabet='"[\\', max_size=3), inner, max_size=3)
    ),
)


@given(json_values)
def test_a_text_is_as_deep_as_its_value(value):
    def levels(value):
        items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
        return 0 if items is None else 1 + max(map(levels, items), default=0)

    assert depth(value) == text_depth(json.dumps(value)) == levels(value)


def test_line_ends_and_the_byte_order_mark_stay_in_the_text(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b'\xef\xbb\xbf{"a":\r\n1}')
    assert read_text(path) == '\ufeff{"a":\r\n1}'
    assert read_json(path) == {"a": 1} == read_yaml(path)


def test_files_that_are_none(tmp_path):
    for name, sentence in (("none", "missing"), ("folder", "not a regular file"), ("pipe", "not a regular file")):
        if name == "folder":
            (tmp_path / name).mkdir()
        elif name == "pipe":
            os.mkfifo(tmp_path / name)
        with pytest.raises(ConfigError, match=sentence):
            read_text(tmp_path / name)
    (tmp_path / "long").write_text("12345")
    with pytest.raises(ConfigError, match=r"too large.*at most 4 bytes"):
        read_text(tmp_path / "long", limit=4)
    (tmp_path / "pointer").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(TokenizerError, match="is a Git LFS pointer, not the file itself"):
        read_bytes(tmp_path / "pointer", 99, TokenizerError)
    with pytest.raises(TokenizerError, match=r"file is missing\. Copy it\."):
        read_bytes(tmp_path / "none", 99, TokenizerError, "Copy it.")
    (tmp_path / "latin").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"not UTF-8.*byte 0"):
        read_text(tmp_path / "latin")
