"""What to serve, where and within which limits: from flags, or from MindIE's own conf/config.json."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from telechat_mindie.backend.plugins import parse_plugin_params, plugin_names
from telechat_mindie.engine.config import EngineConfig
from telechat_mindie.errors import ConfigError, InputError
from telechat_mindie.mindie import SERVER_PORTS, certificate_home
from telechat_mindie.model_dir.layout import ModelDir
from telechat_mindie.server.http.limits import Limits
from telechat_mindie.server.http.middleware import ANY_ORIGIN
from telechat_mindie.server.http.tls import TlsFiles
from telechat_mindie.service import schema
from telechat_mindie.service.certificates import BUSINESS, MANAGEMENT, METRICS, Plane, place
from telechat_mindie.service.schema.settings import SERVER, Settings

DEFAULT_CACHE_GB = 2.0
DEFAULT_BATCH, DEFAULT_PREFILL_BATCH = 32, 8  # a laptop's; MindIE ships 200 and 50

_DEFAULT_PORTS = {"http": 80, "https": 443}
_HOST = re.compile(r"[a-z0-9._:-]+")  # browsers send a name of other letters in ASCII, as xn--...


@dataclass(frozen=True, slots=True)
class Address:
    """Where a plane listens; `tls` None: plain HTTP. Port 0 lets the system choose."""

    host: str
    port: int
    tls: TlsFiles | None = None

    def url(self, port: int) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'http' if self.tls is None else 'https'}://{host}:{port}"


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """All settings of a server.

    Args:
        model_name: that requests use.
        business, management, metrics: the three planes; equal ones share a listener.
        engine: limits of the engine.
        limits: limits of the server.
        cache_gb: memory of the key/value cache.
        host_cache_gb: memory of swapped-out blocks.
        npu_mem_size: as /v1/config and its like report it.
        threads: that parse and tokenize requests (tokenizerProcessNumber).
        truncation: cut prompts that are too long, at their end, instead of refusing them.
        full_text: a stream repeats the whole text each time (fullTextEnabled).
        prefill_policy, decode_policy: as GET /v2 reports them; the engine has one policy, by priority and arrival.
        allowed_origins: of pages of other sites that browsers may use the server from; `*` for all.
        log_content: put prompts and answers into the request log.
    """

    model_name: str
    business: Address
    management: Address
    metrics: Address
    engine: EngineConfig
    limits: Limits = field(default_factory=Limits)
    cache_gb: float = DEFAULT_CACHE_GB
    host_cache_gb: int = 0
    npu_mem_size: int = -1
    threads: int = 8
    truncation: bool = False
    full_text: bool = False
    prefill_policy: int = 0
    decode_policy: int = 0
    allowed_origins: tuple[str, ...] = ()
    log_content: bool = False

    def with_flags(self, host: str | None, port: int | None, cache_gb: float | None) -> ServerSettings:
        """What the command line says wins; one address or port means one listener."""
        settings = self
        if host is not None or port is not None:
            business = replace(
                self.business,
                host=self.business.host if host is None else host,
                port=self.business.port if port is None else port,
            )
            settings = replace(settings, business=business, management=business, metrics=business)
        return settings if cache_gb is None else replace(settings, cache_gb=cache_gb)


def checked_origin(text: str) -> str:
    """An origin as browsers write it, or `*`.

    Raises:
        InputError: another text, such as a whole URL, or an origin that no browser writes so.
    """
    origin = text.rstrip("/").lower()
    if origin not in (ANY_ORIGIN, _as_browsers_write(origin)):
        raise InputError(
            "is not the origin of a page",
            where="--allow-origin",
            expected=f"scheme://host[:port] as browsers send it, or {ANY_ORIGIN}",
            found=text,
            advice="A page from a file has none: serve its folder with python -m http.server --bind 127.0.0.1",
        )
    return origin


def _as_browsers_write(origin: str) -> str | None:
    """Without what is more than scheme, host and a port that is not the scheme's own; None where that is no origin."""
    try:
        parts = urlsplit(origin)
        port = parts.port
    except ValueError:  # an open bracket, or a port that is none
        return None
    host = parts.hostname or ""
    if not _HOST.fullmatch(host):
        return None
    host = f"[{host}]" if ":" in host else host
    is_default = port is None or port == _DEFAULT_PORTS.get(parts.scheme)
    return f"{parts.scheme}://{host}" if is_default else f"{parts.scheme}://{host}:{port}"


def plain_settings(directory: ModelDir, *, prefix_cache: bool = False, chunked_prefill: bool = False) -> ServerSettings:
    """Settings without a conf/config.json: everything on 127.0.0.1:1025, lengths as the directory's yaml has them."""
    longest = directory.serving.max_seq_len
    here = Address("127.0.0.1", SERVER_PORTS["port"])
    limits = Limits()
    engine = EngineConfig(
        max_seq_len=longest,
        max_input_token_len=longest,
        max_iter_times=longest,
        max_batch_size=DEFAULT_BATCH,
        max_prefill_batch_size=DEFAULT_PREFILL_BATCH,
        max_prefill_tokens=longest,
        block_size=directory.serving.block_size,
        prefix_cache=prefix_cache,
        chunked_prefill=chunked_prefill,
        max_waiting=limits.requests,
    )
    return ServerSettings(directory.path.resolve().name, here, here, here, engine, limits)


