"""A conf/config.json: by MindIE's own rules, and against the model directory that it serves."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from telechat_mindie.errors import ConfigError
from telechat_mindie.findings import Finding, Severity, error, ok, warning
from telechat_mindie.kv_budget import CacheShape, CardBudget
from telechat_mindie.mindie import ATB, GENERATIONS, MS, SERVER_PORTS
from telechat_mindie.model_dir.atb.rules import beyond_plain
from telechat_mindie.model_dir.modes import permission_findings
from telechat_mindie.service import ports, schema
from telechat_mindie.service.card_rules import card_memory
from telechat_mindie.service.cards import read_cards
from telechat_mindie.service.certificates import fault, tls_paths
from telechat_mindie.service.check.home_file import CONFIG, check_home_file
from telechat_mindie.service.check.options import CheckOptions
from telechat_mindie.service.options import ModelFacts
from telechat_mindie.service.port_holder import port_holder
from telechat_mindie.service.schema.settings import BACKEND, DEPLOY, SCHEDULE, SERVER, model_location
from telechat_mindie.service.schema.violations import Location, json_path, typed_at
from telechat_mindie.units import GB, INT32_MAX


def check_service_file(
    path: Path, facts: ModelFacts | None, options: CheckOptions
) -> tuple[list[Finding], dict[str, Any] | None]:
    """The file rules, the schema, the model and the host; and the content, None where it is not to be read.

    Args:
        path: the conf/config.json.
        facts: of the model directory; None where it cannot be opened, which is told elsewhere.
        options: of the check.
    """
    files = list(_file_rules(path, options))
    try:
        config = schema.load(path)
    except ConfigError as failure:
        advice = "Render it again: telechat-mindie service-config MODEL_PATH"
        return [*files, error("service-config", path, str(failure), advice)], None
    found = [*files, *check_config(config, path, facts, options)]
    fits = f"fits MindIE {options.generation}, the model directory and this host"
    return found or [ok("service-config", path, fits)], config


def _file_rules(path: Path, options: CheckOptions) -> Iterator[Finding]:
    """Owner and mode, and no link where one is refused (src/utils/common_util.cpp:269-303, file_utils.cpp:213-248). Its
    path may hold any characters."""
    if path.is_symlink():
        names = [options.environment.get("MIES_CONFIG_JSON_PATH"), options.home and options.home / CONFIG]
        is_refused = any(name and os.path.abspath(name) == os.path.abspath(path) for name in names)  # noqa: PTH100
        yield Finding(
            "link",
            "error" if is_refused else "warning",
            str(path),
            "is a symbolic link, which MindIE refuses in MIES_CONFIG_JSON_PATH and as its home's conf/config.json",
            f"Name the real file, or start the daemon with --config-file {path}.",
        )
    user = replace(options.user, strict=GENERATIONS[options.generation].is_public)
    yield from permission_findings([Path(os.path.realpath(path))], user)


def check_config(
    config: Mapping[str, Any], where: Path, facts: ModelFacts | None, options: CheckOptions
) -> Iterator[Finding]:
    """The content of a conf/config.json: schema, then what only the model and the host can tell."""
    violations = schema.validate(config, options.generation)
    for violation in violations:
        if violation.rule == "ms-npu-mem" and violation.severity == "warning":
            continue  # -1 is right for the runner of this package, which is what serves the directory
        yield replace(violation, where=f"{where}: {violation.where}")
    yield from check_home_file(config, where, options)
    if facts is not None:
        yield from _model(config, where, facts)
        yield from _memory(config, where, facts, options)
    if options.home is not None and not any(violation.severity == "error" for violation in violations):
        yield from _certificates(config, where, options.home, options)
    yield from _addresses(config, where, options)


def _certificates(config: Mapping[str, Any], where: Path, home: Path, options: CheckOptions) -> Iterator[Finding]:
    """The files for TLS. Of closed generations only one thing is known: a certificate, key or CA file must be there."""
    strict = GENERATIONS[options.generation].is_public
    for item in tls_paths(config, options.generation, home):
        if item.kind != "file" and not item.present:
            continue  # its files tell it
        if reason := fault(item, home, options.uid):
            must = strict or not (item.present or item.is_revocation)
            severity: Severity = "error" if must else "warning"
            yield Finding(
                "certificate", severity, f"{where}: {item.path}", f"names {item.file}, {reason[0]}", reason[1]
            )


def _model(config: Mapping[str, Any], where: Path, facts: ModelFacts) -> Iterator[Finding]:
    def differs(location: Location, id: str, message: str, advice: str, severity: Severity = "error") -> Finding:
        return Finding(id, severity, f"{where}: {json_path(location)}", message, advice)

    here = model_location(0, "modelWeightPath")
    path = typed_at(config, here, str)
    if path is not None and not _same(path, facts.model_path):
        yield differs(here, "model-path", f"is {path}, not the directory checked", f"Set it to {facts.model_path}.")
    here = model_location(0, "backendType")
    backend = typed_at(config, here, str)
    if backend is not None and backend != facts.backend:
        advice = f'Set it to "{facts.backend}".'
        yield differs(here, "backend-type", f"is {backend}: it cannot load this directory", advice)
    here = model_location(0, "worldSize")
    world_size = typed_at(config, here)
    if facts.backend == ATB and world_size is not None and world_size not in facts.allowed_tp:
        allowed = ", ".join(map(str, facts.allowed_tp))
        message = f"is {world_size}, and the model is shared by {allowed} cards"
        yield differs(here, "tp", message, "Set it to one of them, with as many npuDeviceIds.")
    elif facts.backend == MS and world_size is not None and world_size != facts.tp:
        yield differs(
            here,
            "tp",
            f"is {world_size}, and the directory was built for tp {facts.tp}",
            f"Set it to {facts.tp} with as many npuDeviceIds, or build the directory with --tp {world_size}.",
        )
    here = (*DEPLOY, "maxSeqLen")
    length = typed_at(config, here)
    if length is not None and length > facts.max_seq_len:
        yield differs(
            here,
            "model-length",
            f"is {length}, and the directory serves up to {facts.max_seq_len} tokens",
            f"Set it to {facts.max_seq_len} at most, or build the directory with a greater --max-seq-len.",
        )
    if length is not None and facts.plain_length and (message := beyond_plain(length, facts.plain_length)):
        yield differs(here, "plain-length", message, f"Set it to {facts.plain_length}.", "warning")
    here = (*SCHEDULE, "cacheBlockSize")
    block_size = typed_at(config, here)
    if facts.backend == MS and block_size is not None and block_size != facts.block_size:
        yield differs(
            here,
            "model-block-size",
            f"is {block_size}, and block_size of the directory's yaml is {facts.block_size}",
            f"Set it to {facts.block_size}.",
            "warning",
        )


def _memory(config: Mapping[str, Any], where: Path, facts: ModelFacts, options: CheckOptions) -> Iterator[Finding]:
    """Weights and KV cache of a card, and whether the cache holds one request of maxSeqLen."""
    here = model_location(0, "npuMemSize")
    size = typed_at(config, here)
    length = typed_at(config, (*DEPLOY, "maxSeqLen"))
    block_size = typed_at(config, (*SCHEDULE, "cacheBlockSize"))
    if size is None or length is None or not block_size or block_size < 0:
        return
    if size == 0 or not -1 <= size <= INT32_MAX:
        return  # the schema tells it
    card = options.device_mem_gb
    if card is None:
        devices = [device for row in device_rows(config) for device in row]
        card, _ = card_memory(read_cards(options.environment), devices)
    budget = CardBudget.of(card, facts.weight_bytes_per_rank, facts.vocab_size)
    cache = budget.cache_for(size)
    if not cache or not budget.holds(cache):
        parts = f"{budget.weights:.1f} GB of weights and {cache:.1f} GB of KV cache"
        yield error(
            "memory",
            f"{where}: {json_path(here)}",
            f"{parts} do not fit a card of {budget.card:g} GB" if cache else f"-1 leaves no KV cache: {budget}",
            "Lower npuMemSize, or build the directory for a greater tp; --device-mem names another card.",
        )
        return
    shape = CacheShape(facts.kv_bytes_per_token_per_rank, block_size)
    blocks, needed = shape.usable_blocks_in(cache * GB), shape.blocks_for(length)
    if blocks < needed:
        yield error(
            "kv-blocks",
            f"{where}: {json_path(here)}",
            f"gives {blocks} KV blocks, and one request of maxSeqLen {length} takes {needed}",
            "Raise npuMemSize, or lower maxSeqLen.",
        )


def _addresses(config: Mapping[str, Any], where: Path, options: CheckOptions) -> Iterator[Finding]:
    """Addresses of this machine, and ports that are free now."""
    taken: Severity = "warning"  # the service that is checked may be the one that runs
    for name in SERVER_PORTS:
        port = typed_at(config, (*SERVER, name))
        if port is not None and ports.LOWEST <= port <= ports.HIGHEST and not ports.is_free(port):
            yield Finding(
                "port",
                taken,
                f"{where}: {json_path((*SERVER, name))}",
                f"port {port} is held by {port_holder(port)}",
                "Stop it if it is no instance of this service, or render the file again with another --port-base.",
            )
    for name, variable in (("ipAddress", "MIES_CONTAINER_IP"), ("managementIpAddress", "MIES_CONTAINER_MANAGEMENT_IP")):
        given = options.environment.get(variable)
        address = given or typed_at(config, (*SERVER, name), str)
        if address and not is_local(address):
            source = variable if given else f"{where}: {json_path((*SERVER, name))}"
            yield warning(
                "address",
                source,
                f"{address} is no address of this machine, so the daemon could not listen on it here",
                "Write 127.0.0.1 or an address of this machine, unless the file is for another one.",
            )


def is_local(address: str) -> bool:
    """Whether a socket can be bound to an address here; True for what is no address, which the schema tells."""
    bare = address.strip("[]")
    family = socket.AF_INET6 if ":" in bare else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((bare, 0))
    except OSError as failure:
        return failure.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
    except ValueError:
        return True
    return True


def _same(first: str, second: str) -> bool:
    try:
        return Path(first).expanduser().samefile(second)
    except (OSError, ValueError, RuntimeError):
        return os.path.normpath(first) == os.path.normpath(second)


def device_rows(config: Mapping[str, Any]) -> list[list[int]]:
    """npuDeviceIds, empty unless they are lists of integers."""
    rows = typed_at(config, (*BACKEND, "npuDeviceIds"), list) or []
    sound = all(isinstance(row, list) and all(type(device) is int for device in row) for row in rows)
    return rows if sound else []
