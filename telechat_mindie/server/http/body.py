"""From the bytes of a request to a JSON object, within bounds of size, time and depth."""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any

from starlette.requests import Request

from telechat_mindie.reading import depth
from telechat_mindie.server.http.errors import ApiError, invalid
from telechat_mindie.server.http.limits import Limits

MAX_JSON_DEPTH = 11
"""Objects and lists within each other. What is nested deeper is dropped, as in MindIE (src/utils/safe_io.cpp:20-52)."""


class BodyReader:
    """Receives bodies, and keeps all that are under way together in bounds."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._received = 0  # bytes of all bodies that are being received or parsed

    async def read(self, request: Request) -> bytes:
        """The whole body.

        Raises:
            ApiError: 413 too long, 408 too slow, 503 too many at once.
            ClientDisconnect: the client left.
        """
        declared = request.headers.get("content-length", "")
        if declared.isdigit() and (len(declared) > 18 or int(declared) > self._limits.body_bytes):
            raise self._too_long()
        parts: list[bytes] = []
        try:
            await asyncio.wait_for(self._receive(request, parts), self._limits.body_seconds)
        except (asyncio.TimeoutError, TimeoutError):
            raise ApiError(408, f"The body was not complete after {self._limits.body_seconds:g} seconds.") from None
        finally:
            self._received -= sum(map(len, parts))
        return b"".join(parts)

    async def _receive(self, request: Request, parts: list[bytes]) -> None:
        length = 0
        async for part in request.stream():
            parts.append(part)
            length += len(part)
            self._received += len(part)
            if length > self._limits.body_bytes:
                raise self._too_long()
            if self._received > self._limits.bodies_bytes:
                raise ApiError(503, "Too many long requests arrive at once. Try again later.")

    def _too_long(self) -> ApiError:
        return ApiError(413, f"The body is too long: at most {self._limits.body_bytes} bytes are allowed.")


def parse(raw: bytes) -> dict[str, Any]:
    """The JSON object of a body, whatever its Content-Type says.

    Raises:
        ApiError: 422 for what is not UTF-8, not JSON, not an object, or nested more deeply than Python can read.
    """
    try:
        text = raw.decode("utf-8").removeprefix("\ufeff")  # a byte order mark, which MindIE's parser skips too
        data = json.loads(text, parse_constant=_finite, parse_float=_finite)
    except ValueError:
        raise invalid("The body is not valid JSON in UTF-8.") from None
    except RecursionError:
        raise invalid("The body is nested too deeply.") from None
    if not isinstance(data, dict):
        raise invalid("The body is not a JSON object.")
    if depth(data) > MAX_JSON_DEPTH:
        data = dict(_shallow(data, MAX_JSON_DEPTH))
    if "\\u" in text:
        try:
            json.dumps(data, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise invalid("The body holds half of a surrogate pair, which is no character.") from None
    return data


def _shallow(value: Any, levels: int) -> Any:
    """The value without objects and lists that are nested in more than `levels`."""

    def is_kept(item: object) -> bool:
        return levels > 1 or not isinstance(item, (dict, list))

    if isinstance(value, dict):
        return {key: _shallow(item, levels - 1) for key, item in value.items() if is_kept(item)}
    if isinstance(value, list):
        return [_shallow(item, levels - 1) for item in value if is_kept(item)]
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value
