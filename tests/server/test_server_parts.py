"""The server's parts without a socket: settings, body limits, metrics, and what a broken engine looks like."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections import Counter
from typing import ClassVar

import numpy as np
import pytest
from helpers.scripted import Scripted
from helpers.server import nano_directory

from telechat_mindie.engine.output import EngineStats, FinishReason, Output, Timings
from telechat_mindie.engine.params import GenerationParams
from telechat_mindie.errors import ConfigError, InputError
from telechat_mindie.model_dir.layout import ModelDir
from telechat_mindie.server.answers import Answer
from telechat_mindie.server.formats.vllm import VllmRequest
from telechat_mindie.server.generation import Generation, Job
from telechat_mindie.server.host import num_blocks
from telechat_mindie.server.http.body import MAX_JSON_DEPTH, BodyReader, parse
from telechat_mindie.server.http.errors import ApiError
from telechat_mindie.server.http.limits import Limits
from telechat_mindie.server.metrics import Metrics
from telechat_mindie.server.sampling import generation_params
from telechat_mindie.server.settings import Address, plain_settings, read_settings
from telechat_mindie.service.schema import default_config


@pytest.fixture(scope="module")
def directory() -> ModelDir:
    return ModelDir.open(nano_directory())


class TestSettings:
    def test_flags_alone(self, directory):
        settings = plain_settings(directory)
        assert settings.business is settings.management is settings.metrics
        assert (settings.business.host, settings.business.port) == ("127.0.0.1", 1025)
        assert settings.model_name == "nano" and settings.engine.max_seq_len == directory.serving.max_seq_len
        changed = settings.with_flags("::1", 0, 0.5)
        assert changed.metrics == Address("::1", 0) and changed.cache_gb == 0.5
        assert changed.business.url(7) == "http://[::1]:7"
        assert settings.with_flags(None, None, None) == settings

    def write(self, tmp_path, change, generation="3.0.0.beta"):
        config = default_config(generation)
        config["ServerConfig"]["httpsEnabled"] = False
        config["BackendConfig"]["npuDeviceIds"] = [[0]]
        model = config["BackendConfig"]["ModelDeployConfig"]["ModelConfig"][0]
        model |= {"backendType": "ms", "worldSize": 1, "npuMemSize": 3}
        model.pop("models", None)
        change(config, model)
        path = tmp_path / "config.json"
        path.write_text(json.dumps(config))
        return path

    @pytest.mark.parametrize("generation", ["1.0", "2.0", "3.0.0.beta"])
    def test_every_generations_file(self, tmp_path, generation):
        path = self.write(tmp_path, lambda config, model: None, generation)
        settings = read_settings(path, generation, None, {})
        assert settings.cache_gb == settings.npu_mem_size == 3
        assert settings.limits.requests == 3000 and settings.limits.token_seconds == 600
        ports = [plane.port for plane in (settings.business, settings.management, settings.metrics)]
        assert ports == [1025, 1026, 1027]
        assert settings.engine.max_batch_size == 200 and settings.engine.block_size == 128

    def test_the_environment_wins_and_equal_planes_merge(self, tmp_path):
        def change(config, model):
            config["ServerConfig"] |= {"managementPort": 1025, "metricsPort": 1025, "managementIpAddress": "127.0.0.1"}

        path = self.write(tmp_path, change)
        settings = read_settings(path, "3.0.0.beta", None, {})
        assert settings.business == settings.management == settings.metrics
        settings = read_settings(path, "3.0.0.beta", None, {"MIES_CONTAINER_IP": "127.0.0.9"})
        assert settings.business.host == "127.0.0.9" and settings.management.host == "127.0.0.1"
        assert settings.management == settings.metrics

    def test_plugins(self, tmp_path):
        def use(kind, gamma=0, **more):
            def change(config, model):
                model["plugin_params"] = json.dumps({"plugin_type": kind, **more})
                config["BackendConfig"]["ModelDeployConfig"]["speculationGamma"] = gamma

            return self.write(tmp_path, change)

        assert read_settings(use("prefix_cache"), "3.0.0.beta", None, {}).engine.prefix_cache
        with pytest.raises(InputError, match="memory_decoding"):
            read_settings(use("memory_decoding", 16, decoding_length=16), "3.0.0.beta", None, {})

    def test_refusals(self, tmp_path):
        def change(config, model):
            config["ServerConfig"]["inferMode"] = "dmi"
            config["ServerConfig"]["interCommTLSEnabled"] = False

        with pytest.raises(ConfigError, match="inferMode"):
            read_settings(self.write(tmp_path, change), "3.0.0.beta", None, {})

    @pytest.mark.parametrize(("value", "is_cut"), [(True, True), (-1, True), (0, False), (False, False), (1, None)])
    def test_truncation_of_3_0(self, tmp_path, value, is_cut):
        def change(config, model):
            config["BackendConfig"]["ModelDeployConfig"]["truncation"] = value
            model["backendType"] = "atb"  # 3.0 has no other

        path = self.write(tmp_path, change, "3.0")
        if is_cut is None:
            with pytest.raises(ConfigError, match="truncation: cuts prompts at their beginning"):
                read_settings(path, "3.0", None, {})
        else:
            assert read_settings(path, "3.0", None, {}).truncation is is_cut

    def test_the_metrics_have_certificates_of_their_own_or_those_of_the_management(self, tmp_path):
        def change(config, model):
            config["ServerConfig"]["httpsEnabled"] = True

        for generation, folder in (("3.0.0.beta", "metrics"), ("2.0", "management")):
            path = self.write(tmp_path, change, generation)
            server = json.loads(path.read_text())["ServerConfig"]
            settings = read_settings(path, generation, tmp_path, {})
            for plane, prefix in ((settings.business, "tls"), (settings.metrics, f"{folder}Tls")):
                assert plane.tls.certificate == tmp_path / server[f"{prefix}Cert"]

    def test_the_cache_is_no_larger_than_it_can_be_used(self, directory):
        settings = plain_settings(directory).with_flags(None, None, 1000.0)
        longest = -(-directory.serving.max_seq_len // directory.serving.block_size)
        assert num_blocks(directory, settings) == longest * settings.engine.max_batch_size + 1
        assert num_blocks(directory, settings.with_flags(None, None, 1e-9)) == 2


class TestSampling:
    """MindIE's rules for what a request leaves out (batch_context.py:440-510)."""

    def params(self, directory, count=1, **fields):
        body = VllmRequest(prompt="x", **fields)
        return generation_params(body, directory.serving, max_new_tokens=5, timeout=9.0, count=count)

    def test_naming_a_draw_means_to_draw(self, directory):
        assert not self.params(directory).do_sample
        for fields in ({"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.9}):
            assert self.params(directory, **fields).do_sample

    def test_temperature_zero_is_greedy(self, directory):
        assert self.params(directory, temperature=0.0, top_k=3).greedy

    def test_all_is_zero_and_several_are_ranked(self, directory):
        assert self.params(directory, top_k=-1).top_k == 0
        several = self.params(directory, count=2, temperature=1.0)
        assert several.do_sample and several.logprobs == 0 and self.params(directory).logprobs is None

    def test_a_penalty_keeps_logits_finite(self, directory):
        found = [self.params(directory, repetition_penalty=given).repetition_penalty for given in (3e38, 1e-38, 1.5)]
        assert found == [1e30, 1e-30, 1.5]
        assert self.params(directory).repetition_penalty == directory.serving.repetition_penalty

    def test_a_stop_string_is_included_only_where_there_is_one(self, directory):
        assert not self.params(directory, include_stop_str_in_output=True).include_stop_str_in_output
        assert self.params(directory, include_stop_str_in_output=True, stop="x").include_stop_str_in_output


class TestBodies:
    def test_depth(self):
        def nested(levels):
            return b'{"a":' * (levels - 1) + b"{}" + b"}" * (levels - 1)

        assert parse(nested(MAX_JSON_DEPTH)) == json.loads(nested(MAX_JSON_DEPTH))
        # Deeper levels are dropped: {"a": {}} at the bottom becomes {}.
        assert parse(nested(MAX_JSON_DEPTH + 1)) == parse(nested(MAX_JSON_DEPTH + 100)) == parse(nested(MAX_JSON_DEPTH))
        assert parse(b'{"a": ' + b"[" * 11 + b"]" * 11 + b', "b": [1]}')["b"] == [1]
        with pytest.raises(ApiError, match="nested too deeply"):
            parse(nested(100_000))

    def test_a_byte_order_mark_is_no_fault(self):
        assert parse(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}

    def test_all_bodies_together_are_bounded(self):
        class Slow:
            """A request that has sent 900 bytes, and more never comes."""

            headers: ClassVar[dict] = {}

            async def stream(self):
                yield b"x" * 900
                await asyncio.sleep(60)

        async def run():
            reader = BodyReader(Limits(body_bytes=1000, body_seconds=5))
            waiting = [asyncio.create_task(reader.read(Slow())) for _ in range(8)]
            await asyncio.sleep(0.05)
            with pytest.raises(ApiError) as caught:
                await reader.read(Slow())
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            return caught.value.status, reader._received

        assert asyncio.run(run()) == (503, 0)


def test_metrics_on_the_wire():
    """Names, bounds and kinds as MindIE has them, and no series beside those."""
    stats = EngineStats(
        running=1,
        waiting=2,
        swapped=3,
        blocks_total=10,
        blocks_used=5,
        host_blocks_total=4,
        host_blocks_used=1,
        preemptions=6,
        prompt_tokens=100,
        cached_tokens=25,
        generated_tokens=50,
    )
    metrics = Metrics("m", lambda: stats)
    metrics.received, metrics.failed = 4, 1
    for tokens in (10, 11, 200_000):
        metrics.accept(tokens)
    answer = Answer(token_ids=[1, 2, 3], intervals=[0.01, 3.0])
    metrics.succeed([answer], 59.0)
    text = metrics.text().decode()
    assert "_created" not in text
    for line in """
        # TYPE request_received_total counter
        request_received_total{model_name="m"} 4.0
        request_success_total{model_name="m"} 1.0
        prompt_tokens_total{model_name="m"} 200021.0
        failed_request_perc{model_name="m"} 0.25
        npu_cache_usage_perc{model_name="m"} 0.5
        cpu_cache_usage_perc{model_name="m"} 0.25
        # HELP request_prompt_tokens Tokens of prompts.
        # TYPE request_prompt_tokens histogram
        request_prompt_tokens_bucket{le="10.0",model_name="m"} 1.0
        request_prompt_tokens_bucket{le="50.0",model_name="m"} 2.0
        request_prompt_tokens_bucket{le="128000.0",model_name="m"} 2.0
        request_prompt_tokens_bucket{le="+Inf",model_name="m"} 3.0
        request_prompt_tokens_count{model_name="m"} 3.0
        request_prompt_tokens_sum{model_name="m"} 200021.0
        time_per_output_token_seconds_bucket{le="0.01",model_name="m"} 1.0
        time_per_output_token_seconds_count{model_name="m"} 2.0
        e2e_request_latency_seconds_bucket{le="50.0",model_name="m"} 0.0
        e2e_request_latency_seconds_bucket{le="60.0",model_name="m"} 1.0
        """.strip().splitlines():
        assert line.strip() in text.splitlines()
    bounds = Counter(line.split("_bucket")[0] for line in text.splitlines() if "_bucket" in line)
    assert bounds == {
        "time_to_first_token_seconds": 17,
        "time_per_output_token_seconds": 14,
        "e2e_request_latency_seconds": 11,
        "request_prompt_tokens": 16,
        "request_generation_tokens": 16,
    }


def test_an_import_does_not_change_what_others_measure():
    code = (
        "import telechat_mindie.server.metrics\n"
        "from prometheus_client import CollectorRegistry, Histogram, generate_latest\n"
        "registry = CollectorRegistry()\n"
        "Histogram('seconds', 'Of others.', registry=registry)\n"
        "assert b'seconds_created' in generate_latest(registry)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


class TestBrokenEngine:
    def ask(self, prepare, *requests):
        """Statuses and bodies of requests to a server whose engine `prepare` has dealt with."""
        server = Scripted()
        answers = server.send(*requests, prepare=lambda service: prepare(service, server.runner))
        return [(answer.status_code, answer.json() if answer.content else None) for answer in answers]

    GENERATE = ("POST", "/generate", {"prompt": "x", "max_tokens": 3})
    HEALTH = ("GET", "/health", None)

    def test_a_forward_that_fails_ends_its_requests_only(self):
        def prepare(_, runner):
            def fail(arguments):
                runner.before_forward = lambda arguments: None
                raise ValueError("no\nmemory")

            runner.before_forward = fail

        (status, body), (again, _), (health, _) = self.ask(prepare, self.GENERATE, self.GENERATE, self.HEALTH)
        assert (status, again, health) == (500, 200, 200)
        assert body == {"error": "The engine failed: ValueError: no memory", "error_type": "Incomplete Generation"}

    def test_an_engine_that_has_ended_is_told(self):
        answers = self.ask(
            lambda service, _: service.host.stop(),
            self.GENERATE,
            self.HEALTH,
            ("GET", "/v2/health/ready", None),
            ("GET", "/health/timed", None),
            ("GET", "/v1/engine-server/running-status", None),
        )
        assert [status for status, _ in answers] == [503, 500, 500, 500, 200]
        assert answers[-1][1] == {"status": 2, "errors": []}

    def test_a_mistake_of_ours_is_no_traceback_for_the_client(self):
        def prepare(service, _):
            service.metrics.text = lambda: 1 / 0

        ((status, body),) = self.ask(prepare, ("GET", "/metrics", None))
        assert status == 500 and body == {"error": "Internal error.", "error_type": "Incomplete Generation"}


class TestWaiting:
    """The time-out between tokens is of waiting for the engine, however slow the reader is."""

    @staticmethod
    def output(finish_reason: FinishReason | None) -> Output:
        timings = Timings(0.0, 0.0, 0.0)
        return Output("id", (5,), "a", (), finish_reason, None, 1, 0, 1, 7, timings)

    async def outputs(self, read_seconds: float, engine_seconds: float) -> int:
        delivered = []

        class ManualEngine:
            def submit(self, prompt_ids, params, deliver, request_id):
                delivered.append(deliver)

            def cancel(self, request_id):
                pass

        loop = asyncio.get_running_loop()
        job = Job(np.array([1]), GenerationParams(), renderer=None, stream=True)
        generation = Generation(ManualEngine(), job, 0.2, loop)
        generation.submit()
        delivered[0](self.output(None))
        loop.call_later(engine_seconds, delivered[0], self.output(FinishReason.LENGTH))
        count = 0
        async for _ in generation.outputs():
            count += 1
            await asyncio.sleep(read_seconds)
        return count

    def test_a_slow_reader_is_no_slow_engine(self):
        assert asyncio.run(self.outputs(read_seconds=0.5, engine_seconds=0.3)) == 2

    def test_a_slow_engine_is(self):
        with pytest.raises(ApiError, match="tokenTimeout"):
            asyncio.run(self.outputs(read_seconds=0.0, engine_seconds=0.5))
