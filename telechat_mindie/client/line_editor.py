"""Lines from a terminal: edited, remembered from one start to the next, completed with Tab.

GNU readline from 8.1 on takes a pasted text as one line, whatever line ends it has (bracketed paste). Where Python was
built with libedit or without either, a pasted text is a line after the other, and the rest works as far as it goes.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType

REMEMBERED = 1000  # messages
_LONGEST = 100_000  # characters of one that is remembered

Complete = Callable[[str, str], Iterable[str]]
"""(the line before the word, the beginning of the word) -> words"""


class LineEditor:
    """Reads lines from stdin, which is a terminal.

    Args:
        complete: what Tab offers.
        history: file of messages, a JSON text a line, for this user alone; None for no memory beyond this process.
    """

    def __init__(self, complete: Complete, history: Path | None) -> None:
        self._complete = complete
        self._history = history
        self._words: list[str] = []
        self._readline = _readline()
        if self._readline is None:
            return
        is_libedit = "libedit" in (self._readline.__doc__ or "")
        self._readline.parse_and_bind("bind ^I rl_complete" if is_libedit else "tab: complete")
        if not is_libedit:
            self._readline.parse_and_bind("set enable-bracketed-paste on")
        self._readline.set_completer_delims(" \t\n")
        self._readline.set_completer(self._completion)
        self._readline.set_auto_history(False)  # a message is remembered whole, not line by line
        for message in self._load():
            self._readline.add_history(message)

    def read(self, prompt: str) -> str:
        """The next line; a pasted text may hold several.

        Raises:
            EOFError, KeyboardInterrupt: as the user's key says.
        """
        return input(prompt)

    def remember(self, message: str) -> None:
        """Put a message into the history. A file that cannot be written is left alone: the chat goes on."""
        if self._readline is None or not message or len(message) > _LONGEST:
            return
        self._readline.add_history(message)
        if self._history is None:
            return
        with contextlib.suppress(OSError):
            self._history.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(self._history, flags, 0o600)
            try:
                os.fchmod(descriptor, 0o600)
                os.write(descriptor, (json.dumps(message, ensure_ascii=False) + "\n").encode("utf-8", "replace"))
            finally:
                os.close(descriptor)

    def _load(self) -> list[str]:
        """The last messages of the file, which is cut where it has grown long; lines that are no text are left out."""
        if self._history is None:
            return []
        messages = []
        try:
            lines = self._history.read_text(encoding="utf-8", errors="replace").splitlines()
            if len(lines) > 2 * REMEMBERED:
                lines = lines[-REMEMBERED:]
                shorter = self._history.with_name(f".{self._history.name}.{os.getpid()}.tmp")
                shorter.touch(0o600)
                shorter.write_text("\n".join(lines) + "\n", encoding="utf-8")
                shorter.replace(self._history)
        except OSError:
            return []
        for line in lines[-REMEMBERED:]:
            with contextlib.suppress(ValueError):
                if isinstance(message := json.loads(line), str):
                    messages.append(message)
        return messages

    def _completion(self, word: str, number: int) -> str | None:
        """readline's: called with 0, 1, 2, ... until there is no more."""
        if number == 0:
            assert self._readline is not None
            before = self._readline.get_line_buffer()[: self._readline.get_begidx()]
            self._words = sorted(self._complete(before, word))
        return self._words[number] if number < len(self._words) else None


def _readline() -> ModuleType | None:
    try:
        import readline
    except ImportError:
        return None
    return readline
