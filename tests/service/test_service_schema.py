"""The schema of conf/config.json: shipped defaults are clean, and each broken rule is found where it was broken."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from telechat_mindie.backend.plugins import parse_plugin_params
from telechat_mindie.errors import ConfigError, InputError
from telechat_mindie.findings import Finding, Report
from telechat_mindie.mindie import generation_of
from telechat_mindie.service import schema

Config = dict[str, Any]

PLACES = {
    "S": "ServerConfig",
    "B": "BackendConfig",
    "D": "BackendConfig.ModelDeployConfig",
    "M": "BackendConfig.ModelDeployConfig.ModelConfig.0",
    "C": "BackendConfig.ScheduleConfig",
    "L": "LogConfig",
    "$": "",
}
"""Short names of the objects, for the tables below: `S.port` is ServerConfig.port."""

GONE = object()
"""In place of a value: the key is removed."""


def steps(place: str) -> list[str | int]:
    head, _, rest = place.partition(".")
    dotted = ".".join(part for part in (PLACES[head], rest) if part)
    return [int(step) if step.isdigit() else step for step in dotted.split(".")]


def mutate(config: Config, place: str, value: Any) -> None:
    *parents, last = steps(place)
    target: Any = config
    for step in parents:
        target = target[step] if isinstance(step, int) else target.setdefault(step, {})
    if value is GONE:
        del target[last]
    else:
        target[last] = value


def path_of(place: str) -> str:
    return schema.json_path(tuple(steps(place)))


def valid_config() -> Config:
    """A valid file for the MindSpore backend, without a warning."""
    config = schema.default_config("3.0.0.beta")
    mutate(config, "M.backendType", "ms")
    mutate(config, "M.npuMemSize", 8)
    return config


# One change to the valid file, the place where it is reported (the changed one, if not given) and the rule.
REFUSED: list[tuple[str, Any, str] | tuple[str, Any, str, str]] = [
    # the file
    ("$.ServerConfig", GONE, "compulsory"),
    ("$.ServerConfig", [], "type"),
    ("$.BackendConfig", GONE, "compulsory"),
    ("$.BackendConfig", None, "type"),
    ("$.LogConfig", "info", "type"),
    # ServerConfig
    ("S.ipAddress", GONE, "compulsory"),
    ("S.ipAddress", 127, "type"),
    ("S.ipAddress", "", "ip-address"),
    ("S.ipAddress", "localhost", "ip-address"),
    ("S.ipAddress", "127.0.0.256", "ip-address"),
    ("S.ipAddress", "fe80::1%eth0", "ip-address"),
    ("S.ipAddress", "0.0.0.0", "all-zero-ip"),
    ("S.ipAddress", "[::]", "all-zero-ip"),
    ("S.managementIpAddress", "10.0.0", "ip-address"),
    ("S.managementIpAddress", "::", "all-zero-ip"),
    ("S.port", GONE, "compulsory"),
    ("S.port", "1025", "type"),
    ("S.port", 1025.0, "type"),
    ("S.port", True, "type"),
    ("S.port", 1023, "range"),
    ("S.port", 65536, "range"),
    ("S.port", 1120, "port-clash"),
    ("S.managementPort", 80, "range"),
    ("S.metricsPort", GONE, "compulsory"),
    ("S.metricsPort", 70000, "range"),
    ("S.allowAllZeroIpListening", GONE, "compulsory"),
    ("S.allowAllZeroIpListening", 0, "type"),
    ("S.maxLinkNum", 0, "range"),
    ("S.maxLinkNum", 4097, "range"),
    ("S.httpsEnabled", "true", "type"),
    ("S.httpsEnabled", GONE, "compulsory"),
    ("S.fullTextEnabled", "yes", "type"),
    ("S.tlsCaPath", GONE, "https-certificates"),
    ("S.tlsCaFile", [], "https-certificates"),
    ("S.tlsCaFile", ["a", "b", "c", "d"], "https-certificates"),
    ("S.tlsCaFile", "ca.pem", "type"),
    ("S.tlsCaFile", [1], "type", "S.tlsCaFile.0"),
    ("S.tlsCert", "", "https-certificates"),
    ("S.tlsPk", GONE, "https-certificates"),
    ("S.tlsCrlFiles", ["a", "b", "c", "d"], "https-certificates"),
    ("S.managementTlsCert", GONE, "https-certificates"),
    ("S.managementTlsPk", "", "https-certificates"),
    ("S.metricsTlsCaFile", GONE, "https-certificates"),
    ("S.metricsTlsPk", GONE, "https-certificates"),
    ("S.inferMode", "mixed", "choice"),
    ("S.inferMode", GONE, "compulsory"),
    ("S.interCommTLSEnabled", None, "type"),
    ("S.interCommPort", 1000, "range"),
    ("S.openAiSupport", False, "type"),
    ("S.tokenTimeout", 3601, "range"),
    ("S.tokenTimeout", 0, "range"),
    ("S.e2eTimeout", 65536, "range"),
    ("S.e2eTimeout", GONE, "compulsory"),
    ("S.maxRequestLength", 101, "range"),
    ("S.distDPServerEnabled", GONE, "compulsory"),
    ("S.layerwiseDisaggregatedDataPort", 2**31, "range"),
    ("S.layerwiseDisaggregatedDataPort", -(2**31) - 1, "range"),
    ("S.HealthCheckConfig", 10, "type"),
    ("S.HealthCheckConfig.npuUsageThreshold", 101, "range"),
    # BackendConfig
    ("B.backendName", "MindIE", "pattern"),
    ("B.backendName", "a" * 51, "length"),
    ("B.backendName", "a__b", "pattern"),
    ("B.modelInstanceNumber", 0, "range"),
    ("B.modelInstanceNumber", 11, "range"),
    ("B.modelInstanceNumber", 2, "instances", "B.npuDeviceIds"),
    ("B.npuDeviceIds", [7], "type", "B.npuDeviceIds.0"),
    ("B.npuDeviceIds", [[0, 1, 2]], "world-size", "B.npuDeviceIds.0"),
    ("B.npuDeviceIds", [[0, 1, 2, 2]], "device-repeated", "B.npuDeviceIds.0"),
    ("B.npuDeviceIds", [[0, 1, 2, -3]], "range", "B.npuDeviceIds.0.3"),
    ("B.npuDeviceIds", [["0", 1, 2, 3]], "type", "B.npuDeviceIds.0.0"),
    ("B.npuDeviceIds", [], "instances"),
    ("B.npuDeviceIds", GONE, "compulsory"),
    ("B.tokenizerProcessNumber", 33, "range"),
    ("B.multiNodesInferEnabled", GONE, "compulsory"),
    ("B.multiNodesInferPort", 1025, "port-clash", "S.port"),
    ("B.multiNodesInferPort", 99999, "range"),
    ("B.interNodeTLSEnabled", GONE, "compulsory"),
    ("B.interNodeTlsCert", GONE, "inter-node-tls"),
    ("B.interNodeTlsCrlPath", GONE, "inter-node-tls"),
    ("B.interNodeTlsCaFiles", [], "inter-node-tls"),
    ("B.interNodeTlsCrlFiles", ["a"] * 4, "inter-node-tls"),
    (
        "B.layerwiseDisaggregated",
        {"layerwiseDisaggregatedMultiNodesInferEnabled": False},
        "compulsory",
        "B.layerwiseDisaggregated.layerwiseDisaggregatedMultiNodesCtrlPort",
    ),
    ("B.kvPoolConfig.backend", "redis", "choice"),
    ("B.kvPoolConfig.configPath", "x" * 501, "length"),
    # ModelDeployConfig
    ("D.maxSeqLen", 0, "range"),
    ("D.maxSeqLen", "8192", "type"),
    ("D.maxInputTokenLen", 0, "range"),
    ("D.maxInputTokenLen", 4194305, "range"),
    ("D.maxInputTokenLen", 8193, "prefill-tokens", "C.maxPrefillTokens"),
    ("D.truncation", 1, "type"),
    ("D.maxLoras", -1, "range"),
    ("D.ModelConfig", {}, "type"),
    ("D.ModelConfig", [], "one-model"),
    ("D.LoraModules", [{"name": "a", "path": "/a"}], "compulsory", "D.LoraModules.0.baseModelName"),
    (
        "D.LoraModules",
        [{"name": "a", "path": "/a", "baseModelName": "none"}],
        "lora-base",
        "D.LoraModules.0.baseModelName",
    ),
    # ModelConfig
    ("M.modelInstanceType", "Mock", "choice"),
    ("M.modelName", "", "pattern"),
    ("M.modelName", "_telechat", "pattern"),
    ("M.modelName", "tele chat", "pattern"),
    ("M.modelName", "t" * 257, "pattern"),
    ("M.modelWeightPath", "", "path"),
    ("M.modelWeightPath", "/data/模型", "path"),
    ("M.modelWeightPath", "/data/a..b", "path"),
    ("M.modelWeightPath", "/d" * 32, "path"),
    ("M.modelWeightPath", "/" + "n" * 256, "path"),
    ("M.worldSize", 0, "range"),
    ("M.worldSize", 2, "world-size", "B.npuDeviceIds.0"),
    ("M.cpuMemSize", -1, "range"),
    ("M.cpuMemSize", GONE, "compulsory"),
    ("M.npuMemSize", 0, "range"),
    ("M.npuMemSize", -2, "range"),
    ("M.npuMemSize", 8.5, "type"),
    ("M.backendType", "mindspore", "choice"),
    ("M.backendType", GONE, "compulsory"),
    ("M.trustRemoteCode", GONE, "compulsory"),
    ("M.trustRemoteCode", "false", "type"),
    ("M.dp", 0, "parallel-size"),
    ("M.sp", "two", "parallel-size"),
    ("M.cp", "1" * 5000, "parallel-size"),  # std::stoi throws
    ("M.dp", "2147483648", "parallel-size"),
    ("M.dp", "-1x", "parallel-size"),
    ("M.dp", "000000000000002", "ms-parallel"),
    ("M.cp", 2, "ms-parallel"),
    ("M.plugin_params", "{", "plugin-params"),
    ("M.plugin_params", "[]", "plugin-params"),
    ("M.plugin_params", {"level": 4}, "plugin-params"),
    ("M.plugin_params", " " * 1025, "plugin-params"),
    ("M.plugin_params", {"plugin_type": "lookahead"}, "plugin-type"),
    ("M.plugin_params", {"plugin_type": "la", "level": 2, "window": 0, "guess_set_size": 0}, "plugin-parameter"),
    ("M.plugin_params", {"plugin_type": "memory_decoding"}, "plugin-parameter"),
    (
        "M.plugin_params",
        {"plugin_type": "la", "level": 4, "window": 5, "guess_set_size": 5},
        "speculation-gamma",
        "D.speculationGamma",
    ),
    (
        "M.plugin_params",
        '{"plugin_type": "memory_decoding", "decoding_length": 16}',
        "speculation-gamma",
        "D.speculationGamma",
    ),
    ("M.plugin_params", {"plugin_type": "splitfuse"}, "splitfuse-template", "C.templateType"),
    # ScheduleConfig
    ("C.templateType", "Fused", "choice"),
    ("C.templateType", GONE, "compulsory"),
    ("C.templateName", "LLM", "choice"),
    ("C.cacheBlockSize", 0, "range"),
    ("C.cacheBlockSize", 129, "range"),
    ("C.cacheBlockSize", "128", "type"),
    ("C.maxPrefillBatchSize", 201, "prefill-batch"),
    ("C.maxPrefillBatchSize", -1, "range"),
    ("C.maxPrefillTokens", 0, "range"),
    ("C.maxPrefillTokens", 2047, "prefill-tokens"),
    ("C.prefillTimeMsPerReq", 1001, "range"),
    ("C.prefillPolicyType", 4, "range"),
    ("C.decodeTimeMsPerReq", -1, "range"),
    ("C.decodePolicyType", False, "type"),
    ("C.maxBatchSize", 0, "range"),
    ("C.maxBatchSize", 5001, "range"),
    ("C.maxBatchSize", 49, "prefill-batch", "C.maxPrefillBatchSize"),
    ("C.maxIterTimes", 0, "range"),
    ("C.maxPreemptCount", 4, "preempt-needs-cpu", "M.cpuMemSize"),
    ("C.supportSelectBatch", None, "type"),
    ("C.maxQueueDelayMicroseconds", 499, "range"),
    ("C.maxQueueDelayMicroseconds", 1000001, "range"),
    ("C.maxFirstTokenWaitTime", 3600001, "range"),
    ("C.stageSelectPolicy", 3, "range"),
    ("C.policyType", 1, "choice"),
    ("C.prefillExpectedTime", 0, "range"),
    ("C.decodeExpectedTime", 10001, "range"),
    ("C.maxNumPartialPrefills", 65, "range"),
    ("C.maxNumPartialPrefills", 4, "partial-prefills", "C.maxLongPartialPrefills"),
    ("C.longPrefillTokenThreshold", 8193, "range"),
    ("C.layerwiseDisaggregated", {"nextPHeadPrior": 1}, "type", "C.layerwiseDisaggregated.nextPHeadPrior"),
    # LogConfig
    ("L.dynamicLogLevel", GONE, "compulsory"),
    ("L.dynamicLogLevelValidTime", GONE, "compulsory"),
]

WARNED: list[tuple[str, Any, str] | tuple[str, Any, str, str]] = [
    ("$.Version", "2.0.0", "choice"),
    ("$.EnableDynamicAdjustTimeoutConfig", "true", "type"),
    ("$.EnableDynamicAdjustTimeoutConfig", GONE, "missing-key"),
    ("$.Comment", "mine", "unknown-key"),
    ("S.maxLinknum", 100, "unknown-key"),
    ("S.tlsPkPwd", "security/pass/key_pwd.txt", "unknown-key"),
    ("B.maxBatchSize", 64, "unknown-key"),
    ("B.kvPoolConfig", {"backend": "mooncake", "configPath": "pool.json"}, "ms-kv-pool", "B.kvPoolConfig.backend"),
    ("D.maxInputTokenLen", 2560, "input-length"),
    ("D.speculationGamma", "16", "type"),
    ("M.npuMemSize", -1, "ms-npu-mem"),
    ("M.modelWeightPath", "model_path", "relative-path"),
    ("M.temperature", 0.7, "truncated"),
    ("M.seed", 2**31, "truncated"),
    ("M.eos_token_id", [2, 3], "dropped"),
    ("M.note", "kept", "unknown-key"),
    ("M.pluginParams", "{}", "plugin-params-name"),
    ("M.plugin_params", {"plugin_type": "mtp", "num_speculative_tokens": 1}, "ms-mtp"),
    ("M.plugin_params", {"plugin_type": "prefix_cache", "note": "n" * 256}, "plugin-length"),
    ("D.LoraModules", [{"name": "a", "path": "/a", "baseModelName": "llama_65b"}], "ms-lora"),
    ("C.maxIterTimes", 511, "answer-room"),
    ("C.maxIterTimes", 2561, "answer-length"),
    ("C.cacheBlockSize", 100, "block-size"),
    ("C.templateType", "Mix", "mix-without-splitfuse"),
    ("C.enablePrefixCache", True, "ignored-switch"),
    ("C.enableSplit", False, "ignored-switch"),
    ("L.dynamicLogLevel", "verbose", "choice"),
    ("L.dynamicLogLevelValidHours", 169, "range"),
    ("L.dynamicLogLevelValidTime", "yesterday", "pattern"),
]


UINT32_MAX = 2**32 - 1
RANGES = {
    "S.port": (1024, 65535),
    "S.managementPort": (1024, 65535),
    "S.metricsPort": (1024, 65535),
    "S.interCommPort": (1024, 65535),
    "S.maxLinkNum": (1, 4096),
    "S.tokenTimeout": (1, 3600),
    "S.e2eTimeout": (1, 65535),
    "S.maxRequestLength": (1, 100),
    "S.HealthCheckConfig.npuUsageThreshold": (0, 100),
    "B.modelInstanceNumber": (1, 10),
    "B.npuDeviceIds.0.0": (0, 2**64 - 1),
    "B.tokenizerProcessNumber": (1, 32),
    "B.multiNodesInferPort": (1024, 65535),
    "D.maxSeqLen": (1, UINT32_MAX),
    "D.maxInputTokenLen": (1, 4194304),
    "D.maxLoras": (0, UINT32_MAX),
    "D.maxLoraRank": (0, UINT32_MAX),
    "D.speculationGamma": (0, UINT32_MAX),
    "M.worldSize": (1, 1048576),
    "M.cpuMemSize": (0, UINT32_MAX),
    "M.async_scheduler_wait_time": (1, 3600),
    "C.cacheBlockSize": (1, 128),
    "C.maxPrefillBatchSize": (0, UINT32_MAX),
    "C.maxPrefillTokens": (1, 4194304),
    "C.prefillTimeMsPerReq": (0, 1000),
    "C.prefillPolicyType": (0, 3),
    "C.decodeTimeMsPerReq": (0, 1000),
    "C.decodePolicyType": (0, 3),
    "C.maxBatchSize": (1, 5000),
    "C.maxIterTimes": (1, UINT32_MAX),
    "C.maxPreemptCount": (0, UINT32_MAX),
    "C.maxQueueDelayMicroseconds": (500, 1_000_000),
    "C.maxFirstTokenWaitTime": (0, 3_600_000),
    "C.stageSelectPolicy": (0, 2),
    "C.prefillExpectedTime": (1, 10_000),
    "C.decodeExpectedTime": (1, 10_000),
    "C.splitChunkTokens": (0, UINT32_MAX),
    "C.prefillChunkSize": (0, UINT32_MAX),
    "C.maxNumPartialPrefills": (1, 64),
    "C.maxLongPartialPrefills": (1, 64),
    "C.longPrefillTokenThreshold": (1, 8192),
    "L.dynamicLogLevelValidHours": (1, 168),
}
OLDER_RANGES = {
    ("1.0", "L.logFileSize"): (0, 500),
    ("1.0", "L.logFileNum"): (0, 64),
    ("2.0", "L.dynamicLogLevelValidHours"): (1, 168),
}


def has_range_violation(config: Config, place: str, value: int, generation: str) -> bool:
    mutate(config, place, value)
    return (path_of(place), "range") in {(v.path, v.rule) for v in schema.validate(config, generation)}


@pytest.mark.parametrize("place", RANGES)
def test_ranges_end_where_mindies_do(place: str) -> None:
    low, high = RANGES[place]
    for value, refused in ((low - 1, True), (low, False), (high, False), (high + 1, True)):
        assert has_range_violation(valid_config(), place, value, "3.0.0.beta") is refused, value


@pytest.mark.parametrize(("generation", "place"), OLDER_RANGES)
def test_ranges_of_older_generations(generation: str, place: str) -> None:
    low, high = OLDER_RANGES[generation, place]
    for value, refused in ((low - 1, True), (low, False), (high, False), (high + 1, True)):
        assert has_range_violation(schema.default_config(generation), place, value, generation) is refused, value


def only_violation(config: Config, generation: str = "3.0.0.beta") -> schema.Violation:
    before = copy.deepcopy(config)
    violations = schema.validate(config, generation)
    assert config == before, "validate changed its input"
    assert len(violations) == 1, [str(violation) for violation in violations]
    return violations[0]


@pytest.mark.parametrize("generation", schema.GENERATIONS)
def test_shipped_defaults_are_clean(generation: str) -> None:
    assert schema.validate(schema.default_config(generation), generation) == []


def test_valid_config_is_clean() -> None:
    assert schema.validate(valid_config(), "3.0.0.beta") == []


def test_refused_table_is_as_long_as_promised() -> None:
    assert len(REFUSED) >= 80
    assert len({(row[0], repr(row[1])) for row in REFUSED}) == len(REFUSED)


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: f"{row[0]}={row[1]!r:.20}")
def test_each_mutation_is_refused(row: tuple[Any, ...]) -> None:
    place, value, rule = row[:3]
    reported = row[3] if len(row) == 4 else place
    config = valid_config()
    mutate(config, place, value)
    errors = [violation for violation in schema.validate(config, "3.0.0.beta") if violation.severity == "error"]
    # One change may break several parameters of a plugin at once; all of them are of the same rule.
    assert {(violation.path, violation.rule) for violation in errors} == {(path_of(reported), rule)}
    for violation in errors:
        assert violation.expected and violation.found and violation.repair.endswith((".", '"')), violation


@pytest.mark.parametrize("row", WARNED, ids=lambda row: f"{row[0]}={row[1]!r:.20}")
def test_each_mutation_is_warned_about(row: tuple[Any, ...]) -> None:
    place, value, rule = row[:3]
    reported = row[3] if len(row) == 4 else place
    config = valid_config()
    mutate(config, place, value)
    violations = schema.validate(config, "3.0.0.beta")
    assert {violation.severity for violation in violations} == {"warning"}
    assert (path_of(reported), rule) in {(violation.path, violation.rule) for violation in violations}


def test_all_violations_come_at_once_errors_first() -> None:
    config = valid_config()
    for place, value in (("S.port", "1025"), ("S.maxLinkNum", 0), ("C.maxBatchSize", 0), ("B.unknown", 1), ("M.dp", 0)):
        mutate(config, place, value)
    violations = schema.validate(config, "3.0.0.beta")
    assert [violation.severity for violation in violations] == ["error"] * 4 + ["warning"]
    assert {violation.path for violation in violations} == {
        path_of(place) for place in ("S.port", "S.maxLinkNum", "C.maxBatchSize", "B.unknown", "M.dp")
    }


def test_a_fault_is_told_once() -> None:
    """A value that fails its own check takes no part in the rules between fields."""
    config = valid_config()
    mutate(config, "C.maxPrefillTokens", -5)  # also below maxInputTokenLen
    assert only_violation(config).rule == "range"


def test_repairs_name_the_next_step() -> None:
    def repair(place: str, value: Any) -> str:
        config = valid_config()
        mutate(config, place, value)
        return only_violation(config).repair

    assert repair("S.port", "1025") == "Write 1025 without quotes."
    assert repair("S.httpsEnabled", "False") == "Write false without quotes."
    assert repair("S.maxLinkNum", GONE) == 'Add "maxLinkNum": 1000, which is what MindIE ships.'
    assert repair("S.maxLinkNum", 9999) == "Set it to 1 to 4096."
    assert repair("S.maxLinknum", 9) == 'Write "maxLinkNum", if that was meant.'
    assert repair("B.maxBatchSize", 9) == "Move it to $.BackendConfig.ScheduleConfig.maxBatchSize."
    assert "only MindIE 1.0, 2.0, 2.1, 2.2 and 2.3 would read it" in repair("S.tlsPkPwd", "x")


class TestRulesBetweenFields:
    """Rules that more than one change shows, or that fall silent on a second one."""

    @pytest.mark.parametrize(
        ("ports", "management", "rule"),
        [
            ((1025, 1026, 1027), "127.0.0.1", None),
            ((1025, 1025, 1025), "127.0.0.1", None),
            ((1025, 1025, 1027), "127.0.0.1", None),
            ((1025, 1026, 1026), "127.0.0.1", None),
            ((1025, 1026, 1025), "127.0.0.1", "planes"),
            ((1025, 1026, 1025), "127.0.0.2", None),
            ((1025, 1025, 1025), "127.0.0.2", None),
        ],
    )
    def test_planes(self, ports: tuple[int, int, int], management: str, rule: str | None) -> None:
        config = valid_config()
        mutate(config, "S.managementIpAddress", management)
        for name, port in zip(("port", "managementPort", "metricsPort"), ports, strict=True):
            mutate(config, f"S.{name}", port)
        assert [violation.rule for violation in schema.validate(config, "3.0.0.beta")] == ([rule] if rule else [])

    def test_absent_management_address_and_port_are_the_business_ones(self) -> None:
        config = valid_config()
        mutate(config, "S.managementIpAddress", GONE)
        mutate(config, "S.managementPort", GONE)
        mutate(config, "S.metricsPort", 1025)
        for name in ("managementTlsCert", "metricsTlsPk"):  # one plane for all three: one certificate
            mutate(config, f"S.{name}", GONE)
        assert schema.validate(config, "3.0.0.beta") == []

    def test_http_needs_no_certificates(self) -> None:
        config = valid_config()
        mutate(config, "S.httpsEnabled", False)
        for name in [name for name in config["ServerConfig"] if "Tls" in name or name.startswith("tls")]:
            mutate(config, f"S.{name}", GONE)
        assert schema.validate(config, "3.0.0.beta") == []

    def test_all_zero_address_with_permission(self) -> None:
        config = valid_config()
        mutate(config, "S.ipAddress", "0.0.0.0")
        mutate(config, "S.allowAllZeroIpListening", True)
        assert schema.validate(config, "3.0.0.beta") == []

    def test_no_node_tls_needs_no_files(self) -> None:
        config = valid_config()
        mutate(config, "B.interNodeTLSEnabled", False)
        for name in [name for name in config["BackendConfig"] if name.startswith("interNodeTls")]:
            mutate(config, f"B.{name}", GONE)
        assert schema.validate(config, "3.0.0.beta") == []

    def test_dmi_ports_and_memory(self) -> None:
        config = valid_config()
        mutate(config, "S.inferMode", "dmi")
        mutate(config, "S.interCommPort", 1026)
        mutate(config, "M.npuMemSize", -1)
        assert {(violation.path, violation.rule) for violation in schema.validate(config, "3.0.0.beta")} == {
            (path_of("S.interCommPort"), "port-clash"),
            (path_of("M.npuMemSize"), "ms-npu-mem"),
        }

    def test_instances_share_no_device(self) -> None:
        config = valid_config()
        mutate(config, "B.modelInstanceNumber", 2)
        mutate(config, "B.npuDeviceIds", [[0, 1, 2, 3], [4, 5, 6, 7]])
        assert schema.validate(config, "3.0.0.beta") == []
        mutate(config, "B.npuDeviceIds", [[0, 1, 2, 3], [3, 4, 5, 6]])
        violation = only_violation(config)
        assert (violation.rule, violation.severity) == ("device-shared", "warning")

    def test_several_machines_are_one_instance(self) -> None:
        config = valid_config()
        mutate(config, "B.modelInstanceNumber", 2)
        mutate(config, "B.npuDeviceIds", [[0, 1, 2, 3], [4, 5, 6, 7]])
        mutate(config, "B.multiNodesInferEnabled", True)
        assert only_violation(config).rule == "multi-node-instances"

    def test_two_models_need_mix(self) -> None:
        config = valid_config()
        config["BackendConfig"]["ModelDeployConfig"]["ModelConfig"] *= 2
        assert only_violation(config).rule == "one-model"

    def test_preemption(self) -> None:
        config = valid_config()
        mutate(config, "M.cpuMemSize", 5)
        mutate(config, "C.maxPreemptCount", 200)
        assert schema.validate(config, "3.0.0.beta") == []
        mutate(config, "C.maxPreemptCount", 201)
        assert only_violation(config).rule == "preempt-batch"

    def test_prefill_batch_of_zero_stands_for_max_batch_size(self) -> None:
        config = valid_config()
        mutate(config, "C.maxPrefillBatchSize", 0)
        assert schema.validate(config, "3.0.0.beta") == []

    def test_mix_cuts_prompts(self) -> None:
        config = valid_config()
        mutate(config, "C.templateType", "Mix")
        mutate(config, "M.plugin_params", '{"plugin_type": "splitfuse"}')
        mutate(config, "C.maxPrefillTokens", 512)
        assert schema.validate(config, "3.0.0.beta") == []
        mutate(config, "C.splitChunkTokens", 0)
        assert only_violation(config).rule == "splitfuse-chunk"

    def test_speculation(self) -> None:
        config = valid_config()
        mutate(config, "M.plugin_params", {"plugin_type": "la", "level": 4, "window": 5, "guess_set_size": 5})
        mutate(config, "D.speculationGamma", 29)
        assert only_violation(config).expected == "at least 30 for la"
        mutate(config, "D.speculationGamma", 30)
        assert schema.validate(config, "3.0.0.beta") == []
        mutate(config, "S.HealthCheckConfig", {"npuUsageThreshold": 10})
        assert only_violation(config).rule == "speculation-health"

    def test_parameters_that_the_worker_clamps(self) -> None:
        config = valid_config()
        mutate(config, "D.speculationGamma", 17)
        mutate(config, "M.plugin_params", {"plugin_type": "memory_decoding", "decoding_length": 17})
        violation = only_violation(config)
        assert (violation.rule, violation.severity) == ("plugin-parameter", "warning")

    def test_one_speculation_at_a_time_beside_prefix_cache(self) -> None:
        config = valid_config()
        mutate(config, "D.speculationGamma", 16)
        mutate(config, "M.plugin_params", {"plugin_type": "memory_decoding, prefix_cache", "decoding_length": 16})
        assert schema.validate(config, "3.0.0.beta") == []
        both = {"plugin_type": "memory_decoding,mtp", "decoding_length": 16, "num_speculative_tokens": 1}
        mutate(config, "M.plugin_params", both)
        mutate(config, "M.backendType", "atb")
        assert only_violation(config).rule == "plugin-conflict"

    @pytest.mark.parametrize(
        "text", ["{", "[]", '{"plugin_type": 3}', '{"plugin_type": " la"}', '{"plugin_type": "la"}', " " * 1025]
    )
    def test_the_runner_refuses_what_the_rules_refuse(self, text: str) -> None:
        config = valid_config()
        mutate(config, "M.plugin_params", text)
        assert {violation.severity for violation in schema.validate(config, "3.0.0.beta")} == {"error"}
        with pytest.raises(InputError, match="plugin_params"):
            parse_plugin_params(text)

    def test_the_readmes_own_recipe_cuts_answers(self) -> None:
        """maxSeqLen 8192 and maxInputTokenLen 6144 beside the shipped maxIterTimes: answers end at 512 tokens."""
        config = valid_config()
        mutate(config, "D.maxSeqLen", 8192)
        mutate(config, "D.maxInputTokenLen", 6144)
        violation = only_violation(config)
        assert (violation.path, violation.rule) == (path_of("C.maxIterTimes"), "answer-room")
        assert violation.expected.startswith("at least 2048")

    def test_layerwise_values(self) -> None:
        config = valid_config()
        mutate(config, "S.layerwiseDisaggregated", True)
        mutate(config, "M.backendType", "atb")
        mutate(config, "S.layerwiseDisaggregatedDataPort", 80)
        mutate(config, "S.layerwiseDisaggregatedSlaveIpAddress", ["127.0.0.4", "edge"])
        assert {violation.path for violation in schema.validate(config, "3.0.0.beta")} == {
            path_of("S.layerwiseDisaggregatedRoleType"),
            path_of("S.layerwiseDisaggregatedDataPort"),
            path_of("S.layerwiseDisaggregatedSlaveIpAddress"),
        }

    def test_layerwise_is_for_atb(self) -> None:
        config = valid_config()
        mutate(config, "S.layerwiseDisaggregated", True)
        mutate(config, "S.layerwiseDisaggregatedRoleType", "master")
        violation = only_violation(config)
        assert (violation.path, violation.found) == (path_of("S.layerwiseDisaggregated"), "true beside backendType")


def test_a_violation_is_a_finding() -> None:
    """`check` passes it on as it is, under the five fields that every finding has; all its own names stay."""
    config = valid_config()
    mutate(config, "S.maxLinkNum", 9999)
    violation = only_violation(config)
    assert isinstance(violation, Finding)
    (listed,) = Report.of([violation]).as_dict()["findings"]
    assert listed == {
        "id": "range",
        "severity": "error",
        "where": "$.ServerConfig.maxLinkNum",
        "message": "expected 1 to 4096, found 9999",
        "advice": "Set it to 1 to 4096.",
    }
    own = {"path": listed["where"], "rule": "range", "expected": "1 to 4096", "found": "9999", "severity": "error"}
    assert violation.as_dict() == {**own, "repair": listed["advice"]}


def test_a_file_that_mindie_refuses_is_not_accepted() -> None:
    config = valid_config()
    mutate(config, "M.npuMemSize", -1)
    assert [violation.rule for violation in schema.accept(config, "3.0.0.beta", "here")] == ["ms-npu-mem"]
    for place in ("S.port", "S.metricsPort", "S.maxLinkNum", "C.maxBatchSize", "C.maxIterTimes", "M.worldSize"):
        mutate(config, place, 0)
    with pytest.raises(ConfigError, match=r"here: would not be accepted by MindIE 3\.0\.0\.beta.*And 1 more"):
        schema.accept(config, "3.0.0.beta", "here")


class TestGenerations:
    def test_keys_of_another_generation_are_warned_about(self) -> None:
        violations = schema.validate(schema.default_config("2.0"), "1.0")
        assert {violation.severity for violation in violations} == {"warning"}
        assert path_of("S.tokenTimeout") in {violation.path for violation in violations}

    def test_an_old_file_misses_what_the_new_one_reads_unguarded(self) -> None:
        violations = schema.validate(schema.default_config("1.0"), "3.0.0.beta")
        missing = {violation.path for violation in violations if violation.rule == "compulsory"}
        assert {path_of("S.distDPServerEnabled"), path_of("M.trustRemoteCode"), path_of("L.dynamicLogLevel")} <= missing

    def test_later_2_x_files_are_accepted(self) -> None:
        config = schema.default_config("2.0")
        config["LogConfig"] = schema.default_config("3.0.0.beta")["LogConfig"]
        mutate(config, "C.maxFirstTokenWaitTime", 2500)
        assert schema.validate(config, "2.0") == []

    def test_the_switch_of_a_plugin_is_needed_before_3_0(self) -> None:
        config = schema.default_config("2.0")
        mutate(config, "M.plugin_params", '{"plugin_type": "prefix_cache"}')
        assert only_violation(config, "2.0").rule == "plugin-switch"
        mutate(config, "C.enablePrefixCache", True)
        assert schema.validate(config, "2.0") == []

    def test_1_0_has_its_own_log_config_and_prefill_range(self) -> None:
        config = schema.default_config("1.0")
        mutate(config, "L.logFileSize", 501)
        mutate(config, "C.maxPrefillTokens", 4096)
        found = {(violation.path, violation.rule) for violation in schema.validate(config, "1.0")}
        assert found == {(path_of("L.logFileSize"), "range"), (path_of("C.maxPrefillTokens"), "documented-range")}

    def test_1_0_rc3_without_the_all_zero_switch(self) -> None:
        config = schema.default_config("1.0")
        mutate(config, "S.allowAllZeroIpListening", GONE)
        mutate(config, "S.ipAddress", "0.0.0.0")
        assert only_violation(config, "1.0").severity == "warning"

    @pytest.mark.parametrize("generation", ["2.0", "2.1", "2.2", "2.3"])
    def test_a_file_of_2_0_rc1_is_refused_by_none_of_2_x(self, generation: str) -> None:
        """It has neither time limits nor distDPServerEnabled, which later releases ship."""
        config = schema.default_config("2.0")
        for name in ("tokenTimeout", "e2eTimeout", "distDPServerEnabled"):
            mutate(config, f"S.{name}", GONE)
        mutate(config, "S.httpsEnabled", False)  # 2.3 asks for certificates of the metrics plane as well
        for name in ("async_scheduler_wait_time", "kv_trans_timeout", "kv_link_timeout"):
            mutate(config, f"M.{name}", GONE)
        violations = schema.validate(config, generation)
        assert {violation.severity for violation in violations} <= {"warning"}
        names = {"tokenTimeout", "e2eTimeout", "distDPServerEnabled"} if generation != "2.0" else set()
        names |= {"EnableDynamicAdjustTimeoutConfig"} if generation == "2.3" else set()
        assert {violation.path.rpartition(".")[2] for violation in violations} == names

    def test_what_2_3_complains_of_is_in_its_file(self) -> None:
        for generation in ("2.3", "3.0.0.beta", "3.0"):
            config = schema.default_config(generation)
            assert config["EnableDynamicAdjustTimeoutConfig"] is False
            mutate(config, "$.EnableDynamicAdjustTimeoutConfig", GONE)
            assert only_violation(config, generation).rule == "missing-key"
        assert "EnableDynamicAdjustTimeoutConfig" not in schema.default_config("2.0")

    def test_a_public_file_of_late_2_x(self) -> None:
        """Key passwords, certificates for the metrics, the later fields of the schedule, and a key of its author's: as
        generated by public deployment tools for MindIE 2.x."""
        config = schema.default_config("2.3")
        mutate(config, "S.e2eTimeout", 65535)
        mutate(config, "M.models", {"deepseekv2": {"tool_call_options": {"tool_call_parser": "deepseek_v31"}}})
        for name, value in (
            ("bufferResponseEnabled", False),
            ("decodeExpectedTime", 50),
            ("prefillExpectedTime", 1500),
        ):
            mutate(config, f"C.{name}", value)
        mutate(config, "$.enable_ep_moe", False)
        for generation in ("2.1", "2.2", "2.3"):
            assert only_violation(config, generation).rule == "unknown-key"

    def test_a_public_file_between_1_0_and_2_0(self) -> None:
        """Lists of revocation files and no time limits beside 1.0's LogConfig."""
        config = schema.default_config("2.0")
        for name in ("tokenTimeout", "e2eTimeout", "distDPServerEnabled"):
            mutate(config, f"S.{name}", GONE)
        config["LogConfig"] = schema.default_config("1.0")["LogConfig"]
        for generation in ("1.0", "2.0"):
            assert not [v for v in schema.validate(config, generation) if v.severity == "error"]

    def test_what_only_the_public_code_tells_is_a_warning_elsewhere(self) -> None:
        faults = {
            "S.managementIpAddress": "127.0.0.1",  # planes, with the next
            "S.metricsPort": 1025,
            "S.maxRequestLength": "40",  # a field that 2.0 does not ship
            "M.modelWeightPath": "/data/模型",
            "B.interNodeTlsCrlPath": GONE,
        }
        for generation, severity in (("3.0.0.beta", "error"), ("3.0", "error"), ("2.3", "warning"), ("2.0", "warning")):
            config = schema.default_config(generation)
            for place, value in faults.items():
                mutate(config, place, value)
            found = {violation.rule: violation for violation in schema.validate(config, generation)}
            assert found.keys() == {"planes", "type", "path", "inter-node-tls"}, generation
            assert {violation.severity for violation in found.values()} == {severity}, generation
        assert "of 2.0 it is not known" in found["path"].message
        for generation, severity in (("2.2", "warning"), ("2.3", "error")):  # 2.2's own file is not known
            config = schema.default_config(generation)
            mutate(config, "S.metricsTlsPk", 1)
            assert only_violation(config, generation).severity == severity
        config = schema.default_config("2.0")
        mutate(config, "S.port", 80)  # documented there as well
        assert only_violation(config, "2.0").severity == "error"

    @pytest.mark.parametrize("generation", schema.GENERATIONS)
    def test_the_layout_of_1_0_rc1_is_named_as_such(self, generation: str) -> None:
        config = {
            "OtherParam": {"ResourceParam": {"cacheBlockSize": 128}, "ServeParam": {"port": 1025}},
            "WorkFlowParam": {"TemplateParam": {"templateType": "Standard"}},
            "ModelDeployParam": {"maxSeqLen": 2560},
            "ScheduleParam": {"maxBatchSize": 200},
        }
        violation = only_violation(config, generation)
        assert (violation.rule, violation.severity) == ("layout", "error")
        assert "1.0.RC1 or 1.0.RC2" in str(violation) and "service-config" in violation.repair

    def test_3_0_has_no_mindspore_backend(self) -> None:
        config = schema.default_config("3.0")
        mutate(config, "M.npuMemSize", 8)
        mutate(config, "M.backendType", "ms")
        violation = only_violation(config, "3.0")
        assert (violation.path, violation.rule, violation.severity) == (
            path_of("M.backendType"),
            "ms-backend",
            "error",
        )
        assert "no MindSpore backend" in violation.repair and "telechat-mindie serve" in violation.repair
        assert "3.0.0.beta.2 or older" in violation.repair
        mutate(config, "M.backendType", "torch")
        assert schema.validate(config, "3.0") == []

    @pytest.mark.parametrize(
        ("place", "taken", "refused", "rule"),
        [
            ("C.maxN", [1, 200], [0, 8193, 201], {"range", "answers-batch"}),
            ("C.maxBatchSize", [128, 819_200], [819_201], {"range"}),
            ("S.maxJsonDepth", [10, 100], [9, 101, "10"], {"range", "type"}),
            ("B.kvPoolConfig.asyncWrite", [True], [1], {"type"}),
            ("D.truncation", [True, False, -1, 0, 1], [], set()),
        ],
    )
    def test_the_fields_of_3_0(self, place: str, taken: list[Any], refused: list[Any], rule: set[str]) -> None:
        for value in taken:
            config = schema.default_config("3.0")
            mutate(config, place, value)
            assert schema.validate(config, "3.0") == [], value
            older = {violation.rule for violation in schema.validate(config, "3.0.0.beta")}
            assert place in ("C.maxBatchSize", "D.truncation") or "unknown-key" in older
        for value in refused:
            config = schema.default_config("3.0")
            mutate(config, place, value)
            found = only_violation(config, "3.0")
            assert found.rule in rule and found.severity == "error"

    def test_an_odd_truncation_of_3_0_is_passed_over(self) -> None:
        config = schema.default_config("3.0")
        mutate(config, "D.truncation", "left")
        assert only_violation(config, "3.0").severity == "warning"
        mutate(config, "C.maxBatchSize", 100)  # below the 128 that maxN is where absent, which MindIE lowers itself
        mutate(config, "D.truncation", 0)
        assert schema.validate(config, "3.0") == []

    @pytest.mark.parametrize(
        ("version", "generation"),
        [
            ("1.0.RC3", "1.0"),
            ("1.0.0", "1.0"),
            ("2.0.RC1", "2.0"),
            ("2.1.rc2", "2.1"),
            ("2.2.RC1", "2.2"),
            ("2.3.0", "2.3"),
            ("3.0.0.beta.1", "3.0.0.beta"),
            ("3.0.0b2", "3.0.0.beta"),
            ("3.0.0.beta.3", "3.0"),
            ("3.0.0", "3.0"),
            ("4.1", "3.0"),
            ("unknown", None),
            (None, None),
        ],
    )
    def test_an_installed_version_belongs_to_one(self, version: str | None, generation: str | None) -> None:
        assert generation_of(version) == generation

    def test_unknown_generation(self) -> None:
        for call in (schema.default_config, schema.json_schema, lambda name: schema.validate({}, name)):
            with pytest.raises(InputError, match=r"4\.0.*expected 1\.0, 2\.0, .* or 3\.0\)"):
                call("4.0")


