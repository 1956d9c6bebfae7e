"""A real server in a process of its own, on a free port, for as long as a test wants it."""

from __future__ import annotations

import argparse
import atexit
import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx

from helpers import ROOT

START_SECONDS = 60


@functools.lru_cache(maxsize=1)
def nano_directory() -> Path:
    """telechat2-nano, built once for all tests."""
    from telechat_mindie.model_dir.build import build
    from telechat_mindie.nano import write_checkpoint

    folder = tempfile.TemporaryDirectory(prefix="telechat-server-")
    atexit.register(folder.cleanup)
    write_checkpoint(Path(folder.name, "checkpoint"))
    build(Path(folder.name, "nano"), Path(folder.name, "checkpoint"))
    return Path(folder.name, "nano")


class Server:
    """A server process that is ready; it ends with a `with`.

    Attributes:
        url: of the business plane.
        lines: what it printed.
    """

    def __init__(self, command: list[str], environment: dict[str, str] | None = None) -> None:
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": path, **(environment or {})},
        )
        atexit.register(self.kill)
        self.lines: list[str] = []
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if not self._ready.wait(START_SECONDS) or not self.url:
            self.kill()
            raise RuntimeError(f"the server did not start: {self.output}")

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    @property
    def url(self) -> str:
        line = next((line for line in self.lines if "Daemon start success!" in line), "")
        return line.partition(" at ")[2].split(",")[0]

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=30, trust_env=False, **options)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self._request("POST", path, content=content, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self._request("GET", path, **options)

    def _request(self, method: str, path: str, **options: Any) -> httpx.Response:
        with self.client() as client:
            try:
                return client.request(method, path, **options)
            except httpx.ConnectError as error:
                raise RuntimeError(f"no server any more: exit code {self.process.poll()}: {self.output}") from error

    def resources(self) -> dict[str, int]:
        return self.get("/v1/status").json()["resource"]

    def wait_until_idle(self, seconds: float = 10) -> dict[str, int]:
        """Until every block is free; the resources then, or at the end of the time."""
        give_up = time.monotonic() + seconds
        while True:
            found = self.resources()
            idle = found["freeNpuBlockNums"] == found["totalNpuBlockNums"] and not found["waitingRequestNum"]
            if idle or time.monotonic() > give_up:
                return found
            time.sleep(0.02)

    def stop(self, number: int = signal.SIGTERM, seconds: float = 30) -> int:
        """Send a signal and wait; the exit code."""
        self.process.send_signal(number)
        return self.wait(seconds)

    def wait(self, seconds: float = 30) -> int:
        code = self.process.wait(seconds)
        self._reader.join(5)
        return code

    def kill(self) -> None:
        atexit.unregister(self.kill)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if "Daemon start success!" in line:
                self._ready.set()
        self._ready.set()


@functools.lru_cache(maxsize=1)
def shared_server() -> Server:
    """`telechat-mindie serve` on nano with its own settings, for all tests that leave it as it was."""
    return Server([sys.executable, "-m", "telechat_mindie", "serve", str(nano_directory()), "--port", "0"])


def special_server(*, delay: float = 0.0, blocks: int = 400, **changes: dict[str, Any]) -> Server:
    """A server over a model without weights, with settings of its own.

    Args:
        delay: seconds of each forward.
        blocks: of its cache.
        changes: fields of `ServerSettings`; for `limits` and `engine`, fields of those.
    """
    arguments = [str(nano_directory()), "--delay", str(delay), "--blocks", str(blocks)]
    return Server([sys.executable, "-m", "helpers.server", *arguments, "--changes", json.dumps(changes)])


def _serve_null_model() -> None:
    from helpers.null_model import NullRunner
    from telechat_mindie.engine.engine import Engine
    from telechat_mindie.model_dir.layout import ModelDir
    from telechat_mindie.server.app import Plane
    from telechat_mindie.server.host import EngineHost
    from telechat_mindie.server.run import serve
    from telechat_mindie.server.settings import Address, plain_settings
    from telechat_mindie.text.tokenizer import TelechatTokenizer

    parser = argparse.ArgumentParser()
    parser.add_argument("model_path", type=Path)
    parser.add_argument("--delay", type=float)
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--changes", type=json.loads)
    arguments = parser.parse_args()
    directory = ModelDir.open(arguments.model_path)
    here = Address("127.0.0.1", 0)
    settings = dataclasses.replace(
        plain_settings(directory), model_name="null", business=here, management=here, metrics=here
    )
    changes = dict(arguments.changes)
    for part in ("limits", "engine"):
        changes[part] = dataclasses.replace(getattr(settings, part), **changes.get(part, {}))
    settings = dataclasses.replace(settings, **changes)

    def open_host() -> EngineHost:
        tokenizer = TelechatTokenizer.from_pretrained(arguments.model_path)
        runner = NullRunner(
            arguments.blocks, block_size=settings.engine.block_size, vocab_size=directory.config.vocab_size
        )
        runner.before_forward = lambda _: time.sleep(arguments.delay)
        return EngineHost(directory, tokenizer, Engine(runner, tokenizer, settings.engine))

    def on_ready(urls: dict[Plane, str]) -> None:
        print(f"Daemon start success! null at {urls[Plane.BUSINESS]}", flush=True)

    serve(open_host, settings, on_ready)


if __name__ == "__main__":
    _serve_null_model()
