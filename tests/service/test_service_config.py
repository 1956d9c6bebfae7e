"""`service-config` as a library: derived values, rendering, patching, and the account that is given of them."""

from __future__ import annotations

import copy
import json
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from telechat_mindie.errors import ConfigError, InputError
from telechat_mindie.mindie import GENERATIONS
from telechat_mindie.service import ports, schema
from telechat_mindie.service.explain import Explained, explain
from telechat_mindie.service.options import ModelFacts, ServiceOptions, parse_devices
from telechat_mindie.service.overrides import parse_override, set_value
from telechat_mindie.service.patch import patch
from telechat_mindie.service.render import RenderedConfig, render_service_config
from telechat_mindie.units import GB

# TeleChat2-7B in 16 bits on one card: 30 layers, 32 KV heads of 128, hence 2 * 30 * 32 * 128 * 2 bytes a token.
FACTS_7B = ModelFacts(
    model_name="TeleChat2-7B",
    model_path="/models/telechat2-7b",
    tp=1,
    max_seq_len=8192,
    block_size=128,
    weight_bytes_per_rank=15_230_000_000,
    kv_bytes_per_token_per_rank=491_520,
    vocab_size=131_072,
)
FACTS_115B = replace(
    FACTS_7B,
    model_name="TeleChat2-115B",
    model_path="/models/telechat2-115b",
    tp=8,
    weight_bytes_per_rank=29_000_000_000,
    kv_bytes_per_token_per_rank=49_152,
)


SERVING = [name for name in schema.GENERATIONS if GENERATIONS[name].ms_backend]


def all_free(port: int) -> bool:
    return True


def render(facts: ModelFacts = FACTS_7B, is_free: ports.IsFree = all_free, **options: Any) -> RenderedConfig:
    return render_service_config(facts, ServiceOptions(**options), is_free)


def parts(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]:
    """ServerConfig, BackendConfig, the ModelConfig entry and ScheduleConfig."""
    backend = config["BackendConfig"]
    return config["ServerConfig"], backend, backend["ModelDeployConfig"]["ModelConfig"][0], backend["ScheduleConfig"]


def rows(rendered: RenderedConfig) -> dict[str, Explained]:
    """The explanation by the last key of each path."""
    return {row.path.rpartition(".")[2]: row for row in explain(rendered)}


@pytest.fixture(scope="module")
def readme_example() -> RenderedConfig:
    return render(
        devices="0",
        max_seq_len=8192,
        max_input_len=6144,
        insecure_http=True,
        overrides=("ModelConfig.npuMemSize=8",),
    )


class TestReadmeExample:
    """The service example of TeleChat2's own README: one card, 8192 tokens of which 6144 prompt, 8 GB, no HTTPS."""

    def test_values(self, readme_example: RenderedConfig) -> None:
        server, backend, model, _ = parts(readme_example.config)
        deploy = backend["ModelDeployConfig"]
        assert (model["worldSize"], backend["npuDeviceIds"], model["backendType"]) == (1, [[0]], "ms")
        assert (deploy["maxSeqLen"], deploy["maxInputTokenLen"]) == (8192, 6144)
        assert (model["npuMemSize"], server["httpsEnabled"]) == (8, False)
        assert model["modelWeightPath"] == "/models/telechat2-7b"
        assert readme_example.warnings == ()
        assert readme_example.certificates == ()

    def test_answers_are_not_cut_at_the_shipped_512_tokens(self, readme_example: RenderedConfig) -> None:
        assert parts(readme_example.config)[3]["maxIterTimes"] == 8191

    def test_it_differs_from_the_shipped_file_only_in_derived_fields(self, readme_example: RenderedConfig) -> None:
        restored = copy.deepcopy(readme_example.config)
        shipped = schema.default_config("3.0.0.beta")
        for entry in readme_example.derived:
            value: Any = shipped
            for step in entry.location:
                value = value[step]
            set_value(restored, entry.location, value)
        assert json.dumps(restored) == json.dumps(shipped)

    def test_explain_accounts_for_every_difference(self, readme_example: RenderedConfig) -> None:
        explained = explain(readme_example)
        changed = {row.path.rpartition(".")[2]: row.origin for row in explained if row.changed}
        assert changed == {
            "httpsEnabled": "flag",
            "npuDeviceIds": "flag",
            "maxSeqLen": "flag",
            "maxInputTokenLen": "flag",
            "modelName": "checkpoint",
            "modelWeightPath": "flag",
            "worldSize": "checkpoint",
            "npuMemSize": "flag",
            "backendType": "checkpoint",
            "maxPrefillBatchSize": "computed",
            "maxBatchSize": "computed",
            "maxIterTimes": "computed",
        }
        assert all(row.reason for row in explained if row.origin != "MindIE default")

    def test_explain_covers_the_whole_file(self, readme_example: RenderedConfig) -> None:
        def count(value: Any) -> int:
            if isinstance(value, dict) and value:
                return sum(map(count, value.values()))
            if isinstance(value, list) and any(isinstance(item, dict) for item in value):
                return sum(map(count, value))
            return 1

        explained = explain(readme_example)
        assert len(explained) == len({row.path for row in explained}) == count(readme_example.config)

    def test_text_is_laid_out_as_the_shipped_file(self, readme_example: RenderedConfig) -> None:
        assert json.loads(readme_example.text) == readme_example.config
        assert '\n        "npuDeviceIds": [[0]],\n' in readme_example.text
        assert list(readme_example.config) == list(schema.default_config("3.0.0.beta"))
        assert readme_example.text.endswith("}\n")


