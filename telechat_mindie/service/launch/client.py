"""HTTP to a daemon on this host: the first request, and its health. No proxy is ever asked."""

from __future__ import annotations

import contextlib
import http.client
import json
import ssl
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from telechat_mindie.service.certificates import BUSINESS, MANAGEMENT, Plane, place
from telechat_mindie.service.launch.errors import LaunchError

MAX_ANSWER_BYTES = 1 << 20

Listener = Literal["business", "management"]
_PLANES: dict[Listener, Plane] = {"business": BUSINESS, "management": MANAGEMENT}

_REFUSALS = {
    "CERTIFICATE_REQUIRED": "asks for a client certificate, and was shown none",
    "UNSUPPORTED_CERTIFICATE": "refuses the client certificate: it is not meant for clients (clientAuth is missing in "
    "its extendedKeyUsage)",
    "UNKNOWN_CA": "refuses the client certificate: no CA of tlsCaFile has signed it, or a revocation list of its CA is "
    "missing",
    "CERTIFICATE_EXPIRED": "refuses the client certificate: it, or the revocation list of its CA, has expired",
    "CERTIFICATE_REVOKED": "refuses the client certificate: it was revoked",
    "CERTIFICATE_UNKNOWN": "refuses the client certificate",
    "BAD_CERTIFICATE": "refuses the client certificate",
}
"""A server's TLS alert (RFC 8446, 6.2), as OpenSSL's reason ends, in words."""

_CLIENT_ADVICE = "Name one for clients with --client-cert and --client-key, or serve without HTTPS: --insecure-http."


@dataclass(frozen=True, slots=True)
class Answer:
    """What the daemon answered to a prompt, and how long it took from the connection to the last byte."""

    text: str
    seconds: float


@dataclass(frozen=True, slots=True)
class ClientFiles:
    """What a client of the daemon's HTTPS shows and trusts: absolute paths of PEM files.

    Attributes:
        ca_cert: the authority that signed the daemon's certificate; None for the daemon's own list of authorities.
        cert: the client's certificate; None for the daemon's own, which serves where it is for clients too.
        key: its private key; None where it is in the same file.
    """

    ca_cert: str | None = None
    cert: str | None = None
    key: str | None = None


OWN_FILES = ClientFiles()
"""Whatever the daemon itself has."""


class UnansweredError(LaunchError):
    """A request came back without an answer, or could not be made. That says nothing against the daemon."""


class ClientRefusedError(UnansweredError):
    """The two sides of HTTPS do not accept each other's certificates."""


def ask(url: str, prompt: str, max_tokens: int, timeout: float, tls: ssl.SSLContext | None = None) -> Answer:
    """POST /generate in vLLM's form and give the completion.

    MindIE answers `{"text": [PROMPT + " " + COMPLETION]}` (MindIE-LLM v3.0.0.beta.2
    src/server/endpoint/single_req_infer_interface/single_req_vllm_infer_interface.cpp:265-281).

    Raises:
        UnansweredError: no connection, no answer in `timeout` seconds, another status than 200, or not such an answer.
    """
    body = {"prompt": prompt, "max_tokens": max_tokens, "stream": False}
    begin = time.monotonic()
    response, raw = _exchange(url, "POST", "/generate", body, timeout, tls)
    seconds = time.monotonic() - begin
    text = raw.decode(errors="replace")
    if response.status != 200:
        what, advice = _refusal(response, text)
        raise UnansweredError(what, where=f"{url}/generate", advice=advice)
    try:
        whole = json.loads(text)["text"][0]
    except (ValueError, KeyError, IndexError, TypeError):
        whole = None
    if not isinstance(whole, str):
        raise UnansweredError(
            "answered the first request with something else than a text", where=f"{url}/generate", found=text[:300]
        )
    return Answer(whole.removeprefix(prompt).removeprefix(" "), seconds)


def is_healthy(url: str, timeout: float = 2, tls: ssl.SSLContext | None = None) -> bool:
    """Whether GET /v2/health/ready answers 200 on the management address.

    Raises:
        ClientRefusedError: HTTPS does not let this process ask.
    """
    try:
        response, _ = _exchange(url, "GET", "/v2/health/ready", None, timeout, tls)
    except ClientRefusedError:
        raise
    except UnansweredError:
        return False
    return response.status == 200


