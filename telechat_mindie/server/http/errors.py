"""What a request is refused or ended with: a status, and MindIE's body `{"error": ..., "error_type": ...}`."""

from __future__ import annotations

import json

from starlette.responses import Response

ERROR_TYPES = {
    400: "Bad Request",
    403: "Forbidden",
    404: "NotFoundError",
    408: "Request Timeout",
    413: "Payload Too Large",
    415: "Unsupported Media Type",
    422: "Input Validation Error",
    424: "Generation Error",
    500: "Incomplete Generation",
    503: "Service Unavailable",
}
"""Status -> `error_type`: utils/http_rest_resource.h:33-39, and for 403, 408, 413 and 415, which have none there, the
status's own name."""

STOPPED = "The service has been stopped."


class ApiError(Exception):
    """Ends a request with an error body.

    Args:
        status: one of ERROR_TYPES.
        text: one or two sentences.
    """

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status

    def content(self) -> dict[str, str]:
        return {"error": str(self), "error_type": ERROR_TYPES[self.status]}


def invalid(text: str) -> ApiError:
    """The request itself is at fault."""
    return ApiError(422, text)


def dump(value: object) -> bytes:
    """JSON as MindIE writes it: no spaces, and UTF-8 rather than escapes."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def json_response(value: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(dump(value), status, headers, "application/json")


def error_response(error: ApiError) -> Response:
    return json_response(error.content(), error.status, {"Retry-After": "1"} if error.status == 503 else None)