@pytest.mark.parametrize("generation", SERVING)
@pytest.mark.parametrize("facts", [FACTS_7B, FACTS_115B], ids=["7B", "115B"])
def test_every_generation_renders_without_a_warning(generation: str, facts: ModelFacts) -> None:
    rendered = render(facts, generation=generation)
    assert rendered.warnings == ()
    assert list(rendered.config) == list(schema.default_config(generation))
    assert parts(rendered.config)[0]["httpsEnabled"] is True


class TestDevices:
    @pytest.mark.parametrize(
        ("text", "devices"),
        [("0", (0,)), ("0-3", (0, 1, 2, 3)), ("4,6-7", (4, 6, 7)), (" 1 , 0", (1, 0)), ("7-7", (7,))],
    )
    def test_lists_and_ranges(self, text: str, devices: tuple[int, ...]) -> None:
        assert parse_devices(text) == devices

    @pytest.mark.parametrize("text", ["", "a", "0-", "-1", "3-0", "0,0", "0-2,1", "0--1", "1.5", "٣", "0-999999999"])
    def test_anything_else_is_refused(self, text: str) -> None:
        with pytest.raises(InputError, match="--devices"):
            parse_devices(text)

    def test_world_size_devices_and_instances_agree(self) -> None:
        _, backend, model, _ = parts(render(FACTS_115B, devices="0-15", instances=2).config)
        assert backend["npuDeviceIds"] == [list(range(8)), list(range(8, 16))]
        assert (backend["modelInstanceNumber"], model["worldSize"]) == (2, 8)

    def test_the_first_devices_are_taken_by_default(self) -> None:
        rendered = render(FACTS_115B, instances=2)
        assert parts(rendered.config)[1]["npuDeviceIds"] == [list(range(8)), list(range(8, 16))]
        assert rows(rendered)["npuDeviceIds"].origin == "computed"

    def test_too_many_devices_name_the_instances(self) -> None:
        with pytest.raises(InputError, match=r"expected 8 devices: tp 8.*found 16.*--instances 2"):
            render(FACTS_115B, devices="0-15")

    def test_too_few_devices(self) -> None:
        with pytest.raises(InputError, match=r"expected 8 devices.*found 4.*another tp"):
            render(FACTS_115B, devices="0-3")

    @pytest.mark.parametrize("instances", [0, 11])
    def test_instances_are_bounded(self, instances: int) -> None:
        with pytest.raises(InputError, match="--instances"):
            render(instances=instances)


