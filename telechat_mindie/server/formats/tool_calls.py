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

from telechat_mindie.text.overlap import overlap

TAGS = BEGIN, END = "<tool_call>", "</tool_call>"
_ID_LETTERS = string.ascii_letters + string.digits


class ToolCallParser:
    """Takes an answer's text in pieces of any size; gives content at once, and each call when it is complete.

    What looks like a call and is none (no JSON, no name) is content. A call that the answer's end leaves without its
    closing tag counts, if its JSON is complete. White space waits for text behind it: around calls it is nothing but
    the template's line ends, which are no content.
    """

    def __init__(self) -> None:
        self._held = ""  # text that may be the beginning of a tag, or is inside of one
        self._is_inside = False
        self._count = 0
        self._space = ""  # white space at the content's end
        self._has_content = False

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
                yield from self._called(before, END)
            else:
                yield from self._content(before)
            self._is_inside = not self._is_inside
        if not self._is_inside:
            kept = len(self._held) - overlap(self._held, BEGIN)
            ready, self._held = self._held[:kept], self._held[kept:]
            yield from self._content(ready)

    def flush(self) -> Iterator[str | dict[str, Any]]:
        """What is left at the answer's end."""
        held, self._held = self._held, ""
        if self._is_inside:
            yield from self._called(held, "")
        else:
            yield from self._content(held)
        if self._space and not self.found:
            yield self._space

    def _content(self, text: str) -> Iterator[str]:
        text = self._space + text
        shown = text.rstrip()
        self._space = text[len(shown) :]
        if self.found and not self._has_content:
            shown = shown.lstrip()
        if shown:
            self._has_content = True
            yield shown

    def _called(self, text: str, end: str) -> Iterator[str | dict[str, Any]]:
        call = self._call(text)
        if call is None:
            yield from self._content(BEGIN + text + end)
        else:
            yield call

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
