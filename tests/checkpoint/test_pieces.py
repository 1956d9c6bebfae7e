"""Tensors made of pieces: every byte range of any nest of joins and cuts is that of the array they stand for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from telechat_mindie.checkpoint import pieces
from telechat_mindie.checkpoint.formats import tensors
from telechat_mindie.checkpoint.formats.tensors import Extent, StoredTensor, TensorReader
from telechat_mindie.checkpoint.pieces import Joined, copies, cut, join
from telechat_mindie.errors import CheckpointError


def store(folder, array, number):
    """An array in a file of its own, behind some bytes, in two extents."""
    path = folder / f"{number}.bin"
    data = array.tobytes()
    path.write_bytes(b"head" + data)
    half = len(data) // 2
    extents = (Extent(path, 4, half), Extent(path, 4 + half, len(data) - half))
    return StoredTensor("x", array.dtype.name, array.shape, extents)


def divided(folder, array, data, depth, count):
    """The array as a tensor that is divided in a way that is drawn."""
    axes = [axis for axis, size in enumerate(array.shape) if size > 1]
    if depth == 0 or not axes:
        count[0] += 1
        return store(folder, array, count[0])
    axis = data.draw(st.sampled_from(axes))
    at = data.draw(st.integers(1, array.shape[axis] - 1))
    parts = [divided(folder, part, data, depth - 1, count) for part in np.split(array, [at], axis)]
    return join(parts, axis)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_range_of_any_nest(tmp_path, data):
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    array = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
    tensor = divided(tmp_path, array, data, data.draw(st.integers(0, 3)), [0])
    for _ in range(data.draw(st.integers(0, 3))):
        axis = data.draw(st.integers(0, len(shape) - 1))
        begin = data.draw(st.integers(0, array.shape[axis] - 1))
        wanted = range(begin, data.draw(st.integers(begin + 1, array.shape[axis])))
        array = array.take(wanted, axis)
        tensor = cut(tensor, axis, wanted)
    assert (tensor.shape, tensor.nbytes) == (array.shape, array.nbytes)
    stretch = data.draw(st.sampled_from([1, 2048]))  # both ways of reading a stretch of lines
    expected = array.tobytes()
    start = data.draw(st.integers(0, len(expected)))
    end = data.draw(st.integers(start, len(expected)))
    buffer = bytearray(end - start)
    with pytest.MonkeyPatch.context() as patch, TensorReader() as reader:
        patch.setattr(pieces, "STRETCH_BYTES", stretch)
        reader.read_into(tensor, start, memoryview(buffer))
        assert np.array_equal(reader.load(tensor), array)
    assert buffer == expected[start:end]


def test_pieces_along_the_first_axis_are_one_stored_tensor(tmp_path):
    parts = [store(tmp_path, np.full((2, 3), number, np.float32), number) for number in range(4)]
    whole = join(parts, 0)
    assert type(whole) is StoredTensor and whole.shape == (8, 3)
    assert {extent.file for extent in cut(whole, 0, range(2, 4)).extents} == {tmp_path / "1.bin"}
    assert type(join(parts, 1)) is Joined


def test_a_cut_at_the_seams_gives_the_pieces_back(tmp_path):
    parts = [store(tmp_path, np.full((2, 3), number, np.float32), number) for number in range(4)]
    assert cut(join(parts, 1), 1, range(3, 6)) is parts[1]


def test_copies_are_compared_in_every_byte(tmp_path):
    array = np.arange(1000, dtype=np.float32).reshape(100, 10)
    same, other = store(tmp_path, array, 0), array.copy()
    other[57, 3] += 1
    tensor = copies([same, store(tmp_path, array, 1), store(tmp_path, other, 2)])
    with TensorReader() as reader:
        assert np.array_equal(reader.load(cut(tensor, 0, range(50))), array[:50])
        for place in (tensor, cut(tensor, 1, range(2, 4)), cut(tensor, 0, range(57, 58))):
            with pytest.raises(CheckpointError, match=r"not the same in two ranks.*0\.bin and .*2\.bin differ"):
                reader.load(place)


def open_files():
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_a_reader_keeps_few_files_open(tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "MAX_OPEN_FILES", 3)
    before = open_files()
    whole = join([store(tmp_path, np.full(2, number, np.int32), number) for number in range(20)], 0)
    with TensorReader() as reader:
        for _ in range(2):
            assert list(reader.load(whole)) == [number // 2 for number in range(40)]
        assert open_files() - before == 3
    assert open_files() == before