class TestLengths:
    def test_from_the_model_directory(self) -> None:
        rendered = render(replace(FACTS_7B, max_seq_len=32768))
        deploy, schedule = rendered.config["BackendConfig"]["ModelDeployConfig"], parts(rendered.config)[3]
        assert (deploy["maxSeqLen"], deploy["maxInputTokenLen"]) == (32768, 24576)
        assert (schedule["maxPrefillTokens"], schedule["maxIterTimes"]) == (32768, 32767)
        assert rows(rendered)["maxSeqLen"].origin == "checkpoint"

    def test_short_ones_keep_the_shipped_prefill(self) -> None:
        rendered = render(max_seq_len=2048)
        assert parts(rendered.config)[3]["maxPrefillTokens"] == 8192
        assert rendered.config["BackendConfig"]["ModelDeployConfig"]["maxInputTokenLen"] == 1536

    def test_what_is_set_by_hand_carries_on(self) -> None:
        """A maxSeqLen from --set is the one that the other lengths are derived from."""
        rendered = render(overrides=("maxSeqLen=4096",))
        assert rendered.config["BackendConfig"]["ModelDeployConfig"]["maxInputTokenLen"] == 3072
        assert parts(rendered.config)[3]["maxIterTimes"] == 4095

    @pytest.mark.parametrize("length", [1, 8193])
    def test_beyond_the_model_is_refused(self, length: int) -> None:
        with pytest.raises(InputError, match="expected 2 to 8192"):
            render(max_seq_len=length)

    def test_a_prompt_needs_room_for_an_answer(self) -> None:
        with pytest.raises(InputError, match="expected 1 to 4095"):
            render(max_seq_len=4096, max_input_len=4096)


