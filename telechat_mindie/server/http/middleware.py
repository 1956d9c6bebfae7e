"""What stands before all routes: who may ask, and what a failure looks like."""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from telechat_mindie.server.http.errors import ApiError, error_response

_log = logging.getLogger(__name__)

ANY_ORIGIN = "*"


class BrowserGuard:
    """Keeps other web pages of a user's browser from using a server on the user's machine.

    A page may send a simple POST, or a GET such as /stopService, to any address without asking. Browsers say where a
    request comes from; other clients say nothing and are not concerned. Where the server listens on a loopback address
    only, a browser must also name that address or localhost, lest a foreign name be made to point there.

    Args:
        app: what it guards.
        is_local: the server listens on a loopback address only.
        allowed_origins: of other pages that may use it; `*` for all.
    """

    def __init__(self, app: ASGIApp, is_local: bool, allowed_origins: Collection[str] = ()) -> None:
        self._app = app
        self._is_local = is_local
        self._allowed_origins = allowed_origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._is_foreign(Headers(scope=scope)):
            refusal = ApiError(403, "A page of another site may not use this server: serve --allow-origin lets it.")
            await error_response(refusal)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _is_foreign(self, headers: Headers) -> bool:
        site, origin = headers.get("sec-fetch-site"), headers.get("origin")
        if site is None and origin is None:
            return False
        host = headers.get("host", "")
        if self._is_local and not _is_loopback(host):
            return True
        if origin is not None and not {origin, ANY_ORIGIN}.isdisjoint(self._allowed_origins):
            return False
        return site in ("cross-site", "same-site") or (origin is not None and origin.partition("://")[2] != host)


def _is_loopback(host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:  # an open bracket
        return False
    return name == "localhost" or is_loopback(name)


def is_loopback(address: str) -> bool:
    """Whether an address in digits is one of this machine alone."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


async def on_api_error(_: Request, error: Exception) -> Response:
    return error_response(error if isinstance(error, ApiError) else ApiError(500, "Internal error."))


async def on_fault(request: Request, error: Exception) -> Response:
    """A mistake of ours: the traceback is for the log, never for the client."""
    _log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return error_response(ApiError(500, "Internal error."))


async def on_unknown(request: Request, _: Exception) -> Response:
    """Also for a known path with another method, for which MindIE's HTTP library says the same."""
    return error_response(ApiError(404, f"There is no {request.method} {request.url.path} here."))
