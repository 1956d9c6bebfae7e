"""How much of everything a client may take; what a request may ask for is in `server/fields.py`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """The bounds of a server that are not bounds of its engine.

    Args:
        body_bytes: of one request (maxRequestLength).
        header_bytes: of one request's line and headers together.
        requests: that are served or wait at once; further ones are refused. MindIE serves maxLinkNum and lets twice as
            many wait (http_wrapper/http_server.cpp:361).
        header_seconds: until a request's headers are complete.
        body_seconds: until its body is.
        write_seconds: that a client may leave an answer unread.
        token_seconds: until the next token (tokenTimeout).
        request_seconds: for the whole request (e2eTimeout).
        drain_seconds: that unfinished answers get when the server is told to stop.
    """

    body_bytes: int = 40 << 20
    header_bytes: int = 64 << 10
    requests: int = 3000
    header_seconds: float = 60
    body_seconds: float = 60
    write_seconds: float = 600
    token_seconds: float = 600
    request_seconds: float = 600
    drain_seconds: float = 30

    @property
    def bodies_bytes(self) -> int:
        """Of all bodies that are being received together."""
        return 8 * self.body_bytes

    @property
    def connections(self) -> int:
        """Open ones of one port: those of requests, and some for health checks beside them."""
        return self.requests + 100
