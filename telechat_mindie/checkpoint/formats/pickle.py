"""The pickle inside a torch archive, interpreted as data.

A pickle is a program for a small stack machine. This module has its own machine, for the opcodes with which torch.save
writes a state dict (protocol 2; torch/serialization.py `_save`, torch/_utils.py `_rebuild_tensor_v2`), and for no
others. It has no way to import or call anything: a global is a pair of strings that is looked up in a table, and
"calling" it means reading the arguments of one of three functions. Whatever else a pickle asks for is refused unrun.

Work and memory are bounded by the number of opcodes, each of which makes at most one object. Nothing recurses into a
value, not even to hash or print it (keys are strings and integers), so nesting and sharing cost nothing.
"""

from __future__ import annotations

import io
import pickletools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from telechat_mindie.checkpoint.formats.bounds import checked_name, checked_shape, quoted
from telechat_mindie.dtypes import DTYPES
from telechat_mindie.errors import CheckpointError, name_some

MAX_OPCODES = 2_000_000
"""torch.save spends about 40 on a tensor, so this is a file of 50,000."""

STORAGE_DTYPES = {dtype.torch: dtype.name for dtype in DTYPES.values()}
"""Storage classes of the module torch, and the dtypes they stand for."""

WRAPPERS = ("model", "module", "state_dict")
"""Where trainers keep the state dict in a checkpoint of theirs: Lightning, Megatron, DeepSpeed."""
MAX_WRAPPERS = 4

_NAMES = {opcode.code.encode("latin-1"): opcode.name for opcode in pickletools.opcodes}
_READERS = {opcode.code.encode("latin-1"): opcode.arg.reader for opcode in pickletools.opcodes if opcode.arg}
_MAX_GLOBAL_LENGTH = 128
_ADVICE = (
    "Nothing in the file was run. Re-save the weights with torch.save(model.state_dict(), path), or as safetensors."
)


@dataclass(frozen=True, slots=True)
class StorageRef:
    """A storage of the archive: `numel` elements of `dtype` in the member data/`key`."""

    dtype: str
    key: str
    numel: int


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A view of a storage; offset and stride are in elements."""

    storage: StorageRef
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Global:
    module: str
    name: str


_ORDERED_DICT = _Global("collections", "OrderedDict")
_REBUILD_TENSOR = _Global("torch._utils", "_rebuild_tensor_v2")
_REBUILD_PARAMETER = _Global("torch._utils", "_rebuild_parameter")
_ALLOWED = {_ORDERED_DICT, _REBUILD_TENSOR, _REBUILD_PARAMETER, *(_Global("torch", name) for name in STORAGE_DTYPES)}


def read_state_dict(pickle: bytes, where: Path) -> dict[str, TensorRef]:
    """The tensors that a pickled state dict describes, by name.

    Args:
        pickle: the archive's data.pkl.
        where: the archive, for messages.

    Raises:
        CheckpointError: the pickle needs an opcode or a global that a state dict does not need, is malformed, or is
            neither one flat table of names and tensors nor such a table under one of WRAPPERS.
    """
    table = _unwrapped(_Machine(pickle, where).run(), where)
    if not isinstance(table, dict):
        raise CheckpointError("holds no state dict", where=where, found=type(table).__name__, advice=_ADVICE)
    others = [key for key, value in table.items() if not isinstance(value, TensorRef)]
    if others:
        raise CheckpointError(
            f"holds entries that are no tensors: {name_some(map(quoted, others))}", where=where, advice=_ADVICE
        )
    return {checked_name(name, where): tensor for name, tensor in table.items()}


def _unwrapped(table: object, where: Path) -> object:
    """The state dict that a trainer's checkpoint keeps under one of WRAPPERS, beside its counters and its optimizer."""
    for _ in range(MAX_WRAPPERS):
        if not isinstance(table, dict) or any(isinstance(value, TensorRef) for value in table.values()):
            break
        found = [name for name in WRAPPERS if isinstance(table.get(name), dict)]
        if len(found) > 1:
            raise CheckpointError(
                f"holds several state dicts: {name_some(map(quoted, found))}",
                where=where,
                advice=f"Save one alone: torch.save(torch.load(path, weights_only=True)[{found[0]!r}], new_path).",
            )
        if not found:
            break
        table = table[found[0]]
    return table


