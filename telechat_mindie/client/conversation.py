"""A conversation: what was said, and the file that keeps it."""

from __future__ import annotations

import json
from pathlib import Path

from telechat_mindie.client.dialects import Message
from telechat_mindie.errors import ConfigError, InputError
from telechat_mindie.reading import read_json
from telechat_mindie.staging import write_file

MAX_FILE_BYTES = 16 << 20


class Conversation:
    """System text and turns, the user's and the assistant's in alternation, without thoughts.

    Attributes:
        system: None for the chat template's own.
        turns: one question and one answer after the other.
    """

    def __init__(self, system: str | None = None) -> None:
        self.system = system
        self.turns: list[Message] = []
        self._file: Path | None = None  # where it was saved or loaded last, and may be saved again

    @property
    def messages(self) -> list[Message]:
        """The system text and the turns."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *self.turns]

    def add(self, question: str, answer: str) -> None:
        self.turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    def drop_last(self) -> None:
        """Take the last question and its answer away."""
        del self.turns[-2:]

    def save(self, path: Path) -> None:
        """Write `{"messages": [...]}` in one line, as `preprocess` and `bench serve --prompts` read it.

        Raises:
            InputError: another file has that name.
            OutputError: it cannot be written.
        """
        if path.exists() and path != self._file:
            raise InputError("exists", where=path, advice="Choose another name.")
        write_file(path, (json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n").encode())
        self._file = path

    def load(self, path: Path) -> None:
        """Go on with a conversation that was saved; the one before is forgotten.

        Raises:
            ConfigError: the file cannot be read, or holds something else. Nothing has changed then.
        """
        messages = read_json(path, MAX_FILE_BYTES).get("messages")
        expected = '{"messages": [...]} with roles system, then user and assistant by turns'
        if not isinstance(messages, list) or not all(map(_is_message, messages)):
            raise ConfigError("is no conversation", where=path, expected=expected)
        system = messages[0]["content"] if messages and messages[0]["role"] == "system" else None
        turns = messages if system is None else messages[1:]
        roles = [message["role"] for message in turns]
        if roles != ["user", "assistant"] * (len(turns) // 2):
            raise ConfigError("is no conversation", where=path, expected=expected, found=", ".join(roles[:6]))
        self.system, self.turns, self._file = system, turns, path


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)
