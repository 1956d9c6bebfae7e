"""The pickle in a torch archive: whatever it could do besides describing tensors is refused unrun."""

from __future__ import annotations

import collections
import copyreg
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.torch_archive import (
    call,
    integer,
    ordered_dict,
    pickle_of_weight,
    pickle_state_dict,
    rebuild_tensor,
    symbol,
    text,
    whole,
    write_pickle_archive,
    write_torch_archive,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from telechat_mindie.checkpoint.formats.pickle import TensorRef, read_state_dict
from telechat_mindie.checkpoint.formats.torch import read_torch_bin
from telechat_mindie.errors import CheckpointError

STORAGE = np.arange(12, dtype=np.float32)
# Pickles that run code. Each is a real one: pickle.loads runs it first, which leaves the canary.


class Calls:
    """Pickles as a call of `function`, whose result is then given `state`."""

    def __init__(self, function: Callable[..., object], *arguments: object, state: object = None) -> None:
        self.reduced = (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.reduced


class TouchesWhenMade:
    def __new__(cls, canary: str) -> TouchesWhenMade:
        Path(canary).touch()
        return super().__new__(cls)


class TouchesWhenSet:
    def __setstate__(self, canary: str) -> None:
        Path(canary).touch()


def object_bombs(canary: str) -> dict[str, object]:
    """Objects whose unpickling touches the canary, whatever the protocol."""
    command = Calls(os.system, f"touch {canary}")
    return {
        "os.system": command,
        "eval": Calls(eval, f"open({canary!r}, 'w')"),
        "exec": Calls(exec, f"open({canary!r}, 'w')"),
        "nested reduce": Calls(collections.OrderedDict, [("weight", command)]),
        "value": {"weight": command},
        "key": {(command,): 1},
        "metadata": Calls(collections.OrderedDict, state={"_metadata": command}),
        "__setstate__": Calls(TouchesWhenSet, state=canary),
    }


def written_bombs(canary: str) -> dict[str, bytes]:
    """Pickles in opcodes that pickle.dumps does not use, or not in this order."""
    command = f"touch {canary}"
    line = repr(command).encode()
    run = symbol("os", "system") + text(command) + b"\x85R"
    return {
        "protocol 0": b"cos\nsystem\n(S" + line + b"\ntR.",
        "INST": b"(S" + line + b"\nios\nsystem\n.",
        "OBJ": b"(cos\nsystem\nS" + line + b"\no.",
        "NEWOBJ": symbol(__name__, "TouchesWhenMade") + text(canary) + b"\x85\x81.",
        "NEWOBJ_EX": b"\x80\x04" + symbol(__name__, "TouchesWhenMade") + text(canary) + b"\x85}\x92.",
        "STACK_GLOBAL": b"\x80\x04" + text("os") + text("system") + b"\x93" + text(command) + b"\x85R.",
        "STACK_GLOBAL of a path": b"\x80\x04"
        + text("shutil")
        + text("os.system")
        + b"\x93"
        + text(command)
        + b"\x85R.",
        "popped off": run + b"0}.",
        "out of the memo": b"\x80\x02" + symbol("os", "system") + b"q\x00" + text(command) + b"\x85q\x010" + b"h\x01R.",
        "before a state dict": b"\x80\x02" + run + b"0}" + text("weight") + b"K\x01s.",
        "behind a mark": b"\x80\x02(" + run + b"1}.",
    }


def detonate(pickled: bytes, canary: Path) -> None:
    pickle.loads(pickled)
    assert canary.exists(), "the bomb is a dud"
    canary.unlink()


def assert_refused_unrun(path: Path, pickled: bytes, canary: Path) -> None:
    detonate(pickled, canary)
    started = time.process_time()
    with pytest.raises(CheckpointError, match="Nothing in the file was run"):
        read_torch_bin(write_pickle_archive(path, pickled))
    assert not canary.exists()
    assert time.process_time() - started < 5


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("kind", object_bombs("canary"))
def test_pickle_bombs_do_not_go_off(tmp_path: Path, kind: str, protocol: int) -> None:
    canary = tmp_path / "canary"
    pickled = pickle.dumps(object_bombs(str(canary))[kind], protocol=protocol)

    assert_refused_unrun(tmp_path / "a.bin", pickled, canary)


@pytest.mark.parametrize("kind", written_bombs("canary"))
def test_pickle_bombs_in_rare_opcodes_do_not_go_off(tmp_path: Path, kind: str) -> None:
    canary = tmp_path / "canary"

    assert_refused_unrun(tmp_path / "a.bin", written_bombs(str(canary))[kind], canary)


def test_a_bomb_in_the_extension_registry_does_not_go_off(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    copyreg.add_extension("posix", "system", 240)
    try:
        pickled = pickle.dumps(Calls(os.system, f"touch {canary}"), protocol=2)
        assert b"\x82\xf0" in pickled
        assert_refused_unrun(tmp_path / "a.bin", pickled, canary)
    finally:
        copyreg.remove_extension("posix", "system", 240)


def test_a_bomb_swapped_in_for_the_pickle_does_not_go_off(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    bomb = pickle.dumps(Calls(os.system, f"touch {canary}"), protocol=2)
    detonate(bomb, canary)
    write_torch_archive(tmp_path / "a.bin", {f"layer {number}": STORAGE for number in range(9)})
    content = (tmp_path / "a.bin").read_bytes()
    begin = content.index(b"\x80\x02}")
    (tmp_path / "a.bin").write_bytes(content[:begin] + bomb + content[begin + len(bomb) :])

    with pytest.raises(CheckpointError, match="checksum"):
        read_torch_bin(tmp_path / "a.bin")
    assert not canary.exists()


TENSOR = rebuild_tensor(whole(STORAGE), "0")
OTHER_STATES = {
    "a list": (b"\x80\x02].", "no state dict"),
    "a tensor": (b"\x80\x02" + TENSOR + b".", "no state dict"),
    "entries that are no tensors": (b"\x80\x02}(" + text("w") + TENSOR + text("lr") + b"G" + bytes(8) + b"u.", "'lr'"),
    "an integer as a name": (b"\x80\x02}K\x01" + TENSOR + b"s.", "name"),
    "an escape sequence as a name": (b"\x80\x02}" + text("\x1b[2J") + TENSOR + b"s.", "name"),
    "a name twice": (b"\x80\x02}(" + (text("w") + TENSOR) * 2 + b"u.", "'w' twice"),
    "a tensor with hooks": (
        pickle_of_weight(TENSOR.replace(ordered_dict(), b"}K\x01K\x02s")),
        "no plain tensor",
    ),
    "a conjugate view": (
        pickle_of_weight(TENSOR.removesuffix(b"tR") + b"}" + text("conj") + b"\x88s" + b"tR"),
        "no plain tensor",
    ),
    "a dtype we do not have": (
        pickle_of_weight(TENSOR.replace(b"FloatStorage", b"ShortStorage")),
        "torch.ShortStorage",
    ),
    "a storage in a string": (
        pickle_of_weight(TENSOR.replace(symbol("torch", "FloatStorage"), text("FloatStorage"))),
        "no st",
    ),
    "a shape in a string": (
        pickle_of_weight(call("torch._utils", "_rebuild_tensor_v2", text("abc") * 6)),
        "no plain tensor",
    ),
}


@pytest.mark.parametrize(("data_pkl", "message"), OTHER_STATES.values(), ids=OTHER_STATES.keys())
def test_refuses_what_is_no_flat_state_dict(tmp_path: Path, data_pkl: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_torch_bin(write_pickle_archive(tmp_path / "a.bin", data_pkl, {"0": STORAGE.tobytes()}))


# Pickles that are broken, or that cost more than they should.

MALFORMED = {
    "empty": b"",
    "only its protocol": b"\x80\x02",
    "without a stop": b"\x80\x02}",
    "stop on an empty stack": b"\x80\x02.",
    "bytes behind the stop": b"\x80\x02}.}",
    "two values left": b"\x80\x02}}.",
    "a mark left": b"\x80\x02}(.",
    "below the stack": b"\x80\x02R.",
    "below the mark": b"\x80\x02}(s.",
    "tuple without a mark": b"\x80\x02}t.",
    "memo of an empty stack": b"\x80\x02q\x00.",
    "memo never stored": b"\x80\x02h\x00.",
    "odd items": b"\x80\x02}(K\x01u.",
    "items of a tuple": b"\x80\x02)(K\x01K\x01u.",
    "items of a list": b"\x80\x02](K\x01K\x01u.",
    "append to a dict": b"\x80\x02}K\x01a.",
    "a tuple as a key": b"\x80\x02})K\x01s.",
    "a call without a tuple": b"\x80\x02" + symbol("collections", "OrderedDict") + b"]R.",
    "a call of a string": b"\x80\x02" + text("collections.OrderedDict") + b")R.",
    "OrderedDict with arguments": b"\x80\x02" + symbol("collections", "OrderedDict") + b"]\x85R.",
    "another attribute of a dict": b"\x80\x02}}" + text("__class__") + b"K\x01sb.",
    "state of a tuple": b"\x80\x02)}b.",
    "global of one line": b"\x80\x02ctorch",
    "global of 10,000 characters": b"\x80\x02c" + b"a" * 10_000 + b"\nb\n.",
    "global that is not ASCII": b"\x80\x02c\xff\n\xff\n.",
    "string of 4 GB": b"\x80\x02X\xff\xff\xff\xffabc.",
    "string that is not UTF-8": b"\x80\x02X\x01\0\0\0\xff.",
    "integer of 255 bytes": b"\x80\x02\x8a\xff" + b"\x01" * 255 + b".",
    "integer of 2 GB": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "another protocol": b"\x80\x05}.",
    "unknown opcode": b"\x80\x02\xff.",
    "persistent id of another kind": b"\x80\x02" + text("module") + b"\x85Q.",
    "storage of a negative size": pickle_of_weight(
        TENSOR.replace(text("cpu") + b"K\x0c", text("cpu") + b"J\xff\xff\xff\xff")
    ),
    "storage size is a bool": pickle_of_weight(TENSOR.replace(text("cpu") + b"K\x0c", text("cpu") + b"\x88")),
}


@pytest.mark.parametrize("pickled", MALFORMED.values(), ids=MALFORMED.keys())
def test_refuses_malformed_pickles(tmp_path: Path, pickled: bytes) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_torch_bin(write_pickle_archive(tmp_path / "a.bin", pickled, {"0": STORAGE.tobytes()}))
    assert len(str(caught.value)) < 600 + len(str(tmp_path))


STORAGE_ID = text("storage") + symbol("torch", "FloatStorage") + text("0") + text("cpu") + b"K\x0c"
DOUBLED = b")" + b"q\x00h\x00\x86" * 1000 + b"q\x000"  # 2**1000 empty tuples, in the memo at 0
COSTLY = {
    "millions of dicts": b"\x80\x02" + b"}" * 20_000_000,
    "millions of tuples in tuples": b"\x80\x02)" + b"\x85" * 20_000_000,
    "a doubled tuple as a shape": DOUBLED
    + pickle_of_weight(call("torch._utils", "_rebuild_tensor_v2", b"(" + STORAGE_ID + b"tQK\0h\0h\0\x89}")),
    "a doubled tuple as a weight": DOUBLED + pickle_of_weight(b"h\0"),
    "a large state set again and again": b"}(" + b"".join(map(integer, range(500_000))) + b"u(" + b"2b" * 500_000,
    "a dict in itself": b"}q\0" + text("a") + b"h\0s.",
}


@pytest.mark.parametrize("pickled", COSTLY.values(), ids=COSTLY.keys())
def test_costly_pickles_are_refused_in_bounded_time(tmp_path: Path, pickled: bytes) -> None:
    path = write_pickle_archive(tmp_path / "a.bin", pickled, {"0": STORAGE.tobytes()})
    started = time.process_time()
    with pytest.raises(CheckpointError):
        read_torch_bin(path)
    assert time.process_time() - started < 20  # seconds of the processor; one or five


def test_costly_pickles_are_refused_in_bounded_memory(tmp_path: Path) -> None:
    path = write_pickle_archive(tmp_path / "a.bin", COSTLY["millions of tuples in tuples"])
    measure = (
        "import pathlib, resource, sys\n"
        "from telechat_mindie.checkpoint.formats.torch import read_torch_bin\n"
        "from telechat_mindie.errors import CheckpointError\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n    read_torch_bin(pathlib.Path(sys.argv[1]))\n"
        "except CheckpointError:\n    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    child = subprocess.run([sys.executable, "-c", measure, str(path)], capture_output=True, text=True, check=True)

    assert int(child.stdout) < 400 * 1024  # KiB; the file itself has 20 MB


# Whatever the bytes are, only our error comes out.

OPCODES = [bytes([code]) for code in range(256)]
FRAGMENTS = st.sampled_from(
    [
        *OPCODES,
        TENSOR,
        ordered_dict(),
        STORAGE_ID + b"tQ",
        text("weight"),
        b"K\x03",
        b"q\0",
        b"h\0",
        b"\x89",
        b"}",
        b"(",
    ]
)


@given(st.lists(FRAGMENTS | st.binary(max_size=8), max_size=30).map(b"".join))
@settings(deadline=None, max_examples=500)
def test_random_pickles_raise_only_our_error(pickled: bytes) -> None:
    try:
        tensors = read_state_dict(b"\x80\x02" + pickled + b".", Path("a.bin"))
    except CheckpointError:
        return
    assert all(isinstance(tensor, TensorRef) for tensor in tensors.values())


VALID, _ = pickle_state_dict(
    {"weight": STORAGE, "bias": STORAGE, "scale": STORAGE[3]}, parameters=["bias"], module=True
)


@given(st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 3), FRAGMENTS), min_size=1, max_size=4))
@settings(deadline=None, max_examples=500)
def test_mutated_pickles_raise_only_our_error(edits: list[tuple[int, int, bytes]]) -> None:
    mutated = VALID
    for position, removed, inserted in edits:
        mutated = mutated[:position] + inserted + mutated[position + removed :]
    try:
        tensors = read_state_dict(mutated, Path("a.bin"))
    except CheckpointError:
        return
    assert all(isinstance(tensor, TensorRef) and name.isprintable() for name, tensor in tensors.items())
