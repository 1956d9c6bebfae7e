"""Torch archives without torch: what torch.save writes is read, and damaged or other files are refused."""

from __future__ import annotations

import collections
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.torch_archive import (
    View,
    call,
    integer,
    pickle_of_weight,
    pickle_state_dict,
    symbol,
    text,
    whole,
    write_pickle_archive,
    write_records,
    write_torch_archive,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from telechat_mindie.checkpoint.formats.tensors import TensorReader
from telechat_mindie.checkpoint.formats.torch import read_torch_bin
from telechat_mindie.dtypes import DTYPES
from telechat_mindie.errors import CheckpointError

STORAGE = np.arange(12, dtype=np.float32)


def load(path: Path) -> dict[str, np.ndarray]:
    with TensorReader() as reader:
        return {name: reader.load(tensor) for name, tensor in read_torch_bin(path).items()}


# What torch.save writes.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wide", [False, True], ids=["zip32", "zip64"])
def test_reads_every_dtype(tmp_path: Path, dtype: str, wide: bool) -> None:
    tensors = {
        "matrix": np.arange(6).reshape(2, 3).astype(DTYPES[dtype].numpy),
        "scalar": np.array(1).astype(DTYPES[dtype].numpy),
        "empty": np.zeros((0, 5), DTYPES[dtype].numpy),
    }
    write_torch_archive(tmp_path / "pytorch_model.bin", tensors, wide=wide)

    loaded = load(tmp_path / "pytorch_model.bin")

    assert list(loaded) == list(tensors)
    for name, array in tensors.items():
        assert (loaded[name].dtype, loaded[name].shape) == (array.dtype, array.shape)
        assert loaded[name].tobytes() == array.tobytes()


def test_reads_module_state_dicts_parameters_and_archives_of_old_releases(tmp_path: Path) -> None:
    tensors = {"weight": STORAGE.reshape(3, 4), "bias": STORAGE[:3].copy()}
    write_torch_archive(tmp_path / "a.bin", tensors, parameters=["weight"], module=True, byteorder=None)

    loaded = load(tmp_path / "a.bin")

    assert loaded["weight"].tolist() == tensors["weight"].tolist()
    assert loaded["bias"].tolist() == tensors["bias"].tolist()


def test_tensors_may_share_a_storage_and_view_parts_of_it(tmp_path: Path) -> None:
    write_torch_archive(
        tmp_path / "a.bin",
        {
            "embedding": whole(STORAGE),
            "lm_head": View(STORAGE, 0, (3, 4), (4, 1)),
            "rows": View(STORAGE, 4, (2, 4), (4, 1)),
            "column of one": View(STORAGE, 2, (1, 3), (999, 1)),
            "nothing": View(STORAGE, 12, (0, 7), (3, 5)),
        },
    )

    stored = read_torch_bin(tmp_path / "a.bin")
    loaded = load(tmp_path / "a.bin")

    assert stored["embedding"].extents == stored["lm_head"].extents
    assert loaded["rows"].tolist() == STORAGE[4:].reshape(2, 4).tolist()
    assert loaded["column of one"].tolist() == [[2, 3, 4]]
    assert loaded["nothing"].shape == (0, 7)


def test_integers_of_every_width(tmp_path: Path) -> None:
    # A storage of more than 2**31 elements has its numel in LONG1; the member is too small for it, and that is said.
    storage = text("storage") + symbol("torch", "FloatStorage") + text("0") + text("cpu") + integer(2**33)
    value = call("torch._utils", "_rebuild_tensor_v2", b"(" + storage + b"tQ" + integer(70_000) + b"))\x89" + b"}")
    with pytest.raises(CheckpointError, match=f"{4 * 2**33} bytes"):
        read_torch_bin(write_pickle_archive(tmp_path / "a.bin", pickle_of_weight(value), {"0": bytes(16)}))


def test_real_torch_agrees(tmp_path: Path) -> None:
    torch: Any = pytest.importorskip("torch")
    weight = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    tensors = {
        "weight": weight,
        "tied": weight,
        "rows": weight[1:],
        "parameter": torch.nn.Parameter(weight.bfloat16()),
        "scalar": torch.tensor(3),
        "empty": torch.empty(0, 5),
    }
    tensors |= {name: torch.ones(3).to(getattr(torch, name)) for name in DTYPES}
    module = torch.nn.Linear(3, 2).half().state_dict()
    for state in (tensors, collections.OrderedDict(tensors), module):
        torch.save(state, tmp_path / "real.bin")
        loaded = load(tmp_path / "real.bin")
        assert list(loaded) == list(state)
        for name, tensor in state.items():
            as_bytes = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            assert (loaded[name].shape, loaded[name].tobytes()) == (tuple(tensor.shape), as_bytes)

    arrays = {"a": STORAGE.reshape(3, 4), "b": STORAGE.astype(DTYPES["bfloat16"].numpy)}
    write_torch_archive(tmp_path / "ours.bin", arrays, parameters=["b"], module=True)
    for name, tensor in torch.load(tmp_path / "ours.bin", weights_only=True).items():
        assert tensor.float().detach().numpy().tolist() == arrays[name].astype(np.float32).tolist()

    torch.save({"transposed": weight.t()}, tmp_path / "strided.bin")
    with pytest.raises(CheckpointError, match="transposed"):
        read_torch_bin(tmp_path / "strided.bin")
    torch.save(tensors, tmp_path / "legacy.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="legacy"):
        read_torch_bin(tmp_path / "legacy.bin")


# Tensors that cannot be had as they are.


def test_names_tensors_that_are_not_contiguous(tmp_path: Path) -> None:
    write_torch_archive(
        tmp_path / "a.bin",
        {
            "good": whole(STORAGE),
            "transposed": View(STORAGE, 0, (4, 3), (1, 4)),
            "expanded": View(STORAGE, 0, (2, 3), (0, 1)),
        },
    )
    with pytest.raises(CheckpointError, match=r"expanded, transposed \(|expanded, transposed\. .*contiguous"):
        read_torch_bin(tmp_path / "a.bin")


@pytest.mark.parametrize("view", [View(STORAGE, 1, (12,), (1,)), View(STORAGE, 2**62, (1,), (1,))])
def test_refuses_views_beyond_their_storage(tmp_path: Path, view: View) -> None:
    write_torch_archive(tmp_path / "a.bin", {"a": view})
    with pytest.raises(CheckpointError, match="beyond its storage"):
        read_torch_bin(tmp_path / "a.bin")


@pytest.mark.parametrize(
    ("shape", "stride", "offset"),
    [
        ((-1,), (1,), 0),
        ((2**31, 2**31, 4), (0, 0, 0), 0),
        ((3,), (1, 1), 0),
        ((3,), (-1,), 3),
        ((3,), (1,), -3),
        ((1,) * 33, (1,) * 33, 0),
    ],
)
def test_refuses_impossible_views(tmp_path: Path, shape: Any, stride: Any, offset: int) -> None:
    write_torch_archive(tmp_path / "a.bin", {"a": View(STORAGE, offset, shape, stride)})
    with pytest.raises(CheckpointError, match=r"shape|no plain tensor"):
        read_torch_bin(tmp_path / "a.bin")


@pytest.mark.parametrize("storages", [{}, {"0": bytes(44)}, {"0": bytes(52)}], ids=["absent", "short", "long"])
def test_refuses_storages_that_are_absent_or_of_another_size(tmp_path: Path, storages: dict[str, bytes]) -> None:
    pickled, _ = pickle_state_dict({"weight": STORAGE})
    with pytest.raises(CheckpointError, match="weight: has"):
        read_torch_bin(write_pickle_archive(tmp_path / "a.bin", pickled, storages))


def test_refuses_a_big_endian_archive(tmp_path: Path) -> None:
    write_torch_archive(tmp_path / "a.bin", {"weight": STORAGE}, byteorder="big")
    with pytest.raises(CheckpointError, match="byte order"):
        read_torch_bin(tmp_path / "a.bin")


def test_an_archive_saved_without_checksums_is_read(tmp_path: Path) -> None:
    write_torch_archive(tmp_path / "a.bin", {"weight": STORAGE})
    content = bytearray((tmp_path / "a.bin").read_bytes())
    entry = content.index(b"PK\x01\x02")  # that of data.pkl
    content[entry + 16 : entry + 20] = bytes(4)
    (tmp_path / "a.bin").write_bytes(content)

    assert load(tmp_path / "a.bin")["weight"].tolist() == STORAGE.tolist()


# Other files, and damaged ones.

LEGACY_PICKLE = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LEGACY_PICKLE, r"legacy pickle.*safetensors"),
        (b"\x80\x02}.", "is not a torch archive"),
        (b"", "is not a torch archive"),
        (b"<html>", "is not a torch archive"),
        (b"PK\x03\x04", "not a well-formed zip"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ],
    ids=["legacy", "plain pickle", "empty", "HTML", "stub", "git lfs"],
)
def test_refuses_other_files_with_advice(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_torch_bin(tmp_path / "a.bin")


def test_refuses_a_legacy_tar(tmp_path: Path) -> None:
    (tmp_path / "storages").write_bytes(bytes(100))
    with tarfile.open(tmp_path / "a.bin", "w") as archive:
        archive.add(tmp_path / "storages", "storages")
    with pytest.raises(CheckpointError, match="legacy tar"):
        read_torch_bin(tmp_path / "a.bin")


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ({"a/data.pkl": b"\x80\x02}.", "b/data.pkl": b"\x80\x02}."}, "one folder"),
        ({"data.pkl": b"\x80\x02}."}, "without a state dict"),
        ({"a/version": b"3"}, "without a state dict"),
        ({"a/data.pkl": bytes((64 << 20) + 1)}, "too large a data.pkl"),
    ],
    ids=["two folders", "no folder", "no pickle", "large pickle"],
)
def test_refuses_other_zip_archives(tmp_path: Path, records: dict[str, bytes], message: str) -> None:
    write_records(tmp_path / "a.bin", records)
    with pytest.raises(CheckpointError, match=message):
        read_torch_bin(tmp_path / "a.bin")