class TestFiles:
    def test_load_keeps_order_and_content(self, tmp_path: Path) -> None:
        path = tmp_path / "config.json"
        path.write_text(json.dumps({"b": 1, "a": {"z": [1, 2], "y": "文"}}, ensure_ascii=False), encoding="utf-8")
        assert list(schema.load(path)) == ["b", "a"]
        assert schema.load(path)["a"] == {"z": [1, 2], "y": "文"}

    def test_a_byte_order_mark_is_skipped(self, tmp_path: Path) -> None:
        path = tmp_path / "config.json"
        path.write_bytes(b"\xef\xbb\xbf{}")
        assert schema.load(path) == {}

    @pytest.mark.parametrize(
        ("content", "sentence"),
        [
            (b"", "not valid JSON"),
            (b'{"a": 1}' + b" " * (10 * 1024 * 1024), "too large.*10485760 bytes"),
            (b"[1]", "no JSON object"),
            (b"{'a': 1}", r"config\.json:1:2: is not valid JSON.*no comments"),
            (b'{"a": {"b": 1, "b": 2}}', "key 'b' stands twice"),
            (b'{"a": "\xff"}', "is not UTF-8"),
            (b'{"a": ["x\\ud800"]}', r"\\ud800 is half of a character"),
            (b'{"\\udfff": 1}', r"\\udfff is half of a character"),
            (b'{"a":' + b"[" * 32 + b"]" * 32 + b"}", "nested too deeply.*at most 32"),
        ],
    )
    def test_bad_files_give_sentences(self, tmp_path: Path, content: bytes, sentence: str) -> None:
        """`reading` has the rest."""
        path = tmp_path / "config.json"
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=sentence):
            schema.load(path)

    def test_an_absent_file(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="missing"):
            schema.load(tmp_path / "none.json")


