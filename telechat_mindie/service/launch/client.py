"""HTTP to a daemon on this host: the first request, and its health. No proxy is ever asked."""

from __future__ import annotations

import http.client
import json
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from telechat_mindie.service.launch.errors import LaunchError

MAX_ANSWER_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Answer:
    """What the daemon answered to a prompt, and how long it took from the connection to the last byte."""

    text: str
    seconds: float


class NoClientCertificateError(LaunchError):
    """HTTPS in MindIE asks for a client's certificate, and there is none that this process may use."""


def ask(url: str, prompt: str, max_tokens: int, timeout: float, tls: ssl.SSLContext | None = None) -> Answer:
    """POST /generate in vLLM's form and give the completion.

    MindIE answers `{"text": [PROMPT + " " + COMPLETION]}` (MindIE-LLM v3.0.0.beta.2
    src/server/endpoint/single_req_infer_interface/single_req_vllm_infer_interface.cpp:265-281).

    Raises:
        LaunchError: no connection, no answer in `timeout` seconds, another status than 200, or not such an answer.
    """
    body = {"prompt": prompt, "max_tokens": max_tokens, "stream": False}
    begin = time.monotonic()
    status, raw = _exchange(url, "POST", "/generate", body, timeout, tls)
    seconds = time.monotonic() - begin
    text = raw.decode(errors="replace")
    if status != 200:
        raise LaunchError(f"answered the first request with HTTP {status}: {text[:300]}", where=f"{url}/generate")
    try:
        whole = json.loads(text)["text"][0]
    except (ValueError, KeyError, IndexError, TypeError):
        whole = None
    if not isinstance(whole, str):
        raise LaunchError(
            "answered the first request with something else than a text", where=f"{url}/generate", found=text[:300]
        )
    return Answer(whole.removeprefix(prompt).removeprefix(" "), seconds)


def is_healthy(url: str, timeout: float = 2, tls: ssl.SSLContext | None = None) -> bool:
    """Whether GET /v2/health/ready answers 200 on the management address."""
    try:
        status, _ = _exchange(url, "GET", "/v2/health/ready", None, timeout, tls)
    except LaunchError:
        return False
    return status == 200


def tls_context(config: Mapping[str, Any], home: Path) -> ssl.SSLContext:
    """A client's side of the daemon's HTTPS, which always asks for the client's certificate as well.

    The daemon's own certificate and CA serve: this process only ever speaks to the daemon on its own host, so the name
    in the certificate is not compared with the address.

    Raises:
        NoClientCertificateError: they cannot be read, or the key has a password.
    """
    server = config["ServerConfig"]
    context = ssl.create_default_context()
    context.check_hostname = False
    try:
        for name in server["tlsCaFile"]:
            context.load_verify_locations(home / (server["tlsCaPath"] + name))
        context.load_cert_chain(home / server["tlsCert"], home / server["tlsPk"], password=lambda: "")
    except (OSError, KeyError, TypeError, ValueError) as failure:
        raise NoClientCertificateError(
            f"cannot be used for a request of our own: {failure}",
            where=home / str(server.get("tlsCert")),
            advice="Ask the service with a client certificate of yours.",
        ) from None
    return context


def _exchange(
    url: str, method: str, path: str, body: object, timeout: float, tls: ssl.SSLContext | None
) -> tuple[int, bytes]:
    parts = urlsplit(url)
    kind = partial(http.client.HTTPSConnection, context=tls) if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=timeout)
    try:
        payload = None if body is None else json.dumps(body, ensure_ascii=False).encode()
        connection.request(method, path, payload, {"Content-Type": "application/json"} if payload else {})
        response = connection.getresponse()
        return response.status, response.read(MAX_ANSWER_BYTES)
    except (OSError, http.client.HTTPException) as failure:
        raise LaunchError(f"did not answer: {failure or type(failure).__name__}", where=url) from None
    finally:
        connection.close()
