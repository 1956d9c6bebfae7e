"""What MindIE's HTTP library (cpp-httplib) and the handlers before its routes do with every request."""

from __future__ import annotations

import uuid

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from telechat_mindie.server.http.errors import ApiError, error_response

COMPRESSED = ("gzip", "deflate", "br", "zstd")
"""Encodings of a body that MindIE's build of the library cannot undo."""

NO_HEAD = ("/stopService",)
"""GET routes that do something. The library serves HEAD there as well; but who only looks must change nothing."""


class LibraryRules:
    """Names each answer, takes HEAD where it takes GET, and refuses compressed bodies.

    Args:
        app: the routes.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # http_wrapper/http_server.cpp:126, utils/random_generator.h:44: 32 hexadecimal digits
        name = (b"RequestUUID", uuid.uuid4().hex.encode())

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], name]}
            await send(message)

        encoding = Headers(scope=scope).get("content-encoding", "").lower()
        if scope["method"] == "POST" and any(one in encoding for one in COMPRESSED):
            refusal = ApiError(415, f"Bodies with the Content-Encoding {encoding} are not read. Send it as it is.")
            await error_response(refusal)(scope, receive, send_named)
            return
        if scope["method"] == "HEAD" and scope["path"] not in NO_HEAD:
            scope = {**scope, "method": "GET"}  # a copy: by its own, the server leaves out the body
        await self._app(scope, receive, send_named)