class TestJsonSchema:
    @pytest.mark.parametrize("generation", schema.GENERATIONS)
    def test_it_is_plain_json_and_names_every_shipped_key(self, generation: str) -> None:
        described = schema.json_schema(generation)
        assert json.loads(json.dumps(described)) == described

        def resolve(node: dict[str, Any]) -> dict[str, Any]:
            return described["$defs"][node["$ref"].rpartition("/")[2]] if "$ref" in node else node

        def check(node: dict[str, Any], value: Any, path: str) -> None:
            node = resolve(node)
            if isinstance(value, dict) and "properties" in node:
                assert set(value) <= set(node["properties"]), path
                assert set(node.get("required", ())) <= set(value), path
                for name, item in value.items():
                    check(node["properties"][name], item, f"{path}.{name}")
            elif isinstance(value, list) and "items" in node:
                for item in value:
                    check(node["items"], item, f"{path}[]")

        check(described, schema.default_config(generation), "$")

    def test_ranges_and_choices_reach_the_editor(self) -> None:
        definitions = schema.json_schema("3.0.0.beta")["$defs"]
        assert definitions["ScheduleConfig"]["properties"]["maxBatchSize"] == {
            "description": "requests of a decode batch",
            "maximum": 5000,
            "minimum": 1,
            "title": "Maxbatchsize",
            "type": "integer",
        }
        assert definitions["ModelConfig"]["properties"]["backendType"]["enum"] == ["atb", "ms", "torch"]


def test_importable_on_its_own() -> None:
    """The schema pulls in no framework, no numpy and no template engine."""
    code = (
        "import sys; from telechat_mindie.service import schema;"
        "print([m for m in ('mindspore', 'numpy', 'jinja2', 'yaml', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
OBJECTS = (("S", "ServerConfig"), ("B", "BackendConfig"))
PLACES_OF_A_VALUE = [f"{head}.{name}" for head, node in OBJECTS for name in schema.default_config("3.0.0.beta")[node]]
PLACES_OF_A_VALUE += ["D.ModelConfig", "D.LoraModules", "M.plugin_params", "M.dp", "M.models", "C.maxPreemptCount"]


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(st.sampled_from(PLACES_OF_A_VALUE), json_values, max_size=3), st.sampled_from(schema.GENERATIONS)
)
def test_no_json_makes_it_stumble(changes: dict[str, Any], generation: str) -> None:
    config = valid_config()
    for place, value in changes.items():
        try:
            mutate(config, place, value)
        except (TypeError, AttributeError, IndexError, KeyError):
            continue  # an earlier change took the parent away
    for violation in schema.validate(config, generation):
        assert violation.path.startswith("$") and violation.repair
