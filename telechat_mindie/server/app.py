"""The applications behind the three planes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from enum import Enum

from fastapi import APIRouter, FastAPI, Request, Response
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from telechat_mindie import __version__
from telechat_mindie.server.docs_page import docs_routes
from telechat_mindie.server.formats.routes import format_routes
from telechat_mindie.server.http.errors import ApiError
from telechat_mindie.server.http.library import LibraryRules
from telechat_mindie.server.http.middleware import BrowserGuard, on_api_error, on_fault, on_unknown
from telechat_mindie.server.http.openapi import document
from telechat_mindie.server.http.request_log import RequestLog
from telechat_mindie.server.management import management_routes, metrics_routes
from telechat_mindie.server.models import model_routes
from telechat_mindie.server.page import PAGE_HEADERS, page_files
from telechat_mindie.server.service import Service


class Plane(Enum):
    """What a port is for."""

    BUSINESS = "business"
    MANAGEMENT = "management"
    METRICS = "metrics"


def make_app(service: Service, planes: Iterable[Plane], is_local: bool) -> ASGIApp:
    """The routes of the planes that share a port, which `is_local` to this machine or is not."""
    planes = set(planes)
    app = FastAPI(
        title="telechat-mindie",
        version=__version__,
        description="MindIE's HTTP API over TeleChat2 on a CPU.",
        docs_url=None,  # its page would load scripts from another site; docs_page is ours
        redoc_url=None,
        exception_handlers={ApiError: on_api_error, 404: on_unknown, 405: on_unknown, Exception: on_fault},
        redirect_slashes=False,
    )
    app.openapi = lambda: document(app)  # type: ignore[method-assign]
    app.include_router(docs_routes(app.openapi))
    if Plane.BUSINESS in planes:
        for router in (format_routes(service), model_routes(service), page_routes()):
            app.include_router(router)
    if Plane.MANAGEMENT in planes:
        app.include_router(management_routes(service))
    if Plane.METRICS in planes:
        app.include_router(metrics_routes(service))
    if origins := service.settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            allow_private_network=True,  # else Chrome keeps pages of other networks from a server on this machine
            expose_headers=["RequestUUID", "Retry-After"],
        )
    app.add_middleware(BrowserGuard, is_local=is_local, allowed_origins=origins)
    return RequestLog(LibraryRules(app), service.settings.log_content)


def page_routes() -> APIRouter:
    """GET / and the files of the chat page behind it. MindIE's / is POST only."""
    router = APIRouter()
    for path, (content, kind) in page_files().items():
        router.add_route(path, _file(content, kind), include_in_schema=False)
    return router


def _file(content: bytes, kind: str) -> Callable[[Request], Awaitable[Response]]:
    async def file(_: Request) -> Response:
        return Response(content, media_type=kind, headers=PAGE_HEADERS)

    return file
