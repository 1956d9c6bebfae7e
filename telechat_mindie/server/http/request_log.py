"""One line in the log for each request: what was asked for, what came of it, how long it took."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Message, Receive, Scope, Send

_log = logging.getLogger(__name__)

_ENTRY = "telechat_mindie.request_log"  # key of a request's scope, as ASGI lets applications add to it
_LONGEST_PATH = 200
_UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


@dataclass(slots=True)
class Entry:
    """What the routes know of a request; the rest the log sees itself.

    Attributes:
        prompt_tokens, answer_tokens: None where no answer was computed.
        content: the prompt and the answers, asked for only where they are to be logged.
    """

    prompt_tokens: int | None = None
    answer_tokens: Callable[[], int] | None = None
    content: Callable[[], tuple[str, list[str]]] | None = None
    status: int | None = None
    uuid: str = "-"
    is_complete: bool = False
    begin: float = field(default_factory=time.monotonic)


def entry_of(scope: Scope) -> Entry:
    """The entry of a request; one that nobody reads where there is no log."""
    found: Entry = scope.setdefault(_ENTRY, Entry())
    return found


class RequestLog:
    """`POST /v1/chat/completions 200 in=12 out=34 ms=560 id=...`: the id is the answer's RequestUUID.

    A GET that succeeds is only for -v, since whoever watches a server asks for its health every few seconds. Neither
    queries nor bodies are logged, unless `with_content`: then as JSON texts, so that a request remains one line.

    Args:
        app: what it watches.
        with_content: also what was said.
    """

    def __init__(self, app: ASGIApp, with_content: bool) -> None:
        self._app = app
        self._with_content = with_content

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _log.isEnabledFor(logging.INFO):
            await self._app(scope, receive, send)
            return
        entry = entry_of(scope)
        method, path = scope["method"], scope["path"]

        async def watched_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                entry.status = message["status"]
                names = {name.lower(): value for name, value in message["headers"]}
                entry.uuid = names.get(b"requestuuid", b"-").decode("latin-1")
            elif message["type"] == "http.response.body":
                entry.is_complete = not message.get("more_body", False)
            await send(message)

        try:
            await self._app(scope, receive, watched_send)
        finally:
            is_look = method in ("GET", "HEAD") and entry.status is not None and entry.status < 400
            _log.log(logging.DEBUG if is_look else logging.INFO, "%s", self._line(method, path, entry))

    def _line(self, method: str, path: str, entry: Entry) -> str:
        parts = [method, _safe(path)[:_LONGEST_PATH], "-" if entry.status is None else str(entry.status)]
        if entry.prompt_tokens is not None:
            parts.append(f"in={entry.prompt_tokens}")
        if entry.answer_tokens is not None:
            parts.append(f"out={entry.answer_tokens()}")
        parts += [f"ms={1000 * (time.monotonic() - entry.begin):.0f}", f"id={entry.uuid}"]
        if not entry.is_complete:
            parts.append("broken-off")
        if self._with_content and entry.content is not None:
            prompt, answers = entry.content()
            parts += [f"prompt={_quoted(prompt)}", *(f"answer={_quoted(answer)}" for answer in answers)]
        return " ".join(parts)


def _quoted(text: str) -> str:
    return _safe(json.dumps(text, ensure_ascii=False))


def _safe(text: str) -> str:
    """Without what would end the line or be obeyed by a terminal."""
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