def read_settings(path: Path, generation: str, home: Path | None, environment: Mapping[str, str]) -> ServerSettings:
    """Settings of a conf/config.json.

    Args:
        path: the file.
        generation: of MindIE, a key of `schema.GENERATIONS`.
        home: MindIE's home, to which TLS files are relative; None looks for MindIE as `launch` does, else takes the
            folder above conf/.
        environment: as MindIE would have it; MIES_CONTAINER_IP and MIES_CONTAINER_MANAGEMENT_IP win over the file.

    Raises:
        ConfigError: the file is unreadable or breaks MindIE's rules; the first five violations are named.
        InputError: the generation is unknown, or the limits do not fit each other.
    """
    data = schema.load(path)
    schema.accept(data, generation, path)
    found = Settings.of(generation, data, ())
    if found.server["inferMode"] != "standard":
        raise ConfigError(
            "splits prefill and decode",
            where=f"{path}: ServerConfig.inferMode",
            expected="standard",
            found=found.server["inferMode"],
            advice="The embedded server runs both in one process.",
        )
    truncation = found.deploy["truncation"]
    if truncation == 1 and truncation is not True:  # for Qwen and DeepSeek alone, says the document of schema/deploy.py
        raise ConfigError(
            "cuts prompts at their beginning",
            where=f"{path}: BackendConfig.ModelDeployConfig.truncation",
            expected="true, false, -1 or 0",
            found=truncation,
            advice="MindIE does not do that for TeleChat2: -1 cuts at the end, 0 refuses what is too long.",
        )
    home = certificate_home(environment, home) or path.resolve().parent.parent
    model = found.models[0]
    # Without certificates of its own, as in 2.0, the metrics plane has those of the management plane.
    metrics_plane = METRICS if found.given(*SERVER, METRICS.certificate) else MANAGEMENT
    business, management, metrics = _addresses(found.server, metrics_plane, home, environment)
    limits = Limits(
        body_bytes=found.server.get("maxRequestLength", 40) << 20,
        requests=3 * found.server["maxLinkNum"],
        token_seconds=found.server.get("tokenTimeout", 600),
        request_seconds=found.server.get("e2eTimeout", 600),
    )
    memory = model["npuMemSize"]
    return ServerSettings(
        model_name=model["modelName"],
        business=business,
        management=management,
        metrics=metrics,
        engine=_engine(found, model, limits),
        limits=limits,
        cache_gb=DEFAULT_CACHE_GB if memory == -1 else memory,
        host_cache_gb=model["cpuMemSize"] if found.schedule["maxPreemptCount"] else 0,
        npu_mem_size=memory,
        threads=found.backend["tokenizerProcessNumber"],
        truncation=bool(truncation),
        full_text=found.server["fullTextEnabled"],
        prefill_policy=found.schedule["prefillPolicyType"],
        decode_policy=found.schedule["decodePolicyType"],
    )


def _engine(found: Settings, model: Mapping[str, Any], limits: Limits) -> EngineConfig:
    deploy, schedule = found.deploy, found.schedule
    text = model.get("plugin_params")
    plugins = parse_plugin_params(text if isinstance(text, str) else _as_text(text))
    kinds = plugin_names(plugins)
    for kind in sorted({*kinds} - {"prefix_cache", "splitfuse"}):
        raise InputError("is not a plugin of the embedded engine", where="plugin_params", found=kind)
    return EngineConfig(
        max_seq_len=deploy["maxSeqLen"],
        max_input_token_len=deploy["maxInputTokenLen"],
        max_iter_times=schedule["maxIterTimes"],
        max_batch_size=schedule["maxBatchSize"],
        max_prefill_batch_size=schedule["maxPrefillBatchSize"],
        max_prefill_tokens=schedule["maxPrefillTokens"],
        max_preempt_count=schedule["maxPreemptCount"],
        block_size=schedule["cacheBlockSize"],
        prefix_cache="prefix_cache" in kinds,
        chunked_prefill="splitfuse" in kinds,
        split_chunk_tokens=max(1, schedule["splitChunkTokens"]),
        max_waiting=limits.requests,
    )


def _as_text(value: object) -> str | None:
    return None if value is None else json.dumps(value)


def _addresses(
    server: Mapping[str, Any], metrics_plane: Plane, home: Path, environment: Mapping[str, str]
) -> tuple[Address, Address, Address]:
    """Business, management and metrics; the last two share an address, not a port."""
    host = environment.get("MIES_CONTAINER_IP") or server["ipAddress"]
    inner = environment.get("MIES_CONTAINER_MANAGEMENT_IP") or server.get("managementIpAddress") or host
    business = Address(host, server["port"], _tls(server, BUSINESS, home))
    management = Address(inner, server["managementPort"], _tls(server, MANAGEMENT, home))
    metrics = Address(inner, server["metricsPort"], _tls(server, metrics_plane, home))
    # Planes of one address and port are one listener, with the certificate of the outermost.
    if (management.host, management.port) == (business.host, business.port):
        management = business
    for other in (business, management):
        if (metrics.host, metrics.port) == (other.host, other.port):
            metrics = other
    return business, management, metrics


def _tls(server: Mapping[str, Any], plane: Plane, home: Path) -> TlsFiles | None:
    if not server["httpsEnabled"]:
        return None
    lists_folder = server.get(plane.crl_folder, "")
    lists = server.get(plane.crl_files, ()) if lists_folder else ()
    return TlsFiles(
        place(home, server[plane.certificate]),
        place(home, server[plane.key]),
        tuple(place(home, server[plane.ca_folder] + name) for name in server[plane.ca_files]),
        tuple(place(home, lists_folder + name) for name in lists),
    )
