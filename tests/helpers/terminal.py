"""A command with a terminal of its own, so that keys do what they do there."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import subprocess
import tempfile
import termios
import time
from collections.abc import Sequence

PASTE_BEGIN, PASTE_END = "\x1b[200~", "\x1b[201~"
"""What a terminal puts around a pasted text (xterm's bracketed paste mode)."""


class Terminal:
    """Runs a command; it is killed at the end of a `with`.

    Args:
        command: what to run.
        kind: TERM. `dumb` shows no escape sequences of an editor.
        state: XDG_STATE_HOME; None for a folder that nobody else uses.

    Attributes:
        seen: what came after the last text that was waited for.
    """

    def __init__(self, command: Sequence[str], kind: str = "dumb", state: str | os.PathLike[str] | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="telechat-terminal-")
        self._master, slave = pty.openpty()
        self._process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            env={**os.environ, "TERM": kind, "XDG_STATE_HOME": str(state or self._folder.name)},
        )
        os.close(slave)
        self.seen = ""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._master)
        self._folder.cleanup()

    def wait_for(self, text: str, seconds: float = 60) -> str:
        """All that was printed since the last wait, up to `text`."""
        raw, end = b"", time.monotonic() + seconds
        while text not in (shown := self.seen + raw.decode(errors="replace")):
            ready, _, _ = select.select([self._master], [], [], max(0, end - time.monotonic()))
            if not ready:
                raise AssertionError(f"no {text!r} in {shown!r}")
            raw += os.read(self._master, 4096)
        before, _, self.seen = shown.partition(text)
        return before + text

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def paste(self, text: str) -> None:
        """As a terminal sends what is pasted: line ends as the Enter key."""
        self.type(PASTE_BEGIN + text.replace("\n", "\r") + PASTE_END)

    def returncode(self) -> int:
        return self._process.wait(timeout=30)
