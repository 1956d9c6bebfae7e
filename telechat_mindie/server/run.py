"""The server as a process: listeners, readiness, signals, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn

from telechat_mindie.errors import InputError
from telechat_mindie.server.app import Plane, make_app
from telechat_mindie.server.generation import Ended
from telechat_mindie.server.host import EngineHost
from telechat_mindie.server.http.middleware import is_loopback
from telechat_mindie.server.http.protocol import bounded_protocol
from telechat_mindie.server.service import Service
from telechat_mindie.server.settings import Address, ServerSettings
from telechat_mindie.service.port_holder import port_holder

CLOSE_SECONDS = 2
"""For connections to close once their answers are complete."""

BACKLOG = 2048
SPARE_FILES = 200  # beside the connections: the model's, the libraries'


class _Listener(uvicorn.Server):
    """One port. Signals are for all of them together."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(
    open_host: Callable[[], EngineHost], settings: ServerSettings, on_ready: Callable[[dict[Plane, str]], object]
) -> None:
    """Serve until SIGTERM, SIGINT or GET /stopService.

    Args:
        open_host: loads the model; called once the ports are there.
        on_ready: called with the planes' URLs once requests are answered.

    Raises:
        InputError: an address or port cannot be had.
        ConfigError: a TLS file is unusable.
        TelechatMindieError: what `open_host` raises.
    """
    by_address: dict[Address, list[Plane]] = {}
    for plane in Plane:
        by_address.setdefault(getattr(settings, plane.value), []).append(plane)
    _allow_open_files(sum(settings.limits.connections for _ in by_address) + SPARE_FILES)
    # First what fails at once, then what takes long.
    contexts = {address: None if address.tls is None else address.tls.context() for address in by_address}
    with contextlib.ExitStack() as stack:
        sockets = {address: stack.enter_context(_bind(address)) for address in by_address}
        host = open_host()
        host.start()
        stack.callback(host.stop)

        async def main() -> None:
            service = Service(settings, host)
            servers = []
            for address, planes in by_address.items():
                app = make_app(service, planes, is_loopback(address.host))
                config = _config(app, settings)
                config.load()
                config.ssl = contexts[address]
                servers.append((_Listener(config), sockets[address]))
            urls = {
                plane: address.url(sockets[address].getsockname()[1])
                for address, planes in by_address.items()
                for plane in planes
            }
            await _run(service, servers, lambda: on_ready(urls))

        asyncio.run(main())


def _allow_open_files(count: int) -> None:
    """Raise the process's own limit, as far as the system lets it: a connection needs one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _bind(address: Address) -> socket.socket:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address.host.strip("[]"), address.port))
        listener.listen(BACKLOG)
    except OSError as failure:
        listener.close()
        where = f"{address.host}:{address.port}"
        if address.port and "in use" in str(failure):
            raise InputError(
                f"is taken by {port_holder(address.port)}", where=where, advice="Stop it, or name another with --port."
            ) from None
        raise InputError(f"cannot be listened on: {failure.strerror or failure}", where=where) from None
    return listener


def _config(app: object, settings: ServerSettings) -> uvicorn.Config:
    limits = settings.limits
    return uvicorn.Config(
        app,  # type: ignore[arg-type]
        http=bounded_protocol(limits),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=limits.connections,
        backlog=BACKLOG,
        h11_max_incomplete_event_size=limits.header_bytes,
        timeout_graceful_shutdown=CLOSE_SECONDS,
    )


async def _run(
    service: Service, servers: list[tuple[_Listener, socket.socket]], on_ready: Callable[[], object]
) -> None:
    loop = asyncio.get_running_loop()
    second_stop = asyncio.Event()

    def stop() -> None:
        (second_stop if service.stop_wanted.is_set() else service.stop_wanted).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    tasks = [asyncio.create_task(server.serve(sockets=[listener])) for server, listener in servers]
    try:
        while not all(server.started for server, _ in servers):
            await asyncio.wait(tasks, timeout=0.01, return_when=asyncio.FIRST_COMPLETED)
        on_ready()
        await service.stop_wanted.wait()
        await _drain(service, second_stop)
    finally:
        for server, _ in servers:
            server.should_exit = True
        await asyncio.gather(*tasks)
        service.close()


async def _drain(service: Service, second_stop: asyncio.Event) -> None:
    """Refuse new requests, and give unfinished answers their time; those that need more end with an error."""
    service.is_stopping = True
    give_up = asyncio.get_running_loop().time() + (0 if service.is_forced else service.limits.drain_seconds)
    while service.in_flight and not second_stop.is_set() and asyncio.get_running_loop().time() < give_up:
        await asyncio.sleep(0.05)
    for generation in list(service.running.values()):
        generation.cancel(Ended.SHUTDOWN)
    # Each of them still has to say so.
    last = asyncio.get_running_loop().time() + CLOSE_SECONDS
    while service.in_flight and asyncio.get_running_loop().time() < last:
        await asyncio.sleep(0.02)
