"""Environment variables that MindIE and its workers read, against each other and the service config.

A bare `file:line` is of MindIE-LLM v3.0.0.beta.2; docs are below its docs/zh/user_guide/user_manual.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from telechat_mindie.errors import ConfigError
from telechat_mindie.findings import Finding, Severity, error, ok, warning
from telechat_mindie.mindie import (
    BACKEND_VARIABLE,
    GENERATIONS,
    MS,
    RANK_PORTS,
    SCHEDULER_HOST,
    SERVER_PORTS,
    exported_homes,
)
from telechat_mindie.model_dir.modes import SKIP_VARIABLE, permission_findings
from telechat_mindie.reading import read_json
from telechat_mindie.service import ports
from telechat_mindie.service.card_rules import check_mask
from telechat_mindie.service.cards import VISIBLE, Cards, visible_devices
from telechat_mindie.service.check.options import CheckOptions
from telechat_mindie.service.check.service_file import device_rows, is_local
from telechat_mindie.service.port_holder import port_holder
from telechat_mindie.service.schema.files import MAX_BYTES
from telechat_mindie.service.schema.settings import BACKEND, SCHEDULE, SERVER
from telechat_mindie.service.schema.violations import Location, json_path, typed_at, value_at

NUMBERS: dict[str, tuple[float, float]] = {
    "NPU_MEMORY_FRACTION": (0.0, 1.0),  # mindie_llm/utils/env.py:117
    "RESERVED_MEMORY_GB": (0, 63),  # mindie_llm/utils/env.py
    "POST_PROCESSING_SPEED_MODE_TYPE": (0, 3),  # mindie_llm/utils/env.py
    "TOKENIZER_ENCODE_TIMEOUT": (5, 300),  # environment_variable.md
}

SEVERAL_MACHINES: tuple[Location, ...] = ((*BACKEND, "multiNodesInferEnabled"), (*SCHEDULE, "distributedEnable"))
LAYERWISE_NODES: Location = (*BACKEND, "layerwiseDisaggregated", "layerwiseDisaggregatedMultiNodesInferEnabled")
"""What makes a rank table compulsory; the last for slaves alone."""

MAX_MACHINES = 60  # src/config_manager/ranktable_config.cpp:28

LEFTOVERS = ("MS_ROLE", "MS_WORKER_NUM", "MS_NODE_ID")
"""mindformers' ModelRunner sets these itself for its ranks; a shell that ran msrun may still have them."""


def check_environment(
    config: Mapping[str, Any] | None, tp: int | None, options: CheckOptions, backend: str = MS
) -> Iterator[Finding]:
    """The rules, for a config with workers of one backend.

    Args:
        config: the content of the service config, None without one.
        tp: ranks of the model directory, None where it is not known.
        options: of the check.
        backend: of the model directory. The ranks of ms alone have a scheduler of MindSpore's.
    """
    found = [
        *(_backend(config, options) if backend == MS else _atb_backend(options.environment)),
        *_permission_check(options.environment),
        *_numbers(options.environment),
        *([*_rank_ports(config, tp, options.environment), *_instances(config)] if backend == MS else []),
        *_files(options),
        *_rank_table(config, options),
        *_devices(config, options.environment),
    ]
    yield from found
    if not found:
        yield ok("environment", "environment", "no variable that MindIE would stumble over")


def _backend(config: Mapping[str, Any] | None, options: CheckOptions) -> Iterator[Finding]:
    """mindie_llm/utils/env.py:152: the tensor backend follows the variable, samplers and wrappers backendType; its case
    does not matter. With asynchronous scheduling MindSpore workers raise (plugin_manager.py:262)."""
    value = options.environment.get(BACKEND_VARIABLE)
    advice = f"export {BACKEND_VARIABLE}=MS; `telechat-mindie launch` sets it."
    if value is not None and value.lower() != "ms":
        yield error("framework-backend", BACKEND_VARIABLE, f"is {value}, beside backendType ms", advice)
    elif value is None and config is not None and exported_homes(options.environment):
        yield warning("framework-backend", BACKEND_VARIABLE, "is not set to MS, as backendType ms needs it", advice)
    if options.environment.get("MINDIE_ASYNC_SCHEDULING_ENABLE") == "1":
        name = "MINDIE_ASYNC_SCHEDULING_ENABLE"
        yield error("async-scheduling", name, "is 1, which MindSpore workers refuse", f"unset {name}")
    for name in LEFTOVERS:
        if name in options.environment:
            yield warning("leftover", name, "is set already, and the runner sets it for its ranks", f"unset {name}")


def _atb_backend(environment: Mapping[str, str]) -> Iterator[Finding]:
    """3.0.0.beta follows the variable, whose default is ATB (mindie_llm/utils/env.py:152); v3.0.0 has none."""
    value = environment.get(BACKEND_VARIABLE)
    if value is not None and value.lower() != "atb":
        yield error(
            "framework-backend", BACKEND_VARIABLE, f"is {value}, beside backendType atb", f"unset {BACKEND_VARIABLE}"
        )


def _permission_check(environment: Mapping[str, str]) -> Iterator[Finding]:
    if environment.get(SKIP_VARIABLE) == "0":
        yield warning(
            "permission-check",
            SKIP_VARIABLE,
            "is 0: MindIE passes over owners and modes of the model",
            f"unset {SKIP_VARIABLE}",
        )


def _numbers(environment: Mapping[str, str]) -> Iterator[Finding]:
    for name, (low, high) in NUMBERS.items():
        if (text := environment.get(name)) is None:
            continue
        number = _number(text)
        if number is None or not low <= number <= high or (name == "NPU_MEMORY_FRACTION" and number == 0):
            yield error("variable", name, f"is {text!r}, expected {low:g} to {high:g}", f"unset {name}")