def tls_context(
    config: Mapping[str, Any], home: Path, files: ClientFiles, listener: Listener = "business"
) -> ssl.SSLContext:
    """A client's side of the daemon's HTTPS, which always asks for the client's certificate as well.

    This process only ever speaks to the daemon on its own host, so the name in the daemon's certificate is not compared
    with the address.

    Args:
        config: the daemon's conf/config.json.
        home: what the paths in it are relative to.
        files: the client's own; what it does not name is taken from the config.
        listener: each has files of its own.

    Raises:
        ClientRefusedError: a file cannot be read, or the key has a password.
    """
    server, plane = config["ServerConfig"], _PLANES[listener]
    try:
        authorities = [place(home, server[plane.ca_folder] + name) for name in server[plane.ca_files]]
        cert, key = place(home, server[plane.certificate]), place(home, server[plane.key])
    except (KeyError, TypeError) as failure:
        raise ClientRefusedError(f"lacks a field that HTTPS needs: {failure}", where="ServerConfig") from None
    if files.ca_cert is not None:
        authorities = [Path(files.ca_cert)]
    if files.cert is not None:
        cert, key = Path(files.cert), Path(files.key or files.cert)
    context = ssl.create_default_context()
    context.check_hostname = False
    for path in authorities:
        with _usable(path, "Name the authority that signed the daemon's certificate with --ca-cert."):
            context.load_verify_locations(path)
    with _usable(cert, _CLIENT_ADVICE):
        context.load_cert_chain(cert, key, password=lambda: "")
    return context


@contextlib.contextmanager
def _usable(path: Path, advice: str) -> Iterator[None]:
    """Turn what OpenSSL says of a file into a sentence that names it."""
    try:
        yield
    except (OSError, ValueError) as failure:
        what = f"cannot be used for a request of our own: {failure}"
        raise ClientRefusedError(what, where=path, advice=advice) from None


def _exchange(
    url: str, method: str, path: str, body: object, timeout: float, tls: ssl.SSLContext | None
) -> tuple[http.client.HTTPResponse, bytes]:
    parts = urlsplit(url)
    kind = partial(http.client.HTTPSConnection, context=tls) if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=timeout)
    try:
        payload = None if body is None else json.dumps(body, ensure_ascii=False).encode()
        try:
            connection.request(method, path, payload, {"Content-Type": "application/json"} if payload else {})
        except OSError:
            if isinstance(connection.sock, ssl.SSLSocket):
                connection.sock.recv(1)  # raises the server's alert, where it hung up before all was sent
            raise
        response = connection.getresponse()
        return response, response.read(MAX_ANSWER_BYTES)
    except (OSError, http.client.HTTPException) as failure:
        raise _fault(failure, url, timeout) from None
    finally:
        connection.close()


def _fault(failure: Exception, url: str, timeout: float) -> UnansweredError:
    """Why there was no answer, with what to do about it."""
    https = url.startswith("https:")
    if isinstance(failure, ssl.SSLCertVerificationError):
        what = f"shows a certificate that is not trusted here: {failure.verify_message}"
        advice = "Name the authority that signed it with --ca-cert."
        return ClientRefusedError(what, where=url, advice=advice)
    if isinstance(failure, ssl.SSLError) and failure.reason:
        for alert, words in _REFUSALS.items():
            if failure.reason.endswith(alert):
                return ClientRefusedError(words, where=url, advice=_CLIENT_ADVICE)
    if isinstance(failure, TimeoutError):
        advice = "The first answer may take long: ask again with `telechat-mindie chat`, or give it longer (--timeout)."
        return UnansweredError(f"gave no answer within {timeout:g} s", where=url, advice=advice)
    if isinstance(failure, ssl.SSLError | ConnectionResetError | http.client.RemoteDisconnected) and https:
        what = f"broke the connection off, as it does where it refuses a client certificate: {_words(failure)}"
        return ClientRefusedError(what, where=url, advice=_CLIENT_ADVICE)
    return UnansweredError(f"did not answer: {_words(failure)}", where=url, advice="Look at what its log says.")


def _words(failure: Exception) -> str:
    return str(failure) or type(failure).__name__


def _refusal(response: http.client.HTTPResponse, text: str) -> tuple[str, str | None]:
    """What an answer with another status than 200 means, and what to do about it."""
    says = f"HTTP {response.status}: {text[:300]}"
    if by := response.headers.get("Via") or response.headers.get("Proxy-Authenticate"):
        advice = "Let requests to this address pass it, or serve on 127.0.0.1."
        return f"was answered by a proxy in its place ({by}), with {says}", advice
    return f"answered the first request with {says}", "Look at what its log says."
