"""The client itself: asynchronous, one pool of connections, every wait bounded."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from telechat_mindie.client.dialects import Delta, Dialect, Prompt, Sampling, error_text
from telechat_mindie.client.errors import ServiceError
from telechat_mindie.client.sse import SseDecoder
from telechat_mindie.errors import InputError
from telechat_mindie.installing import MissingExtraError

try:
    import aiohttp
except ImportError:
    # A third of httpx's processor time per event, and a twelfth with 256 streams: a load test must not be the load.
    raise MissingExtraError("aiohttp", "serve") from None

CONNECT_TIMEOUT = 10.0  # seconds
MAX_BODY_BYTES = 1 << 20  # of an answer that is no stream


class MindieClient:
    """Speaks to one service; use it as an asynchronous context manager. It follows no redirect and asks no proxy.

    Args:
        url: `http[s]://HOST:PORT`; an ending `/v1`, as OpenAI's clients want it, is the same address.
        tls: for https; None for the machine's own list of authorities.
        timeout: seconds that a request may take from its first byte to its last; None for any number.
        idle_timeout: seconds without a byte after which it is given up.

    Raises:
        InputError: not such a URL.
    """

    def __init__(
        self,
        url: str,
        tls: ssl.SSLContext | None = None,
        *,
        timeout: float | None = None,
        idle_timeout: float | None = None,
    ) -> None:
        self.url = _base_url(url)
        self._tls = tls
        self._timeout = aiohttp.ClientTimeout(total=timeout, sock_connect=CONNECT_TIMEOUT, sock_read=idle_timeout)

    async def __aenter__(self) -> MindieClient:
        # No limit of connections here: how many requests run at once is the caller's to say.
        connector = aiohttp.TCPConnector(limit=0, ssl=self._tls or True)
        self._session = aiohttp.ClientSession(
            connector=connector,
            timeout=self._timeout,
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"Accept-Encoding": "identity", "User-Agent": "telechat-mindie"},
            trust_env=False,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def first_model(self) -> str:
        """The model to ask for where the user names none (GET /v1/models).

        Raises:
            ServiceError: the service names none either.
        """
        data = await self._exchange("GET", "/v1/models")
        try:
            models = [str(model["id"]) for model in data["data"]]
        except (KeyError, TypeError):
            raise ServiceError("is no list of models", kind="bad answer", where=f"{self.url}/v1/models") from None
        if not models:
            raise ServiceError("names no model", kind="bad answer", where=self.url, advice="Name it with --model.")
        return models[0]

    async def count_tokens(self, text: str) -> int:
        """How many tokens the service makes of a text (POST /v1/tokenizer, MindIE's own).

        Raises:
            ServiceError: no such answer.
        """
        data = await self._exchange("POST", "/v1/tokenizer", {"inputs": text, "do_decode": False})
        count = data.get("token_number") if isinstance(data, dict) else None
        if not isinstance(count, int):
            raise ServiceError("is no number of tokens", kind="bad answer", where=f"{self.url}/v1/tokenizer")
        return count

    async def stream(self, dialect: Dialect, prompt: Prompt, sampling: Sampling) -> AsyncGenerator[Delta, None]:
        """The events of one answer as they arrive. Closing the iterator closes the connection, which ends the answer.

        Raises:
            InputError: the dialect cannot say this.
            ServiceError: no connection, another status than 200, a time-out, or a stream without an end.
        """
        body = dialect.body(prompt, sampling)
        where = self.url + dialect.path
        decoder = SseDecoder()
        complete = False
        async with self._request("POST", dialect.path, body) as response:
            async for data in response.content.iter_any():
                for event in decoder.feed(data):
                    delta = dialect.delta(event)
                    complete = complete or delta is None or delta.finish_reason is not None
                    if delta is not None:
                        yield delta
        if not complete:
            raise ServiceError("ended before the answer did", kind="broken off", where=where)

    async def _exchange(self, method: str, path: str, body: object = None) -> Any:
        async with self._request(method, path, body) as response:
            raw = await _bounded(response)
        try:
            return json.loads(raw)
        except (ValueError, RecursionError):
            raise ServiceError("is no JSON", kind="bad answer", where=self.url + path) from None

    @contextlib.asynccontextmanager
    async def _request(self, method: str, path: str, body: object = None) -> AsyncIterator[aiohttp.ClientResponse]:
        where = self.url + path
        with _named_faults(where):
            async with self._session.request(method, where, json=body, allow_redirects=False) as response:
                if response.status != 200:
                    raise await _refusal(response, where)
                yield response


def client_tls(ca_cert: Path | None, cert: Path | None, key: Path | None) -> ssl.SSLContext | None:
    """The client's side of MindIE's HTTPS, which asks for a certificate of the client as well.

    Args:
        ca_cert: the authority that signed the service's certificate; None for those the machine trusts.
        cert: the client's own certificate.
        key: its private key; None where it is in the same file.

    Raises:
        InputError: a file that cannot be read or is no such thing, or a key without a certificate.
    """
    if cert is None and key is not None:
        raise InputError("needs a certificate", where="--client-key", advice="Name it with --client-cert.")
    if ca_cert is None and cert is None:
        return None
    try:
        context = ssl.create_default_context(cafile=ca_cert)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be used: {error}", where=ca_cert, expected="PEM certificates") from None
    if cert is not None:
        try:
            context.load_cert_chain(cert, key)
        except (OSError, ValueError) as error:
            raise InputError(f"cannot be used: {error}", where=cert, expected="a PEM certificate and its key") from None
    return context


def _base_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise InputError(f"is no address: {error}", where=url) from None
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        advice = None if "://" in url else f"Write http://{url}"
        expected = "http://HOST:PORT or https://HOST:PORT"
        raise InputError("is no address of a service", where=url, expected=expected, advice=advice)
    return url.rstrip("/").removesuffix("/v1")


@contextlib.contextmanager
def _named_faults(where: str) -> Iterator[None]:
    """Turn aiohttp's exceptions into sentences."""
    try:
        yield
    except (aiohttp.ClientError, OSError, asyncio.TimeoutError) as error:
        what, kind, advice = _fault(error)
        if where.startswith("https:") and kind == "broken off":
            advice = "MindIE asks for a certificate that is meant for clients: --client-cert and --client-key."
        raise ServiceError(what, kind=kind, where=where, advice=advice) from None


def _fault(error: Exception) -> tuple[str, str, str | None]:
    """(what, kind, advice)"""
    if isinstance(error, asyncio.TimeoutError):
        return "took too long", "time-out", "Raise --timeout."
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        what = f"shows a certificate that is not trusted: {error.certificate_error}"
        return what, "no connection", "Name the authority that signed it with --ca-cert."
    if isinstance(error, aiohttp.ClientConnectorError):
        what = f"cannot be reached: {error.strerror or error}"
        return what, "no connection", "Check the address, and that the service runs."
    return f"broke the connection off: {error or type(error).__name__}", "broken off", None


async def _refusal(response: aiohttp.ClientResponse, where: str) -> ServiceError:
    raw = await _bounded(response)
    try:
        text = error_text(json.loads(raw))
    except (ValueError, RecursionError):
        text = None
    text = (text or raw[:300].decode("utf-8", "replace")).strip()
    return ServiceError(
        f"answered HTTP {response.status}{f': {text}' if text else ''}",
        kind=f"HTTP {response.status}",
        where=where,
        status=response.status,
    )


async def _bounded(response: aiohttp.ClientResponse) -> bytes:
    raw = bytearray()
    async for data in response.content.iter_any():
        raw += data
        if len(raw) > MAX_BODY_BYTES:
            raise ServiceError("sent too long an answer", kind="bad answer", expected=f"{MAX_BODY_BYTES} bytes")
    return bytes(raw)
