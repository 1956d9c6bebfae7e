"""A worker process: one rank's ModelRunner, called over a socket that it inherits.

python -m telechat_mindie.backend.worker FD '{"model_path": ..., "rank_id": 1, ...}' LOG_LEVEL
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
from typing import Any

import numpy as np

from telechat_mindie.backend.wire import receive, send
from telechat_mindie.errors import TelechatMindieError

MAX_ERROR_CHARACTERS = 2000


def serve(connection: socket.socket, arguments: dict[str, Any]) -> None:
    """Make the runner, report its sizes, then answer calls until the other side goes away.

    Rank 0 answers a forward with the logits, the others without: they are the same on every rank.
    """
    from telechat_mindie.backend.model_runner import ModelRunner

    try:
        runner = ModelRunner(**arguments)
    except Exception as error:
        send(connection, _failure(error))
        return
    send(connection, {"npu_num_blocks": runner.npu_num_blocks, "cpu_num_blocks": runner.cpu_num_blocks})
    while True:
        try:
            message = receive(connection)
        except EOFError:
            return
        method = message.pop("method")
        try:
            if method == "forward":
                logits = runner.forward(**message)
                send(connection, {"logits": logits.asnumpy() if arguments["rank_id"] == 0 else np.empty(0, np.float32)})
            else:
                runner.swap(message["block_tables"], message["swap_type"])
                send(connection, {})
        except Exception as error:
            send(connection, _failure(error))


def _failure(error: Exception) -> dict[str, Any]:
    kind = type(error).__name__ if isinstance(error, TelechatMindieError) else ""
    return {"error": str(error)[:MAX_ERROR_CHARACTERS] or type(error).__name__, "kind": kind}


if __name__ == "__main__":
    os.environ.setdefault("GLOG_v", "3")  # MindSpore's cluster warns on every retry
    logging.basicConfig(format="%(message)s")
    logging.getLogger("telechat_mindie").setLevel(int(sys.argv[3]))
    serve(socket.socket(fileno=int(sys.argv[1])), json.loads(sys.argv[2]))
