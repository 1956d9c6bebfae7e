"""MindSpore checkpoints: we read what MindSpore saves and it loads what we write, in both of its formats."""

from __future__ import annotations

import os
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from telechat_mindie.checkpoint.formats import mindspore as mindspore_format
from telechat_mindie.checkpoint.formats.mindspore import ckpt_slices, encode_ckpt_entry_prefix, read_mindspore_ckpt
from telechat_mindie.checkpoint.formats.safetensors import read_safetensors
from telechat_mindie.checkpoint.formats.tensors import StoredTensor, TensorReader
from telechat_mindie.dtypes import DTYPES
from telechat_mindie.errors import CheckpointError

ARRAYS = {dtype: np.arange(6).reshape(2, 3).astype(row.numpy) for dtype, row in DTYPES.items()} | {
    "scalar": np.array(7, np.int32),
    "vector of one": np.array([7], np.int32),
    "层.weight": np.arange(4, dtype=np.float32),
}


def write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Stream a .ckpt file the way a writer would: a prefix and the bytes, slice by slice."""
    with path.open("wb") as file:
        for name, array in arrays.items():
            content = array.tobytes()
            for nbytes in ckpt_slices(len(content)):
                file.write(encode_ckpt_entry_prefix(name, array.dtype.name, array.shape, nbytes))
                file.write(content[:nbytes])
                content = content[nbytes:]


def load(stored: dict[str, StoredTensor]) -> dict[str, np.ndarray]:
    with TensorReader() as reader:
        return {name: reader.load(tensor) for name, tensor in stored.items()}


def assert_same(loaded: dict[str, np.ndarray], arrays: dict[str, np.ndarray]) -> None:
    assert loaded.keys() == arrays.keys()
    for name, array in arrays.items():
        found = loaded[name]
        assert (found.dtype.name, found.shape) == (array.dtype.name, array.shape), name
        assert found.tobytes() == array.tobytes(), name


def parameters(arrays: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """What mindspore.save_checkpoint takes."""
    import mindspore

    tensors = {}
    for name, array in arrays.items():
        if array.dtype == DTYPES["bfloat16"].numpy:
            tensors[name] = mindspore.Tensor(array.astype(np.float32)).astype(mindspore.bfloat16)
        else:
            tensors[name] = mindspore.Tensor(array)
    return [{"name": name, "data": tensor} for name, tensor in tensors.items()]


def as_numpy(parameter: Any) -> np.ndarray:
    import mindspore

    if parameter.dtype == mindspore.bfloat16:
        return parameter.float().asnumpy().astype(DTYPES["bfloat16"].numpy)
    return parameter.asnumpy()


# With MindSpore.


@pytest.mark.parametrize("crc_check", [False, True])
def test_reads_the_ckpt_that_mindspore_saves(tmp_path: Path, crc_check: bool) -> None:
    import mindspore

    path = tmp_path / "a.ckpt"
    extras = {"epoch_num": 3, "learning_rate": 0.5, "done": True, "note": "é"}
    mindspore.save_checkpoint(parameters(ARRAYS), str(path), append_dict=extras, crc_check=crc_check)

    stored = read_mindspore_ckpt(path)

    note = np.frombuffer("é".encode("utf-32-le"), np.uint8)
    numbers = {"epoch_num": np.array(3), "learning_rate": np.array(0.5, np.float32), "done": np.array(True)}
    assert_same(load(stored), ARRAYS | numbers | {"note": note})
    assert list(stored) == [*ARRAYS, *extras]


def test_reads_the_safetensors_that_mindspore_saves(tmp_path: Path) -> None:
    import mindspore

    path = tmp_path / "a.safetensors"
    mindspore.save_checkpoint(parameters(ARRAYS), str(path), append_dict={"epoch_num": 3}, format="safetensors")

    assert path.stat().st_mode & 0o777 == 0o400
    assert_same(load(read_safetensors(path)), ARRAYS | {"epoch_num": np.array(3)})


def test_reads_a_tensor_that_mindspore_saved_in_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mindspore.train import serialization

    arrays = {
        "before": np.ones(3, np.float32),
        "big": np.arange(1000.0).reshape(10, 100),
        "behind": np.ones(2, np.int8),
    }
    monkeypatch.setattr(serialization, "SLICE_SIZE", 1)  # KiB
    serialization.save_checkpoint(parameters(arrays), str(tmp_path / "a.ckpt"))

    stored = read_mindspore_ckpt(tmp_path / "a.ckpt")

    assert [extent.nbytes for extent in stored["big"].extents] == [1024] * 7 + [832]
    assert_same(load(stored), arrays)


@pytest.mark.parametrize("slice_bytes", [512 << 20, 8])
def test_mindspore_loads_what_we_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slice_bytes: int) -> None:
    import mindspore

    monkeypatch.setattr(mindspore_format, "SLICE_BYTES", slice_bytes)
    write(tmp_path / "a.ckpt", ARRAYS)

    loaded = mindspore.load_checkpoint(str(tmp_path / "a.ckpt"))

    assert_same({name: as_numpy(parameter) for name, parameter in loaded.items()}, ARRAYS)


@given(
    st.text(st.characters(categories=("L", "N", "P", "S")), min_size=1, max_size=200),
    st.sampled_from(list(DTYPES)),
    st.lists(st.integers(0, 300), max_size=3).map(tuple),
)
@settings(deadline=None, max_examples=50)
def test_the_prefix_is_what_protobuf_writes(name: str, dtype: str, shape: tuple[int, ...]) -> None:
    from mindspore.train.checkpoint_pb2 import Checkpoint

    content = bytes(min(StoredTensor(name, dtype, shape, ()).nbytes, 1000))
    message = Checkpoint()
    value = message.value.add()
    value.tag = name
    value.tensor.dims.extend(shape)
    value.tensor.tensor_type = "BFloat16" if dtype == "bfloat16" else dtype.title().replace("Uint", "UInt")
    value.tensor.tensor_content = content

    assert encode_ckpt_entry_prefix(name, dtype, shape, len(content)) + content == message.SerializeToString()


@pytest.mark.parametrize("mode", ["AES-GCM", "AES-CBC", "SM4-CBC"])
def test_refuses_an_encrypted_file(tmp_path: Path, mode: str) -> None:
    import mindspore

    path = tmp_path / "a.ckpt"
    mindspore.save_checkpoint(parameters(ARRAYS), str(path), enc_key=b"0123456789abcdef", enc_mode=mode)
    with pytest.raises(CheckpointError, match=f"is encrypted .*{mode}"):
        read_mindspore_ckpt(path)


# Without MindSpore.


def test_reads_what_we_write(tmp_path: Path) -> None:
    arrays = ARRAYS | {"empty": np.zeros((0, 4), np.float16)}
    write(tmp_path / "a.ckpt", arrays)

    assert_same(load(read_mindspore_ckpt(tmp_path / "a.ckpt")), arrays)


def test_slices_are_those_of_mindspore() -> None:
    mib_512 = 512 << 20
    assert ckpt_slices(0) == [0]
    assert ckpt_slices(5) == [5]
    assert ckpt_slices(mib_512) == [mib_512]
    assert ckpt_slices(2 * mib_512 + 5) == [mib_512, mib_512, 5]


def test_a_file_of_many_gibibytes_is_read_without_its_contents(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    shape = (40, 1 << 30)
    with path.open("wb") as file:  # sparse
        for nbytes in ckpt_slices(40 << 30):
            file.write(encode_ckpt_entry_prefix("big", "int8", shape, nbytes))
            file.seek(nbytes, os.SEEK_CUR)
        file.write(encode_ckpt_entry_prefix("small", "int8", (1,), 1) + b"\x05")
    tracemalloc.start()
    try:
        stored = read_mindspore_ckpt(path)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()

    assert (stored["big"].shape, len(stored["big"].extents)) == (shape, 80)
    assert load({"small": stored["small"]})["small"].tolist() == [5]


def test_the_scalar_of_old_releases_is_a_scalar(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_bytes(encode_ckpt_entry_prefix("global_step", "int32", (0,), 4) + b"\x07\0\0\0")

    assert load(read_mindspore_ckpt(tmp_path / "a.ckpt"))["global_step"] == 7


def field(number: int, content: bytes) -> bytes:
    """A length-delimited field of at most 127 bytes."""
    return bytes([number << 3 | 2, len(content)]) + content


NAME = field(1, b"w")
DIMS, TYPE, CONTENT = b"\x08\x02", field(2, b"Int8"), field(3, b"ab")
TENSOR = field(2, DIMS + TYPE + CONTENT)
BIG_VARINT = b"\xff" * 9 + b"\x01"
MALFORMED = {
    "empty": (b"", "holds no tensors"),
    "JSON": (b'{"weights": []}', "well-formed"),
    "only a checksum": (b"crc_num" + bytes(10), "holds no tensors"),
    "another field at the top": (field(2, NAME + TENSOR), "unknown field"),
    "a number at the top": (b"\x08\x01", "unknown field"),
    "no name": (field(1, TENSOR), "without a name"),
    "no tensor": (field(1, NAME), "without a name or a tensor"),
    "two names": (field(1, NAME + NAME + TENSOR), "repeated"),
    "two tensors": (field(1, NAME + TENSOR + TENSOR), "repeated"),
    "map tensor": (field(1, NAME + field(3, b"")), "map tensor 'w'"),
    "unknown field": (field(1, NAME + TENSOR + field(4, b"")), "unknown"),
    "unknown field in the tensor": (field(1, NAME + field(2, DIMS + TYPE + CONTENT + field(4, b""))), "unknown"),
    "a group": (field(1, NAME + b"\x0b\x0c"), "unknown"),
    "no type": (field(1, NAME + field(2, DIMS + CONTENT)), "no type"),
    "no content": (field(1, NAME + field(2, DIMS + TYPE)), "no content"),
    "two contents": (field(1, NAME + field(2, DIMS + TYPE + CONTENT + CONTENT)), "repeated"),
    "33 dims": (field(1, NAME + field(2, b"\x08\x01" * 33 + TYPE + field(3, b"a"))), "repeated field in tensor w"),
    "negative dim": (field(1, NAME + field(2, b"\x08" + BIG_VARINT + TYPE + CONTENT)), "shape"),
    "overflowing dims": (field(1, NAME + field(2, (b"\x08" + b"\x80" * 8 + b"\x40") * 2 + TYPE + CONTENT)), "shape"),
    "bytes do not match": (field(1, NAME + field(2, b"\x08\x03" + TYPE + CONTENT)), "expected 3"),
    "unknown dtype": (field(1, NAME + field(2, DIMS + field(2, b"Int4") + CONTENT)), "Int4"),
    "name with NUL": (field(1, field(1, b"w\0") + TENSOR), "name"),
    "name that is not UTF-8": (field(1, field(1, b"\xff") + TENSOR), "UTF-8"),
    "over-long name": (b"\x0a\x84\x20\x0a\x81\x20" + b"w" * 4097, "a name of 4097 bytes"),
    "field beyond the value": (field(1, NAME + b"\x12\x7f"), "beyond its message"),
    "value beyond the file": (b"\x0a\x7f" + NAME, "beyond its message"),
    "value of 2**63 bytes": (b"\x0a" + b"\xff" * 8 + b"\x7f", "beyond its message"),
    "number of 70 bits": (b"\x0a" + b"\xff" * 9 + b"\x7f", "64 bits"),
    "number without an end": (b"\x0a" + b"\xff" * 20, "64 bits"),
    "number cut": (b"\x0a\xff", "ends too early"),
    "stored twice": (field(1, NAME + TENSOR) + field(1, field(1, b"v") + TENSOR) + field(1, NAME + TENSOR), "twice"),
    "stored twice in a row": (field(1, NAME + TENSOR) * 2, "expected 2"),
    "slices that differ": (
        field(1, NAME + TENSOR) + field(1, NAME + field(2, b"\x08\x04" + TYPE + CONTENT)),
        "slices that differ",
    ),
    "checksum in the middle": (b"crc_num" + bytes(10) + field(1, NAME + TENSOR), "unknown field"),
}


def test_the_message_that_is_spoilt_below_is_good(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_bytes(field(1, TENSOR + NAME) + b"crc_num" + bytes(10))

    assert load(read_mindspore_ckpt(tmp_path / "a.ckpt"))["w"].tobytes() == b"ab"


@pytest.mark.parametrize(("content", "message"), MALFORMED.values(), ids=MALFORMED.keys())
def test_refuses_malformed_messages(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.ckpt").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_mindspore_ckpt(tmp_path / "a.ckpt")


def test_refuses_a_million_values_in_bounded_time(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_bytes(field(1, NAME + TENSOR) * 1_000_000)
    started = time.process_time()
    with pytest.raises(CheckpointError, match="too many tensors"):
        read_mindspore_ckpt(tmp_path / "a.ckpt")
    assert time.process_time() - started < 20  # two or three on a quiet machine


def test_refuses_a_file_cut_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    write(path, {"w": np.arange(3, dtype=np.float32)})
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            read_mindspore_ckpt(path)


def test_refuses_what_is_no_file_of_the_checkpoint(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("/etc/passwd")
    for name in ("fifo", "link", "absent"):
        with pytest.raises(CheckpointError):
            read_mindspore_ckpt(tmp_path / name)


VALID = field(1, NAME + TENSOR) + field(1, field(1, b"v") + TENSOR) + b"crc_num" + bytes(10)


@given(st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 2), st.binary(max_size=3)), max_size=4))
@settings(deadline=None, max_examples=400)
def test_mutated_files_raise_only_our_error(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, int, bytes]]
) -> None:
    mutated = VALID
    for position, removed, inserted in edits:
        mutated = mutated[:position] + inserted + mutated[position + removed :]
    path = tmp_path_factory.getbasetemp() / "mutated.ckpt"
    path.write_bytes(mutated)
    try:
        stored = read_mindspore_ckpt(path)
    except CheckpointError:
        return
    for tensor in stored.values():
        assert sum(extent.nbytes for extent in tensor.extents) == tensor.nbytes
    load(stored)
