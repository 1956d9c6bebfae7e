"""Server-sent events, from the bytes of a response to the data of each event."""

from __future__ import annotations

import re

from telechat_mindie.client.errors import ServiceError

MAX_EVENT_BYTES = 4 << 20
"""A last event may repeat the whole answer (`fullTextEnabled` in MindIE, `generated_text` in TGI), and no more."""

_LINE_END = re.compile(rb"\r\n|\n|\r(?!\Z)")  # a CR at the very end may be the first half of a CR LF


class SseDecoder:
    """Splits a byte stream into events, wherever the network cut it.

    Only the `data` field is kept, by the rules of the HTML standard's "Interpreting an event stream": a line ends in
    LF, CR or CR LF and nothing else (a U+2028 inside JSON does not end it), several data lines of an event are joined
    by LF, and an event that no blank line ends is dropped.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, data: bytes) -> list[str]:
        """The data of the events that `data` completes.

        Raises:
            ServiceError: an event grows beyond `MAX_EVENT_BYTES`.
        """
        *lines, self._rest = _LINE_END.split(self._rest + data)
        events = []
        for line in lines:
            if line.startswith(b"data:"):
                self._data.append(line.removeprefix(b"data:").removeprefix(b" "))
            elif not line and self._data:
                events.append(b"\n".join(self._data).decode("utf-8", "replace"))
                self._data.clear()
        if len(self._rest) + sum(map(len, self._data)) > MAX_EVENT_BYTES:
            raise ServiceError("sent an event without an end", kind="bad event", expected=f"{MAX_EVENT_BYTES} bytes")
        return events
