"""Safetensors headers: the library reads what we write and we what it writes; anything else is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from telechat_mindie.checkpoint.formats.safetensors import (
    encode_safetensors_header,
    read_safetensors,
)
from telechat_mindie.checkpoint.formats.tensors import StoredTensor, TensorReader
from telechat_mindie.dtypes import DTYPES
from telechat_mindie.errors import CheckpointError

ARRAYS = {
    "weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "权重": np.arange(4).astype(DTYPES["bfloat16"].numpy),
    "scalar": np.array(7, np.int64),
    "empty": np.zeros((0, 5), np.float16),
    "mask": np.array([True, False, True]),
}


def write(path: Path, header: Any, buffer: bytes = b"") -> Path:
    """A file with this header, as JSON or as raw bytes, and this buffer."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + buffer)
    return path


def entry(dtype: Any = "U8", shape: Any = (4,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def assert_same_arrays(stored: dict[str, StoredTensor], arrays: dict[str, np.ndarray]) -> None:
    assert stored.keys() == arrays.keys()
    with TensorReader() as reader:
        for name, array in arrays.items():
            for found in (reader.load(stored[name]), reader.map(stored[name])):
                assert (found.dtype, found.shape, found.tobytes()) == (array.dtype, array.shape, array.tobytes())


def test_mapped_arrays_are_the_files_pages(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    array = np.arange(1 << 20, dtype=np.float32)
    safetensors.numpy.save_file({"x": array, "y": array}, path)
    stored = read_safetensors(path)
    with TensorReader() as reader:
        first, again, other = (reader.map(stored[name]) for name in "xxy")
        assert np.shares_memory(first, again) and not np.shares_memory(first, other)
    path.rename(tmp_path / "b.safetensors")  # what stands under the name later does not matter
    path.write_bytes(b"other")
    assert np.array_equal(other, array)
    first[0] = 7  # this process's own
    assert again[0] == 7
    assert_same_arrays(read_safetensors(tmp_path / "b.safetensors"), {"x": array, "y": array})


def test_what_cannot_be_mapped_is_loaded(tmp_path: Path) -> None:
    path = write(
        tmp_path / "odd.safetensors", {"x": entry("F32", (1,), (0, 4))} | {"y": entry("U8", (1,), (4, 5))}, bytes(5)
    )
    (tensor,) = (each for each in read_safetensors(path).values() if each.name == "x")
    shifted = dataclasses.replace(
        tensor, extents=(dataclasses.replace(tensor.extents[0], offset=tensor.extents[0].offset + 1),)
    )
    with TensorReader() as reader:
        assert reader.map(shifted).tobytes() == bytes(4)


def test_a_file_that_got_shorter_is_not_mapped(tmp_path: Path) -> None:
    safetensors.numpy.save_file({"x": np.zeros(1000)}, tmp_path / "a.safetensors")
    stored = read_safetensors(tmp_path / "a.safetensors")
    for size, sentence in ((500, "ends inside tensor x"), (0, "cannot be mapped")):
        os.truncate(tmp_path / "a.safetensors", size)
        with TensorReader() as reader, pytest.raises(CheckpointError, match=sentence):
            reader.map(stored["x"])


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    safetensors.numpy.save_file(ARRAYS, tmp_path / "a.safetensors", metadata={"format": "pt"})

    assert_same_arrays(read_safetensors(tmp_path / "a.safetensors"), ARRAYS)


def test_reads_a_published_style_checkpoint(shared: Callable[[str], Path]) -> None:
    folder = shared("oracle/gqa_bf16") / "ckpt"
    for path in sorted(folder.glob("*.safetensors")):
        with safetensors.safe_open(path, "np") as library:
            stored = read_safetensors(path, folder)
            assert sorted(stored) == sorted(library.keys())
            assert {tensor.dtype for tensor in stored.values()} == {"bfloat16"}
            for name, tensor in stored.items():
                assert tensor.shape == tuple(library.get_slice(name).get_shape())


def test_tensors_come_in_the_order_of_their_bytes(tmp_path: Path) -> None:
    header = {"b": entry(offsets=[4, 8]), "empty": entry(shape=[0], offsets=[4, 4]), "a": entry()}

    assert list(read_safetensors(write(tmp_path / "f", header, bytes(8)))) == ["a", "empty", "b"]


def test_a_file_without_tensors_is_empty(tmp_path: Path) -> None:
    path = write(tmp_path / "f", b"{}      ")

    assert read_safetensors(path) == {}


NAMES = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S")), min_size=1, max_size=20)


@given(
    st.lists(
        st.tuples(NAMES, st.sampled_from(list(DTYPES)), st.lists(st.integers(0, 4), max_size=4).map(tuple)),
        unique_by=lambda tensor: tensor[0],
        max_size=8,
    ),
    st.dictionaries(NAMES, st.text(st.characters(codec="utf-8"), max_size=20), max_size=3),
)
@settings(deadline=None)
def test_the_library_reads_what_we_write(
    tmp_path_factory: pytest.TempPathFactory,
    tensors: list[tuple[str, str, tuple[int, ...]]],
    metadata: dict[str, str],
) -> None:
    tensors = [tensor for tensor in tensors if tensor[0] != "__metadata__"]
    head = encode_safetensors_header(tensors, metadata)
    sizes = [StoredTensor(*tensor, ()).nbytes for tensor in tensors]
    contents = [os.urandom(size) for size in sizes]
    path = tmp_path_factory.getbasetemp() / "written.safetensors"
    path.write_bytes(head + b"".join(contents))

    assert len(head) % 8 == 0
    offsets = [len(head) + sum(sizes[:position]) for position in range(len(sizes))]
    library = dict(safetensors.deserialize(path.read_bytes()))
    assert {name: bytes(tensor["data"]) for name, tensor in library.items()} == {
        name: content for (name, _, _), content in zip(tensors, contents, strict=True)
    }
    ours = read_safetensors(path)
    assert {(t.name, t.dtype, t.shape, t.extents[0].offset) for t in ours.values()} == {
        (*tensor, offset) for tensor, offset in zip(tensors, offsets, strict=True)
    }
    assert {name: tuple(tensor["shape"]) for name, tensor in library.items()} == {t[0]: t[2] for t in tensors}
    with safetensors.safe_open(path, "np") as opened:
        assert (opened.metadata() or {}) == metadata


@pytest.mark.parametrize(
    "tensors",
    [
        [("a", "float32", (1,)), ("a", "float32", (1,))],
        [("__metadata__", "float32", (1,))],
        [("a\0b", "float32", (1,))],
        [("a", "float32", (-1,))],
    ],
    ids=["twice", "reserved", "nul", "negative"],
)
def test_does_not_write_a_header_that_it_would_refuse(tensors: list[tuple[str, str, tuple[int, ...]]]) -> None:
    with pytest.raises(CheckpointError):
        encode_safetensors_header(tensors, {"format": "pt"})


HOSTILE_ENTRIES = {
    "gap at the start": ({"a": entry(offsets=[4, 8])}, "gap"),
    "gap": ({"a": entry(), "b": entry(shape=[3], offsets=[5, 8])}, "gap"),
    "overlap": ({"a": entry(), "b": entry(shape=[5], offsets=[3, 8])}, "overlaps"),
    "same bytes": ({"a": entry(shape=[8], offsets=[0, 8]), "b": entry(shape=[8], offsets=[0, 8])}, "overlaps"),
    "over the end": ({"a": entry(shape=[9], offsets=[0, 9])}, "truncated"),
    "unclaimed bytes": ({"a": entry()}, "belong to no tensor"),
    "end before begin": ({"a": entry(offsets=[8, 0])}, "data_offsets"),
    "negative offset": ({"a": entry(offsets=[-4, 0])}, "data_offsets"),
    "float offset": ({"a": entry(shape=[8], offsets=[0, 8.0])}, "data_offsets"),
    "bool offset": ({"a": entry(shape=[1], offsets=[False, True])}, "data_offsets"),
    "three offsets": ({"a": entry(offsets=[0, 4, 8])}, "data_offsets"),
    "offsets as an object": ({"a": entry(offsets={"0": 4})}, "data_offsets"),
    "bytes do not match": ({"a": entry("F32", [2, 2], [0, 8])}, "expected 16 bytes"),
    "shape overflows 64 bits to 0": ({"a": entry("F32", [2**31, 2**32, 2], [0, 8])}, "2\\*\\*63"),
    "overflow hidden by a zero": ({"a": entry("F32", [2**62, 2**62, 0], [0, 0])}, "2\\*\\*63"),
    "negative dim": ({"a": entry(shape=[-8, -1], offsets=[0, 8])}, "shape"),
    "bool dim": ({"a": entry(shape=[True, 8], offsets=[0, 8])}, "shape"),
    "float dim": ({"a": entry(shape=[8.0], offsets=[0, 8])}, "shape"),
    "shape is a number": ({"a": entry(shape=8, offsets=[0, 8])}, "shape"),
    "33 dims": ({"a": entry(shape=[1] * 33, offsets=[0, 1])}, "shape"),
    "unknown dtype": ({"a": entry("F8_E4M3", [8], [0, 8])}, "F8_E4M3"),
    "dtype is a list": ({"a": entry(["U8"], [8], [0, 8])}, "dtype"),
    "missing key": ({"a": {"dtype": "U8", "shape": [8]}}, "wrong header entry"),
    "extra key": ({"a": entry(shape=[8], offsets=[0, 8]) | {"file": "/etc/passwd"}}, "wrong header entry"),
    "entry is a list": ({"a": ["U8", [8], [0, 8]]}, "no JSON object"),
    "nul in the name": ({"a\0": entry(shape=[8], offsets=[0, 8])}, "name"),
    "escape sequence in the name": ({"\x1b[2J": entry(shape=[8], offsets=[0, 8])}, "name"),
    "lone surrogate in the name": ({"\ud800": entry(shape=[8], offsets=[0, 8])}, "name"),
    "empty name": ({"": entry(shape=[8], offsets=[0, 8])}, "name"),
    "over-long name": ({"a" * 513: entry(shape=[8], offsets=[0, 8])}, "name"),
    "metadata is a list": ({"__metadata__": [], "a": entry(shape=[8], offsets=[0, 8])}, "no JSON object"),
    "metadata value is a number": ({"__metadata__": {"n": 1}, "a": entry(shape=[8], offsets=[0, 8])}, "strings"),
    "tensor named __metadata__": ({"__metadata__": entry(shape=[8], offsets=[0, 8])}, "strings"),
}


@pytest.mark.parametrize(("header", "message"), HOSTILE_ENTRIES.values(), ids=HOSTILE_ENTRIES.keys())
def test_refuses_entries_that_lie(tmp_path: Path, header: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_safetensors(write(tmp_path / "f", header, bytes(8)))


HOSTILE_HEADERS = {
    "not JSON": (b"{]", "no JSON object"),
    "not UTF-8": (b'{"\xff": 1}', "no JSON object"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "no JSON object"),
    "a list": (b"[]", "no JSON object"),
    "leading space": (b" {}", "no JSON object"),
    "something behind": (b"{}{}", "no JSON object"),
    "same key twice": (b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{}}', "'a' twice"),
    "same key twice inside": (b'{"a":{"dtype":"U8","dtype":"I8","shape":[0],"data_offsets":[0,0]}}', "'dtype' twice"),
    "same metadata twice": (b'{"__metadata__":{"k":"1","k":"2"}}', "'k' twice"),
    "NaN": (b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,0]}}', "shape"),
    "exponent": (b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0e0,0]}}', "data_offsets"),
    "nested a million deep": (b'{"a":' * 50_000 + b"[" * 1_000_000, "JSON object"),
    "nested shape": (b'{"a":{"dtype":"U8","shape":[' + b"[" * 800 + b"]" * 800 + b'],"data_offsets":[0,0]}}', "shape"),
    "integer of a million digits": (
        b'{"a":{"dtype":"U8","shape":[' + b"9" * 1_000_000 + b'],"data_offsets":[0,0]}}',
        "1000000 digits",
    ),
    "four million lists": (b'{"a":[' + b"[]," * 4_000_000 + b"[]]}", "too many"),
}