def _rank_ports(config: Mapping[str, Any] | None, tp: int | None, environment: Mapping[str, str]) -> Iterator[Finding]:
    """Several ranks need a port each for their scheduler and their exchange; two daemons may not share them."""
    used = {name: typed_at(config or {}, (*SERVER, name)) for name in SERVER_PORTS}
    taken = {port: name for name, port in used.items() if port is not None}
    for name, default in RANK_PORTS.items():
        text = environment.get(name)
        if text is None and (tp is None or tp < 2 or config is None):
            continue
        number = default if text is None else _number(text)
        advice = f"export {name}=PORT with a free one; `telechat-mindie launch` chooses one for each instance."
        if number is None or number != int(number) or not ports.LOWEST <= number <= ports.HIGHEST:
            yield error("rank-port", name, f"is {text!r}, no port from {ports.LOWEST} to {ports.HIGHEST}", advice)
            continue
        port = int(number)
        if port in taken:
            yield error("rank-port", name, f"is {port}, which {taken[port]} has already", advice)
        elif not ports.is_free(port):
            yield warning("rank-port", name, f"port {port} is held by {port_holder(port)}", advice)
        taken[port] = name
    host = environment.get("MS_SCHED_HOST")
    if host and not is_local(host):
        yield error(
            "rank-port",
            "MS_SCHED_HOST",
            f"{host} is no address of this machine",
            f"export MS_SCHED_HOST={SCHEDULER_HOST}",
        )


def _instances(config: Mapping[str, Any] | None) -> Iterator[Finding]:
    """All instances of a daemon inherit one MS_SCHED_PORT, and rank 0 of each starts a scheduler on it (mindformers
    r1.5.0 mindformers/model_runner.py)."""
    rows = device_rows(config or {})
    if len(rows) > 1 and any(len(row) > 1 for row in rows):
        yield warning(
            "shared-scheduler",
            "MS_SCHED_PORT",
            f"the {len(rows)} instances of this daemon would share it, several cards each",
            "Start a daemon for each instance, with --devices and MS_SCHED_PORT of its own.",
        )


def _files(options: CheckOptions) -> Iterator[Finding]:
    named = options.environment.get("MIES_CONFIG_JSON_PATH")
    given = options.service_config
    if named and given and os.path.realpath(named) != os.path.realpath(given):
        yield warning(
            "config-path",
            "MIES_CONFIG_JSON_PATH",
            f"is {named}, so MindIE would not read {given}",
            f"export MIES_CONFIG_JSON_PATH={given}",
        )


def _rank_table(config: Mapping[str, Any] | None, options: CheckOptions) -> Iterator[Finding]:
    """Several machines find each other by it (src/config_manager/config_manager_impl.cpp:145-153,
    ranktable_config.cpp:31-85)."""
    table, advice = options.environment.get("RANK_TABLE_FILE"), "unset RANK_TABLE_FILE"
    reasons = [location for location in SEVERAL_MACHINES if value_at(config, location) is True]
    layerwise = typed_at(config, (*SERVER, "layerwiseDisaggregatedRoleType"), str) == "slave"
    if layerwise and value_at(config, LAYERWISE_NODES) is True:
        reasons.append(LAYERWISE_NODES)
    severity: Severity = "error" if reasons else "warning"  # nobody reads it on one machine
    if not table:
        if reasons:
            name = json_path(reasons[0])
            advice = "export RANK_TABLE_FILE=PATH of the rank table, or set that to false on a single machine."
            yield error("rank-table", "RANK_TABLE_FILE", f"is not set, and MindIE needs it for {name}", advice)
        return
    if os.path.islink(table) or not os.path.isfile(table):  # noqa: PTH113, PTH114  pathlib's raise on a long name
        kind = "a symbolic link, which MindIE refuses" if os.path.islink(table) else "no file"  # noqa: PTH114
        yield Finding("rank-table", severity, "RANK_TABLE_FILE", f"names {table}, which is {kind}", advice)
        return
    if reasons:
        user = replace(options.user, strict=GENERATIONS[options.generation].is_public)
        yield from permission_findings([Path(table)], user)
        try:
            count = read_json(Path(table), MAX_BYTES).get("server_count")
        except ConfigError as failure:
            yield error("rank-table", "RANK_TABLE_FILE", str(failure), "Make it anew.")
            return
        if not isinstance(count, str) or not count.isdecimal() or not 2 <= int(count) <= MAX_MACHINES:
            message = f'{table}: server_count is {count!r}, expected text, "2" to "{MAX_MACHINES}"'
            yield error("rank-table", "RANK_TABLE_FILE", message, "Make it anew.")


def _devices(config: Mapping[str, Any] | None, environment: Mapping[str, str]) -> Iterator[Finding]:
    """ASCEND_RT_VISIBLE_DEVICES, where it is set, as CANN takes it; npuDeviceIds count within it."""
    text = environment.get(VISIBLE)
    if text is None or config is None:
        return
    yield from check_mask(Cards(mask=visible_devices(environment)))
    visible = [part for part in text.split(",") if part.strip()]
    highest = max((device for row in device_rows(config) for device in row), default=-1)
    if highest >= len(visible):
        yield error(
            "visible-devices",
            VISIBLE,
            f"shows {len(visible)} card(s), numbered from 0, and npuDeviceIds name card {highest}",
            f"unset {VISIBLE}, or number the devices from 0.",
        )


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