class _Machine:
    """The stack machine. Its values are None, bool, int, float, str, tuple, list, dict, and the classes above."""

    def __init__(self, pickle: bytes, where: Path) -> None:
        self._program = io.BytesIO(pickle)
        self._where = where
        self._stack: list[object] = []
        self._marks: list[int] = []
        self._memo: dict[int, object] = {}

    def run(self) -> object:
        for _ in range(MAX_OPCODES):
            code = self._program.read(1)
            if code == b".":  # STOP
                result = self._pop_several(1)[0]
                if self._stack or self._marks or self._program.read(1):
                    raise self._refuse("goes on after its end")
                return result
            self._step(code)
        raise self._refuse(f"has more than {MAX_OPCODES} opcodes")

    def _step(self, code: bytes) -> None:
        push = self._stack.append
        name = _NAMES.get(code, "unknown")
        match name:
            case "BININT1" | "BININT2" | "BININT" | "LONG1" | "BINFLOAT" | "BINUNICODE":
                push(self._argument(code))
            case "BINPUT" | "LONG_BINPUT":
                self._memo[self._argument(code)] = self._top()
            case "BINGET" | "LONG_BINGET":
                push(self._remembered(self._argument(code)))
            case "NONE":
                push(None)
            case "NEWTRUE" | "NEWFALSE":
                push(name == "NEWTRUE")
            case "EMPTY_TUPLE":
                push(())
            case "EMPTY_LIST":
                push([])
            case "EMPTY_DICT":
                push({})
            case "MARK":
                self._marks.append(len(self._stack))
            case "TUPLE":
                push(tuple(self._pop_to_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                push(tuple(self._pop_several(int(name[-1]))))
            case "APPEND":
                self._extend(self._pop_several(1))
            case "APPENDS":
                self._extend(self._pop_to_mark())
            case "SETITEM":
                self._set_items(self._pop_several(2))
            case "SETITEMS":
                self._set_items(self._pop_to_mark())
            case "GLOBAL":
                push(self._global())
            case "BINPERSID":
                push(self._storage(self._pop_several(1)[0]))
            case "REDUCE":
                function, arguments = self._pop_several(2)
                push(self._reduce(function, arguments))
            case "BUILD":
                self._build(self._pop_several(1)[0])
            case "PROTO":
                if self._argument(code) != 2:
                    raise self._refuse("is not of protocol 2, which torch.save writes unless told otherwise")
            case _:
                raise self._refuse(f"uses the opcode {name}, which no state dict needs" if code else "ends too early")

    # Reading the program.

    def _argument(self, code: bytes) -> Any:
        """The opcode's argument, of a kind that pickletools reads in time and memory like its bytes in the file."""
        try:
            value = _READERS[code](self._program)
        except ValueError as error:
            raise self._refuse(f"is damaged: {error}") from None
        if isinstance(value, int) and value.bit_length() > 63:
            raise self._refuse(f"has an integer of {value.bit_length()} bits")
        return value

    def _line(self) -> str:
        line = self._program.readline(_MAX_GLOBAL_LENGTH)
        if not line.endswith(b"\n"):
            raise self._refuse("has an over-long global")
        return line[:-1].decode("ascii", "backslashreplace")

    # The stack.

    def _require(self, count: int) -> None:
        """Refuse to touch values below the last mark, or the empty stack."""
        if len(self._stack) - count < (self._marks[-1] if self._marks else 0):
            raise self._refuse("takes more from its stack than is there")

    def _top(self) -> object:
        self._require(1)
        return self._stack[-1]

    def _pop_several(self, count: int) -> list[object]:
        self._require(count)
        begin = len(self._stack) - count
        popped = self._stack[begin:]
        del self._stack[begin:]
        return popped

    def _pop_to_mark(self) -> list[object]:
        if not self._marks:
            raise self._refuse("takes more from its stack than is there")
        return self._pop_several(len(self._stack) - self._marks.pop())

    def _remembered(self, index: int) -> object:
        if index not in self._memo:
            raise self._refuse("remembers a value that it never stored")
        return self._memo[index]

    # Containers, globals, storages and tensors.

    def _extend(self, values: list[object]) -> None:
        target = self._top()
        if not isinstance(target, list):
            raise self._refuse("appends to something that is no list")
        target.extend(values)

    def _set_items(self, flat: list[object]) -> None:
        target = self._top()
        if not isinstance(target, dict) or len(flat) % 2:
            raise self._refuse("sets items of something that is no dict")
        for key, value in zip(flat[::2], flat[1::2], strict=True):
            if type(key) not in (str, int):
                raise self._refuse("has a key that is neither a string nor an integer")
            if key in target:
                raise self._refuse(f"has the key {quoted(key)} twice")
            target[key] = value

    def _global(self) -> _Global:
        wanted = _Global(self._line(), self._line())
        if wanted not in _ALLOWED:
            raise self._refuse(f"refers to {quoted(f'{wanted.module}.{wanted.name}')}, which no state dict needs")
        return wanted

    def _reduce(self, function: object, arguments: object) -> object:
        # Extras: backward hooks, and flags such as `conj` and `neg` that change what the bytes mean.
        match arguments if isinstance(arguments, tuple) else None:
            case () if function == _ORDERED_DICT:
                return {}
            case (TensorRef() as tensor, bool(), *extras) if function == _REBUILD_PARAMETER and _all_empty(extras):
                return tensor
            case (StorageRef() as storage, int(offset), tuple(shape), tuple(stride), bool(), *extras) if (
                function == _REBUILD_TENSOR and _all_empty(extras)
            ):
                checked_shape(shape, storage.dtype, self._where)
                if len(stride) == len(shape) and all(type(step) is int and step >= 0 for step in (offset, *stride)):
                    return TensorRef(storage, offset, shape, stride)
        raise self._refuse("rebuilds something that is no plain tensor or parameter")

    def _storage(self, identity: object) -> StorageRef:
        match identity:
            case ("storage", _Global(module="torch", name=name), str(key), str(), int(numel)) if name in STORAGE_DTYPES:
                checked_shape([numel], STORAGE_DTYPES[name], self._where)
                return StorageRef(STORAGE_DTYPES[name], checked_name(key, self._where), numel)
        raise self._refuse("refers to something outside itself that is no storage")

    def _build(self, state: object) -> None:
        # Module.state_dict() keeps the modules' versions in an attribute of its OrderedDict; they are of no use here.
        if not isinstance(self._top(), dict) or not isinstance(state, dict) or not state.keys() <= {"_metadata"}:
            raise self._refuse("sets the state of an object, which no state dict needs")

    def _refuse(self, why: str) -> CheckpointError:
        return CheckpointError(f"holds a pickle that {why}", where=self._where, advice=_ADVICE)


def _all_empty(extras: list[object]) -> bool:
    return len(extras) <= 2 and all(isinstance(extra, dict) and not extra for extra in extras)