@pytest.mark.parametrize(("header", "message"), HOSTILE_HEADERS.values(), ids=HOSTILE_HEADERS.keys())
def test_refuses_headers_that_are_no_table(tmp_path: Path, header: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        read_safetensors(write(tmp_path / "f", header))
    assert len(str(caught.value)) < 500 + len(str(tmp_path))


def test_refuses_a_million_tensors_in_bounded_time_and_memory(tmp_path: Path) -> None:
    tensor = b'"%07d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    path = write(tmp_path / "f", b"{" + b",".join(tensor % number for number in range(1_000_000)) + b"}")
    tracemalloc.start()
    started = time.process_time()
    try:
        with pytest.raises(CheckpointError, match="too many tensors"):
            read_safetensors(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert time.process_time() - started < 5
    assert peak < 2 * path.stat().st_size


@pytest.mark.parametrize("length", [100_000_001, 2**63, 2**64 - 1, 9])
def test_refuses_a_header_over_the_cap_or_the_file_before_reading_it(tmp_path: Path, length: int) -> None:
    path = tmp_path / "f"
    path.write_bytes(length.to_bytes(8, "little") + b"{}      ")
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="header that is longer"):
            read_safetensors(path)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("size", range(9))
def test_refuses_a_file_that_ends_inside_its_header(tmp_path: Path, size: int) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"\x08\0\0\0\0\0\0\0{}      "[:size])
    with pytest.raises(CheckpointError):
        read_safetensors(path)


