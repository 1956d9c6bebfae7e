"""Messages between the ranks' parent and its workers: a JSON head and numpy arrays as they lie in memory. No pickle."""

from __future__ import annotations

import json
import math
import socket
import struct
from typing import Any

import numpy as np

from telechat_mindie.dtypes import DTYPES
from telechat_mindie.errors import InputError
from telechat_mindie.units import format_bytes

MAX_HEAD_BYTES = 1 << 20
MAX_ARRAY_BYTES = 1 << 31
_LENGTH = struct.Struct("<I")


def send(connection: socket.socket, message: dict[str, Any]) -> None:
    """Send a flat dictionary of JSON values and arrays.

    Raises:
        InputError: an array, or all else together, is larger than `receive` takes, or an array of a dtype that it does
            not know. Nothing was sent.
        OSError: the other side has gone.
    """
    arrays = {key: value for key, value in message.items() if isinstance(value, np.ndarray)}
    for key, array in arrays.items():
        if array.nbytes > MAX_ARRAY_BYTES:
            raise InputError(
                "is too large for the ranks' socket",
                where=key,
                expected=f"at most {format_bytes(MAX_ARRAY_BYTES)}",
                found=f"{format_bytes(array.nbytes)}, {array.dtype} {list(array.shape)}",
            )
        if array.dtype.name not in DTYPES:
            raise InputError("cannot go to the ranks", where=key, expected=" or ".join(DTYPES), found=array.dtype)
    head = {
        "values": {key: value for key, value in message.items() if key not in arrays},
        "arrays": [[key, array.dtype.name, list(array.shape)] for key, array in arrays.items()],
    }
    text = json.dumps(head).encode()
    if len(text) > MAX_HEAD_BYTES:
        raise InputError(
            "are too large for the ranks' socket",
            where="arguments that are no arrays",
            expected=f"at most {format_bytes(MAX_HEAD_BYTES)}",
            found=format_bytes(len(text)),
        )
    connection.sendall(_LENGTH.pack(len(text)) + text)
    for array in arrays.values():
        connection.sendall(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def receive(connection: socket.socket) -> dict[str, Any]:
    """The next message.

    Raises:
        EOFError: the other side has gone.
        ValueError: what came is no message.
    """
    (length,) = _LENGTH.unpack(_exactly(connection, _LENGTH.size))
    if length > MAX_HEAD_BYTES:
        raise ValueError(f"a head of {length} bytes")
    head = json.loads(bytes(_exactly(connection, length)))
    message: dict[str, Any] = head["values"]
    for key, dtype, shape in head["arrays"]:
        known = DTYPES.get(dtype)
        size = math.prod(shape) * known.itemsize if known else -1
        if known is None or not 0 <= size <= MAX_ARRAY_BYTES:
            raise ValueError(f"array {key} of {dtype} {shape}")
        message[key] = np.frombuffer(_exactly(connection, size), known.numpy).reshape(shape)
    return message


def _exactly(connection: socket.socket, count: int) -> bytearray:
    buffer = bytearray(count)
    view = memoryview(buffer)
    while view:
        done = connection.recv_into(view)
        if done == 0:
            raise EOFError
        view = view[done:]
    return buffer
