"""Every bound of the server that is not a bound of the engine."""

from __future__ import annotations

from dataclasses import dataclass

MAX_JSON_DEPTH = 11
"""Objects and lists within each other. MindIE drops, silently, what is nested deeper (src/utils/safe_io.cpp:20-52)."""

MAX_STOP_STRINGS = 1024
MAX_STOP_LENGTH = 1024  # UTF-16 units, as all of MindIE's lengths of texts
MAX_STOP_TOTAL = 32 * 1024
MAX_STOP_TOKENS = 1024  # distinct ones; ours: each is compared with each token
MAX_SEQUENCES = 128  # best_of and n
MAX_TOP_LOGPROBS = 20
MAX_PROMPT_TOKENS = 1024 * 1024
MAX_TIMEOUT = 65535  # seconds


@dataclass(frozen=True, slots=True)
class Limits:
    """How much of everything a client may take.

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
