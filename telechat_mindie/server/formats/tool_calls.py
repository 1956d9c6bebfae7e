"""Tool calls in an answer's text, whole or as it grows.

TeleChat2's chat template asks for `<tool_call>`, a JSON object with `name` and `arguments`, `</tool_call>`: the format
of Hermes and Qwen 2.5. MindIE parses it for the models of its own ATB backend (examples/atb_models/atb_llm/models/
qwen2/tool_call_process_qwen2.py) and hands it over as text for the ms backend; here it is parsed.
"""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Iterator
from typing import Any

BEGIN, END = "<tool_call>", "</tool_call>"
_ID_LETTERS = string.ascii_letters + string.digits


def split_calls(text: str) -> tuple[str, list[dict[str, Any]]]:
    """The text of an answer without its tool calls, and those in OpenAI's form."""
    parser = ToolCallParser()
    content, calls = [], []
    for piece in (*parser.put(text), *parser.flush()):
        if isinstance(piece, str):
            content.append(piece)
        else:
            calls.append({key: value for key, value in piece.items() if key != "index"})
    # What stands around calls is nothing but the template's line ends.
    return ("".join(content).strip() if calls else "".join(content)), calls


class ToolCallParser:
    """Takes an answer's text in pieces of any size; gives content at once, and each call when it is complete.

    What looks like a call and is none (no JSON, no name) is content. A call that the answer's end leaves without its
    closing tag counts, if its JSON is complete.
    """

    def __init__(self) -> None:
        self._held = ""  # text that may be the beginning of a tag, or is inside of one
        self._is_inside = False
        self._count = 0

    @property
    def found(self) -> bool:
        """Whether there was a call."""
        return self._count > 0

    def put(self, text: str) -> Iterator[str | dict[str, Any]]:
        """Content, and calls: {index, id, type, function: {name, arguments as JSON text}}."""
        self._held += text
        while True:
            tag = END if self._is_inside else BEGIN
            place = self._held.find(tag)
            if place < 0:
                break
            before, self._held = self._held[:place], self._held[place + len(tag) :]
            if self._is_inside:
                yield self._call(before) or f"{BEGIN}{before}{END}"
            elif before:
                yield before
            self._is_inside = not self._is_inside
        if not self._is_inside:
            kept = _overlap(self._held, BEGIN)
            ready, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
            if ready:
                yield ready

    def flush(self) -> Iterator[str | dict[str, Any]]:
        """What is left at the answer's end."""
        held, self._held = self._held, ""
        if self._is_inside:
            yield self._call(held) or BEGIN + held
        elif held:
            yield held

    def _call(self, text: str) -> dict[str, Any] | None:
        try:
            data = json.loads(text)
            name, arguments = data["name"], data["arguments"]
        except (ValueError, TypeError, KeyError, RecursionError):
            return None
        if not isinstance(name, str):
            return None
        self._count += 1
        return {
            "index": self._count - 1,
            "id": "call_" + "".join(secrets.choice(_ID_LETTERS) for _ in range(8)),
            "type": "function",
            "function": {
                "name": name,
                "arguments": arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False),
            },
        }


def _overlap(text: str, tag: str) -> int:
    """Length of the longest end of `text` with which `tag` begins."""
    return next((size for size in range(min(len(text), len(tag) - 1), 0, -1) if tag.startswith(text[-size:])), 0)
