"""`telechat-mindie serve`."""

from __future__ import annotations

import os
from pathlib import Path

import typer

from telechat_mindie.commands.messages import add_time
from telechat_mindie.commands.options import Generation, ModelPath
from telechat_mindie.service import DEFAULT_GENERATION


def serve(
    model_path: ModelPath,
    host: str = typer.Option(None, "--host", help="Address of all routes; default: 127.0.0.1, or the config's."),
    port: int = typer.Option(None, "--port", min=0, max=65535, help="Port of all routes; default: 1025, 0: any."),
    service_config: Path = typer.Option(
        None, "--service-config", help="MindIE's conf/config.json: names, ports, TLS and limits are as it says."
    ),
    mindie: Generation = DEFAULT_GENERATION,
    mindie_home: Path = typer.Option(
        None,
        "--mindie-home",
        help="MindIE's folder; default: the one that launch would take, or the one above conf/.",
    ),
    kv_gb: float = typer.Option(None, "--kv-gb", help="GB of memory for the KV cache; default: npuMemSize, else 2."),
    model_name: str = typer.Option(None, "--model-name", help="Name that requests use; default: the directory's."),
    prefix_cache: bool = typer.Option(False, "--prefix-cache", help="Share equal beginnings of prompts."),
    chunked_prefill: bool = typer.Option(False, "--chunked-prefill", help="Cut long prompts beside running answers."),
    allow_origin: list[str] = typer.Option(
        [],
        "--allow-origin",
        metavar="<str>",
        help="Page of another site that may use the server, as https://host[:port]; repeatable.",
    ),
    log_content: bool = typer.Option(
        False, "--log-content", help="Log what was asked and answered too; else only how long it was and took."
    ),
    drain: float = typer.Option(30, "--drain", min=0, help="Seconds for unfinished answers when it is stopped."),
) -> None:
    """Serve a model directory on the CPU with MindIE's HTTP API, and a chat page at /.

    A line on stderr for each request; with -v also for each GET, with -q for none. /docs lists the routes.
    SIGTERM and Ctrl-C let unfinished answers finish; a second one does not.

    Examples:
        telechat-mindie serve model
        telechat-mindie serve model --port 8000 --kv-gb 4 --prefix-cache
        telechat-mindie serve model --service-config conf/config.json
    """
    import dataclasses
    import math

    from telechat_mindie.errors import InputError
    from telechat_mindie.installing import MissingExtraError
    from telechat_mindie.model_dir.layout import ModelDir

    try:
        from telechat_mindie.server.app import Plane
        from telechat_mindie.server.host import EngineHost
        from telechat_mindie.server.run import serve as run
        from telechat_mindie.server.settings import checked_origin, plain_settings, read_settings
    except ModuleNotFoundError as missing:
        raise MissingExtraError(missing.name or "fastapi", "serve") from None

    if kv_gb is not None and not 0 < kv_gb < math.inf:
        raise InputError("is out of range", where="--kv-gb", expected="above 0", found=kv_gb)
    directory = ModelDir.open(model_path)
    if service_config is None:
        settings = plain_settings(directory, prefix_cache=prefix_cache, chunked_prefill=chunked_prefill)
    elif prefix_cache or chunked_prefill:
        raise InputError(
            "has its own word on plugins", where="--service-config", advice="Set plugin_params there instead."
        )
    else:
        settings = read_settings(service_config, mindie, mindie_home, os.environ)
    settings = settings.with_flags(host, port, kv_gb)
    settings = dataclasses.replace(
        settings,
        model_name=model_name or settings.model_name,
        allowed_origins=tuple(map(checked_origin, allow_origin)),
        log_content=log_content,
        limits=dataclasses.replace(settings.limits, drain_seconds=drain),
    )

    add_time()

    def on_ready(urls: dict[Plane, str]) -> None:
        others = [f"{plane.value} {url}" for plane, url in urls.items() if url != urls[Plane.BUSINESS]]
        print(f"Daemon start success! {settings.model_name} at {urls[Plane.BUSINESS]}", *others, sep=", ", flush=True)

    run(lambda: EngineHost.open(model_path, settings), settings, on_ready)
    print("stopped", flush=True)