class TestMemory:
    def test_what_a_card_has_left(self) -> None:
        rendered = render()
        # 64 - 12.8 - 15.23e9/2^30 - 200*131072*4/2^30 = 36.9 GB; 36 GB hold 614 blocks, one of which is kept.
        assert parts(rendered.config)[2]["npuMemSize"] == 36
        assert rows(rendered)["npuMemSize"].reason == "64 GB card - 12.8 reserve - 14.2 weights - 0.1 logits"
        assert 36 * GB // (491_520 * 128) - 1 == 613
        assert rows(rendered)["maxBatchSize"].value == 613 // 8
        assert rows(rendered)["maxPrefillBatchSize"].value == 50

    def test_a_card_of_32_gb_and_a_stated_reserve(self) -> None:
        assert parts(render(device_mem_gb=32, reserve_gb=4).config)[2]["npuMemSize"] == 13

    def test_batches_for_longer_requests(self) -> None:
        schedule = parts(render(request_tokens=8192).config)[3]
        assert (schedule["maxBatchSize"], schedule["maxPrefillBatchSize"]) == (613 // 64, 613 // 64)

    def test_batches_stay_at_what_mindie_ships(self) -> None:
        schedule = parts(render(FACTS_115B, request_tokens=128).config)[3]
        assert (schedule["maxBatchSize"], schedule["maxPrefillBatchSize"]) == (200, 50)

    def test_minus_one_where_the_runner_sizes_the_cache(self) -> None:
        rendered = render(dynamic_kv=True)
        assert parts(rendered.config)[2]["npuMemSize"] == -1
        assert [violation.rule for violation in rendered.warnings] == ["ms-npu-mem"]
        assert rows(rendered)["maxBatchSize"].value == 628 // 8  # of the whole 36.9 GB

    def test_weights_that_do_not_fit_are_refused_with_the_numbers(self) -> None:
        with pytest.raises(
            InputError, match=r"expected 64 KV blocks of 128 tokens \(3\.8 GB\).*found 0 in.*larger --tp"
        ):
            render(device_mem_gb=16)

    def test_a_cache_beyond_the_card_is_refused(self) -> None:
        with pytest.raises(
            InputError, match=r"npuMemSize 51: is more than .* beside the weights .expected at most 49\.8 GB"
        ):
            render(overrides=("npuMemSize=51",))

    def test_a_cache_that_is_set_too_small_asks_for_no_larger_card(self) -> None:
        with pytest.raises(InputError, match=r"hence an npuMemSize of at least \d+,"):
            render(overrides=("npuMemSize=1",))

    @pytest.mark.parametrize(
        "options",
        [
            {"device_mem_gb": 0},
            {"device_mem_gb": float("nan")},
            {"device_mem_gb": float("inf")},
            {"reserve_gb": -1},
            {"reserve_gb": 64},
            {"request_tokens": 0},
        ],
    )
    def test_senseless_sizes(self, options: dict[str, Any]) -> None:
        with pytest.raises(InputError, match="must be positive"):
            render(**options)


class TestPorts:
    def test_the_next_three_free_in_a_row(self) -> None:
        rendered = render(port_base=2000, is_free=lambda port: port not in (2001, 2004))
        server = parts(rendered.config)[0]
        assert (server["port"], server["managementPort"], server["metricsPort"]) == (2005, 2006, 2007)
        assert rows(rendered)["port"].origin == "computed"
        assert "free ports from 2000 on" in rows(rendered)["port"].reason

    def test_a_free_base_is_taken_as_it_is(self) -> None:
        rendered = render(port_base=2000)
        assert rows(rendered)["metricsPort"].value == 2002
        assert rows(rendered)["metricsPort"].origin == "flag"

    def test_ports_of_the_same_file_are_avoided(self) -> None:
        assert parts(render(port_base=1118).config)[0]["port"] == 1122  # 1120 and 1121 are MindIE's own

    def test_shipped_ports_are_left_where_they_are_free(self) -> None:
        assert rows(render())["port"].origin == "MindIE default"
        assert parts(render(is_free=lambda port: port != 1026).config)[0]["port"] == 1027

    @pytest.mark.parametrize(("base", "free"), [(1023, all_free), (65536, all_free), (65534, all_free)])
    def test_no_room(self, base: int, free: ports.IsFree) -> None:
        with pytest.raises(InputError, match=f"--port-base {base}"):
            render(port_base=base, is_free=free)

    def test_a_listener_on_any_address_takes_the_port(self) -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            port = listener.getsockname()[1]
            assert not ports.is_free(port)
        assert ports.is_free(port)


class TestWhereASettingCounts:
    """LogConfig is read from the conf/config.json of MindIE's home alone."""

    @pytest.mark.parametrize("override", ["LogConfig.dynamicLogLevel=debug", "EnableDynamicAdjustTimeoutConfig=true"])
    def test_a_warning_names_the_place(self, override: str) -> None:
        (warning,) = render(overrides=(override,)).warnings
        assert warning.rule == "other-file" and "MindIE's home" in warning.expected and "launch" in warning.repair
        assert render(overrides=(override,), generation="2.3").warnings == ()  # closed: not known


class TestCertificates:
    def test_named_and_looked_up(self, tmp_path: Path) -> None:
        (tmp_path / "security/ca").mkdir(parents=True)
        (tmp_path / "security/ca/ca.pem").write_text("x")
        certificates = {entry.file: entry for entry in render(mindie_home=tmp_path).certificates}
        assert len(certificates) == 12
        assert {entry.file for entry in certificates.values() if entry.is_revocation} == {
            *("security/certs/server_crl.pem", "security/management/certs/server_crl.pem"),
            "security/metrics/certs/server_crl.pem",
        }
        assert certificates["security/ca/ca.pem"].present is True
        assert certificates["security/keys/server.key.pem"].present is False
        assert certificates["security/ca/metrics_ca.pem"].path == "$.ServerConfig.metricsTlsCaFile"

    def test_unknown_home_leaves_it_open(self) -> None:
        assert {entry.present for entry in render(generation="1.0").certificates} == {None}

    def test_one_plane_needs_one_set(self) -> None:
        merged = ("ServerConfig.managementIpAddress=127.0.0.1", "managementPort=1025", "metricsPort=1025")
        assert [entry.path.rpartition(".")[2] for entry in render(overrides=merged).certificates] == [
            "tlsCert",
            "tlsPk",
            "tlsCaFile",
            "tlsCrlFiles",
        ]


class TestOverrides:
    @pytest.mark.parametrize(
        ("text", "path", "value"),
        [
            ("maxBatchSize=64", "$.BackendConfig.ScheduleConfig.maxBatchSize", 64),
            ("ScheduleConfig.maxBatchSize=64", "$.BackendConfig.ScheduleConfig.maxBatchSize", 64),
            ("$.BackendConfig.ScheduleConfig.maxBatchSize=64", "$.BackendConfig.ScheduleConfig.maxBatchSize", 64),
            ("modelName=7", "$.BackendConfig.ModelDeployConfig.ModelConfig[0].modelName", "7"),
            ("inferMode=dmi", "$.ServerConfig.inferMode", "dmi"),
            ('tlsCaFile=["a.pem"]', "$.ServerConfig.tlsCaFile", ["a.pem"]),
            ("truncation=true", "$.BackendConfig.ModelDeployConfig.truncation", True),
            ("ModelConfig.note=a=b", "$.BackendConfig.ModelDeployConfig.ModelConfig[0].note", "a=b"),
            ("kvPoolConfig.backend=mooncake", "$.BackendConfig.kvPoolConfig.backend", "mooncake"),
            ("nextPHeadPrior=true", "$.BackendConfig.ScheduleConfig.layerwiseDisaggregated.nextPHeadPrior", True),
            (
                'plugin_params={"plugin_type": "prefix_cache"}',
                "$.BackendConfig.ModelDeployConfig.ModelConfig[0].plugin_params",
                '{"plugin_type": "prefix_cache"}',
            ),
        ],
    )
    def test_path_and_value(self, text: str, path: str, value: Any) -> None:
        location, parsed = parse_override(text, "3.0.0.beta")
        assert (schema.json_path(location), parsed) == (path, value)

    @pytest.mark.parametrize(
        ("text", "sentence"),
        [
            ("maxBatchSize", "not PATH=VALUE"),
            ("=64", "not PATH=VALUE"),
            ("maxBatchsize=64", "Did you mean maxBatchSize"),
            ("ServerConfig.maxBatchSize=64", "Did you mean maxBatchSize"),
            ("layerwiseDisaggregated=true", "means several fields.*ServerConfig.*ScheduleConfig"),
            ("maxBatchSize=many", 'expected an integer, found "many"'),
            ("maxBatchSize=0", "expected 1 to 5000, found 0"),
            ("LoraModules.path=/a", "is no field"),
            ("maxBatchSize=" + "[" * 50_000, "nested too deeply"),
            ("ModelConfig.note=" + "[" * 960 + "]" * 960, "nested too deeply"),
            ("tlsPkPwd=x", r"no field of MindIE 3\.0\.0\.beta"),
        ],
    )
    def test_refused(self, text: str, sentence: str) -> None:
        with pytest.raises(InputError, match=sentence):
            parse_override(text, "3.0.0.beta")

    def test_they_win_over_every_other_source(self) -> None:
        rendered = render(port_base=2000, overrides=("ServerConfig.port=3000", "worldSize=1", "maxLinkNum=300"))
        server = parts(rendered.config)[0]
        assert (server["port"], server["managementPort"], server["maxLinkNum"]) == (3000, 2001, 300)
        assert {rows(rendered)[name].origin for name in ("port", "worldSize", "maxLinkNum")} == {"flag"}

    def test_objects_on_the_way_are_made(self) -> None:
        rendered = render(overrides=("nextPHeadPrior=false",))
        assert parts(rendered.config)[3]["layerwiseDisaggregated"] == {"nextPHeadPrior": False}

    def test_what_mindie_would_refuse_is_not_returned(self) -> None:
        with pytest.raises(ConfigError, match=r"not be accepted by MindIE 3\.0\.0\.beta.*preempt-needs-cpu"):
            render(overrides=("maxPreemptCount=4",))

    def test_text_is_data_never_a_template(self) -> None:
        rendered = render(overrides=('openAiSupport={{ 7 * 7 }}"',))
        assert parts(rendered.config)[0]["openAiSupport"] == '{{ 7 * 7 }}"'


TEMPLATE = """\
{
\t"Version" : "1.0.0",

\t"ServerConfig" : { "ipAddress" : "10.0.0.5", "allowAllZeroIpListening" : false, "inferMode":"standard",
\t\t"port" : 8000, "managementPort" : 8001, "metricsPort" : 8002, "maxLinkNum" : 300,
\t\t"httpsEnabled" : false, "tokenTimeout":600, "e2eTimeout":600, "distDPServerEnabled":false,
\t\t"team" : "inference \\u00e9 }{][ \\"quoted\\"" },
\t"BackendConfig":{
\t\t"backendName" : "mindieservice_llm_engine",
\t\t"modelInstanceNumber" : 1, "npuDeviceIds" : [ [0,1,
\t\t\t2,3] ], "tokenizerProcessNumber" : 16,
\t\t"multiNodesInferEnabled" : false, "interNodeTLSEnabled" : false,
\t\t"ModelDeployConfig" : { "maxSeqLen" : 2560, "maxInputTokenLen" : 2048, "ModelConfig" : [ {
\t\t\t"modelName" : "old", "modelWeightPath" : "/old", "worldSize" : 4, "cpuMemSize" : 0,
\t\t\t"backendType" : "atb", "trustRemoteCode" : false, "note" : 1e3, "npuMemSize" : -1
\t\t\t} ] },
\t\t"ScheduleConfig" : { "templateType" : "Standard", "templateName" : "Standard_LLM", "maxPreemptCount" : 0,
\t\t\t"maxPrefillBatchSize" : 50, "maxPrefillTokens" : 8192, "prefillTimeMsPerReq" : 150,
\t\t\t"prefillPolicyType" : 0, "decodeTimeMsPerReq" : 50, "decodePolicyType" : 0, "maxBatchSize" : 200,

\t\t\t"maxIterTimes" : 512, "supportSelectBatch" : false, "maxQueueDelayMicroseconds" : 5000
\t\t}
\t},
\t"EnableDynamicAdjustTimeoutConfig":false
}
"""


class TestTemplate:
    @pytest.fixture
    def template(self, tmp_path: Path) -> Path:
        path = tmp_path / "config.json"
        path.write_text(TEMPLATE, encoding="utf-8")
        return path

    def test_a_key_that_mindie_misses_is_written(self, template: Path) -> None:
        """2.3 and later complain of it each second."""
        text = template.read_text(encoding="utf-8").replace(',\n\t"EnableDynamicAdjustTimeoutConfig":false', "")
        template.write_text(text, encoding="utf-8")
        for generation, is_missed in (("2.0", False), ("2.3", True), ("3.0.0.beta", True)):
            config = render(template=template, insecure_http=True, generation=generation).config
            assert config.get("EnableDynamicAdjustTimeoutConfig") == (False if is_missed else None), generation

    def test_a_template_of_1_0_rc1(self, tmp_path: Path) -> None:
        path = tmp_path / "old.json"
        path.write_text('{"OtherParam": {"ServeParam": {"port": 1025}}, "ModelDeployParam": {"maxSeqLen": 2560}}')
        with pytest.raises(ConfigError, match=r"1\.0\.RC1 or 1\.0\.RC2.*service-config MODEL_PATH"):
            render(template=path, generation="1.0")

    def test_3_0_cannot_serve_the_directory(self) -> None:
        with pytest.raises(ConfigError, match=r"no MindSpore backend.*telechat-mindie serve"):
            render(generation="3.0", insecure_http=True)

    def test_nothing_else_changes(self, template: Path) -> None:
        text = render(template=template, overrides=("ModelConfig.npuMemSize=8",)).text
        expected = (
            TEMPLATE.replace("[ [0,1,\n\t\t\t2,3] ]", "[[0]]")
            .replace('"maxSeqLen" : 2560, "maxInputTokenLen" : 2048', '"maxSeqLen" : 8192, "maxInputTokenLen" : 6144')
            .replace(
                '"modelName" : "old", "modelWeightPath" : "/old", "worldSize" : 4',
                '"modelName" : "TeleChat2-7B", "modelWeightPath" : "/models/telechat2-7b", "worldSize" : 1',
            )
            .replace('"backendType" : "atb"', '"backendType" : "ms"')
            .replace('"npuMemSize" : -1', '"npuMemSize" : 8')
            .replace('"maxPrefillBatchSize" : 50', '"maxPrefillBatchSize" : 16')
            .replace('"maxBatchSize" : 200', '"maxBatchSize" : 16')
            .replace('"maxIterTimes" : 512', '"maxIterTimes" : 8191')
            # A compulsory key that the template lacks is added behind the last one of its object.
            .replace('Microseconds" : 5000', 'Microseconds" : 5000, "cacheBlockSize" : 128')
        )
        assert text == expected

    def test_line_ends_and_byte_order_mark_stay(self, template: Path) -> None:
        template.write_bytes(b"\xef\xbb\xbf" + TEMPLATE.replace("\n", "\r\n").encode())
        text = render(template=template).text
        assert text.startswith("\ufeff{\r\n") and text.count("\n") == text.count("\r\n")

    def test_ports_and_https_are_the_templates_own(self, template: Path) -> None:
        rendered = render(template=template, is_free=lambda port: False)
        server = parts(rendered.config)[0]
        assert (server["port"], server["httpsEnabled"]) == (8000, False)
        assert rows(rendered)["port"].origin == "template"
        moved = parts(render(template=template, port_base=9000).config)[0]
        assert (moved["port"], moved["metricsPort"]) == (9000, 9002)

    def test_explain_tells_template_from_derived(self, template: Path) -> None:
        origins = {name: row.origin for name, row in rows(render(template=template)).items()}
        assert (origins["team"], origins["maxLinkNum"]) == ("template", "template")
        assert (origins["worldSize"], origins["maxIterTimes"]) == ("checkpoint", "computed")

    def test_its_own_warnings_are_passed_on(self, template: Path) -> None:
        assert {violation.path.rpartition(".")[2] for violation in render(template=template).warnings} == {
            "team",
            "note",
        }

    def test_its_own_faults_are_refused(self, template: Path) -> None:
        template.write_text(TEMPLATE.replace('"maxLinkNum" : 300', '"maxLinkNum" : 0'))
        with pytest.raises(ConfigError, match=r"config\.json.*\$\.ServerConfig\.maxLinkNum.*1 to 4096"):
            render(template=template)

    def test_a_missing_object_is_named(self, template: Path) -> None:
        template.write_text(TEMPLATE.replace('"ScheduleConfig"', '"Schedule"'))
        with pytest.raises(ConfigError, match=r"\$\.BackendConfig\.ScheduleConfig.*lacks an object"):
            render(template=template)

    @pytest.mark.parametrize(
        ("content", "lacking"),
        [
            ("{}", "ServerConfig"),
            ('{"ServerConfig": [], "BackendConfig": 3}', "ServerConfig"),
            ('{"ServerConfig": 3}', "ServerConfig"),
            ('{"ServerConfig": {"port": []}}', "BackendConfig"),
        ],
    )
    def test_a_hollow_template_gives_a_sentence(self, template: Path, content: str, lacking: str) -> None:
        template.write_text(content)
        with pytest.raises(ConfigError, match=rf"\$\.{lacking}: lacks an object"):
            render(template=template, port_base=2000)

    def test_the_shipped_file_as_template_gives_the_rendered_values(self, tmp_path: Path) -> None:
        path = tmp_path / "shipped.json"
        path.write_text(json.dumps(schema.default_config("3.0.0.beta"), indent=2))
        assert render(template=path).config == render().config


class TestPatch:
    def test_equal_values_leave_the_text_alone(self) -> None:
        text = '{"a" :  1.50e1 ,"b":"\\u0061"}'
        assert patch(text, {("a",): 15.0, ("b",): "a"}, "x") == text

    def test_zero_is_not_false(self) -> None:
        assert patch('{"a": 0}', {("a",): False}, "x") == '{"a": false}'

    def test_members_are_added_in_the_layout_of_the_last(self) -> None:
        assert patch('{\n  "a" : 1\n}', {("b",): 2, ("c",): [3]}, "x") == '{\n  "a" : 1,\n  "b" : 2,\n  "c" : [3]\n}'
        assert patch('{\n "a": 1,\n\n "b": 1\n}', {("c",): 2}, "x") == '{\n "a": 1,\n\n "b": 1,\n "c": 2\n}'
        assert patch("{}", {("a",): 1, ("b",): 2}, "x") == '{"a": 1, "b": 2}'

    def test_the_last_member_can_change_while_one_is_added(self) -> None:
        assert patch('{"a": [1, 2]}', {("a",): 3, ("b",): 4}, "x") == '{"a": 3, "b": 4}'


documents = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


def locations(value: Any, location: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    items: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, item in items for place in ((*location, key), *locations(item, (*location, key)))]


@settings(max_examples=200, deadline=None)
@given(st.data(), st.dictionaries(st.text(max_size=4), documents, min_size=1, max_size=4), documents)
def test_a_patch_is_an_assignment(data: st.DataObject, document: dict[str, Any], value: Any) -> None:
    """Whatever the layout, the patched text parses to the document with that one value set."""
    text = json.dumps(
        document,
        indent=data.draw(st.sampled_from([None, 0, 3, "\t"])),
        ensure_ascii=data.draw(st.booleans()),
        separators=data.draw(st.sampled_from([(",", ":"), (" , ", " : "), None])),
    )
    location = data.draw(st.sampled_from(locations(document)))
    target: Any = document
    for step in location[:-1]:
        target = target[step]
    patched = patch(text, {location: value}, "document")
    target[location[-1]] = value
    assert json.dumps(json.loads(patched)) == json.dumps(document)
