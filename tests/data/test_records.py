"""Data files as records: lines and arrays, cut anywhere, in any encoding that people save them in."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from telechat_mindie.data import records as module
from telechat_mindie.data.records import data_files, read_records
from telechat_mindie.errors import TelechatMindieError

RECORDS = st.lists(
    st.dictionaries(
        st.text(max_size=4), st.recursive(st.text(max_size=9), lambda inner: st.lists(inner, max_size=3)), max_size=3
    ),
    max_size=6,
)


def parsed(path):
    return [record.parse() for record in read_records(path)]


@settings(deadline=None)
@given(records=RECORDS, chunk=st.integers(1, 40), indent=st.sampled_from([None, 2]), mark=st.booleans())
def test_an_array_gives_its_items_however_it_is_read(tmp_path_factory, records, chunk, indent, mark):
    path = tmp_path_factory.mktemp("data") / "a.json"
    path.write_bytes(b"\xef\xbb\xbf" * mark + json.dumps(records, ensure_ascii=False, indent=indent).encode() + b"\n ")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK_BYTES", chunk)
        assert parsed(path) == records


@settings(deadline=None)
@given(
    records=RECORDS.filter(bool),
    mark=st.booleans(),
    end=st.sampled_from(["\n", "\r\n", "\n\n  \n"]),
    last=st.booleans(),
)
def test_lines_give_their_objects(tmp_path_factory, records, mark, end, last):
    path = tmp_path_factory.mktemp("data") / "a.jsonl"
    text = end.join(json.dumps(record, ensure_ascii=False) for record in records) + end * last
    path.write_bytes(b"\xef\xbb\xbf" * mark + text.encode())
    assert parsed(path) == records


def test_a_record_knows_its_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"a": 1}\n\n   \n{"a": 2}')
    assert [record.where for record in read_records(path)] == [f"{path}:2", f"{path}:5"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"a": "\xff\xfe"}', "a.json:1: is not UTF-8"),
        ('{"a": "你好"}'.encode("gbk"), "iconv -f GB18030 -t UTF-8"),
        (b'{"a": 1},\n{"a": 2}', "a.json:1:1:9: is not valid JSON"),
        (b'{"a": NaN}', "a.json:1: is not valid JSON"),
        (b'{"a": 1, "a": 2}', "stands twice"),
        (b'"text"', "holds no JSON object"),
        (b"[1, 2]", "item 1: is not an object"),
        (b'[{"a": 1}, ]', "item 2: is not valid JSON"),
        (b'[{"a": 1} {"a": 2}]', "item 2: is not a JSON array of objects"),
        (b'[{"a": 1}', "item 2: is not a JSON array of objects. Is the file cut off?"),
        (b'[{"a": 1}, {"b": "', "item 2: is not valid JSON"),
        (b'[{"a": 1}] [', "goes on behind its JSON array"),
        (b'[{"a": "\xff"}]', "item 1: is not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    ],
)
def test_a_fault_is_one_sentence_with_its_place(tmp_path, content, said):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(TelechatMindieError) as caught:
        parsed(path)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b'{"a": "%s"}', b'[{"a": "%s"}]'])
def test_a_record_is_bounded(tmp_path, monkeypatch, content):
    monkeypatch.setattr(module, "MAX_RECORD_BYTES", 1000)
    monkeypatch.setattr(module, "_CHUNK_BYTES", 100)
    path = tmp_path / "a"
    path.write_bytes(content % (b"x" * 5000))
    with pytest.raises(TelechatMindieError, match="too long"):
        parsed(path)


def test_files_are_found_by_name_and_pattern(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.jsonl", "a.jsonl", "c[1].jsonl"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "folder").mkdir()
    (tmp_path / "gone.txt").symlink_to("nowhere")
    assert [str(path) for path in data_files(["b.jsonl", "*.jsonl"])] == ["b.jsonl", "a.jsonl", "c[1].jsonl"]
    assert [str(path) for path in data_files(["c[1].jsonl"])] == ["c[1].jsonl"]
    for name in ("none.jsonl", "*.md", "*.txt", "folder"):
        with pytest.raises(TelechatMindieError, match="Name"):
            data_files([name])
