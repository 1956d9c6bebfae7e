"""uvicorn's HTTP/1.1 connection with bounds on how slow a client may be."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

from telechat_mindie.server.http.limits import Limits


def bounded_protocol(limits: Limits) -> type[H11Protocol]:
    """A protocol class for `uvicorn.Config(http=...)`.

    uvicorn itself waits for ever for the first request of a connection, for the rest of a request's headers, and for a
    client to read its answer; bodies are bounded by `telechat_mindie.server.http.body`.
    """

    class BoundedProtocol(H11Protocol):
        _timer: asyncio.TimerHandle | None = None  # until the headers are complete
        _write_timer: asyncio.TimerHandle | None = None  # until the client reads on

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._watch_headers()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch_headers()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._watch_headers()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._write_timer = self.loop.call_later(limits.write_seconds, self.transport.abort)

        def resume_writing(self) -> None:
            self._write_timer = _cancelled(self._write_timer)
            super().resume_writing()

        def connection_lost(self, exc: Exception | None) -> None:
            self._timer, self._write_timer = _cancelled(self._timer), _cancelled(self._write_timer)
            super().connection_lost(exc)

        def _watch_headers(self) -> None:
            is_answering = self.cycle is not None and not self.cycle.response_complete
            if is_answering or self.transport.is_closing():
                self._timer = _cancelled(self._timer)
            elif self._timer is None:
                self._timer = self.loop.call_later(limits.header_seconds, self.transport.abort)

    return BoundedProtocol


def _cancelled(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """Cancel a timer; gives what is left of it."""
    if timer is not None:
        timer.cancel()
    return None
