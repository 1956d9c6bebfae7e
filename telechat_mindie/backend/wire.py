"""Messages between the ranks' parent and its workers: a JSON head and numpy arrays as they lie in memory. No pickle."""

from __future__ import annotations

import json
import socket
import struct
from typing import Any

import numpy as np

MAX_HEAD_BYTES = 1 << 20
MAX_ARRAY_BYTES = 1 << 31
_LENGTH = struct.Struct("<I")
_DTYPES = ("int32", "int64", "float32", "float64", "bool")


def send(connection: socket.socket, message: dict[str, Any]) -> None:
    """Send a flat dictionary of JSON values and arrays.

    Raises:
        OSError: the other side has gone.
    """
    arrays = {key: np.ascontiguousarray(value) for key, value in message.items() if isinstance(value, np.ndarray)}
    head = {
        "values": {key: value for key, value in message.items() if key not in arrays},
        "arrays": [[key, array.dtype.name, list(array.shape)] for key, array in arrays.items()],
    }
    text = json.dumps(head).encode()
    connection.sendall(_LENGTH.pack(len(text)) + text)
    for array in arrays.values():
        connection.sendall(array.reshape(-1).view(np.uint8).data)


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
        count = int(np.prod(shape, dtype=np.int64))
        if dtype not in _DTYPES or count < 0 or count * np.dtype(dtype).itemsize > MAX_ARRAY_BYTES:
            raise ValueError(f"array {key} of {dtype} {shape}")
        data = _exactly(connection, count * np.dtype(dtype).itemsize)
        message[key] = np.frombuffer(data, dtype).reshape(shape)
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