def test_refuses_what_is_no_file_of_the_checkpoint(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("/etc/passwd")
    for name in ("fifo", "link", "absent"):
        with pytest.raises(CheckpointError):
            read_torch_bin(tmp_path / name)


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("torch") / "a.bin"
    write_torch_archive(path, {"weight": STORAGE, "bias": STORAGE[:3].copy()}, wide=True)
    return path.read_bytes()


@given(data=st.data())
@settings(deadline=None, max_examples=400)
def test_mutated_archives_raise_only_our_error(
    tmp_path_factory: pytest.TempPathFactory, archive: bytes, data: st.DataObject
) -> None:
    mutated = bytearray(archive)
    for position in data.draw(st.lists(st.integers(0, len(archive) - 1), min_size=1, max_size=4)):
        mutated[position] = data.draw(st.sampled_from([0, 1, 8, 127, 128, 255]) | st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "mutated.bin"
    path.write_bytes(mutated[: data.draw(st.just(len(archive)) | st.integers(0, len(archive)))])
    try:
        stored = read_torch_bin(path)
    except CheckpointError:
        return
    for tensor in stored.values():
        (extent,) = tensor.extents
        assert extent.nbytes == tensor.nbytes
        assert 0 < extent.offset <= extent.offset + extent.nbytes < path.stat().st_size