@pytest.mark.parametrize("change", [-1, 1])
def test_refuses_one_byte_too_few_or_too_many(tmp_path: Path, change: int) -> None:
    path = tmp_path / "a.safetensors"
    safetensors.numpy.save_file(ARRAYS, path)
    os.truncate(path, path.stat().st_size + change)
    with pytest.raises(CheckpointError, match="truncated" if change < 0 else "belong to no tensor"):
        read_safetensors(path)


def test_refuses_what_is_no_file_of_the_checkpoint(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("/etc/passwd")
    (tmp_path / "folder").mkdir()
    for name in ("fifo", "link", "folder", "absent"):
        with pytest.raises(CheckpointError):
            read_safetensors(tmp_path / name)


def test_names_a_git_lfs_pointer(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        read_safetensors(path)


@given(st.binary(max_size=200))
@settings(deadline=None, max_examples=200)
def test_random_headers_raise_only_our_error(tmp_path_factory: pytest.TempPathFactory, header: bytes) -> None:
    path = write(tmp_path_factory.getbasetemp() / "random", header)
    try:
        read_safetensors(path)
    except CheckpointError:
        return
    assert json.loads(header).keys() <= {"__metadata__"}


VALID = safetensors.numpy.save(ARRAYS, metadata={"format": "pt"})
SNIPPETS = st.sampled_from([b'"', b"{", b"}", b"[", b"]", b",", b":", b"0", b"-", b"e", b"true", b"\\u0000", b"\xff"])


@given(
    st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 3), SNIPPETS | st.binary(max_size=3)), max_size=4)
)
@settings(deadline=None, max_examples=400)
def test_mutated_files_are_refused_or_read_as_the_library_reads_them(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, int, bytes]]
) -> None:
    mutated = VALID
    for position, removed, inserted in edits:
        mutated = mutated[:position] + inserted + mutated[position + removed :]
    path = tmp_path_factory.getbasetemp() / "mutated"
    path.write_bytes(mutated)
    try:
        stored = read_safetensors(path)
    except CheckpointError:
        return
    library = dict(safetensors.deserialize(mutated))
    assert stored.keys() == library.keys()
    with TensorReader() as reader:
        for name, tensor in stored.items():
            assert tensor.shape == tuple(library[name]["shape"])
            assert reader.load(tensor).tobytes() == bytes(library[name]["data"])
