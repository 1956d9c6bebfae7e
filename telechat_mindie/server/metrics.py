"""GET /metrics: the names, help texts' meaning and buckets of http_wrapper/prometheus_metrics.cpp:27-163."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from telechat_mindie.engine.output import EngineStats
from telechat_mindie.server.answers import Answer

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""MindIE says application/json, which Prometheus refuses from version 3 on."""

TOKEN_BUCKETS = (10, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 16000, 20000, 32000, 50000, 64000, 128000)
FIRST_TOKEN_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5),
    *(0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
)
TOKEN_TIME_BUCKETS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
REQUEST_BUCKETS = (1.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0)

WINDOW_SECONDS = 10.0
"""Over which the throughputs are averaged."""

RECENT = 1000
"""Requests over which /metrics-json averages (DYNAMIC_AVERAGE_WINDOW_SIZE)."""


class Metrics:
    """Counts requests; asks the engine for the rest when it is asked itself. Belongs to the event loop."""

    def __init__(self, model_name: str, stats: Callable[[], EngineStats]) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # MindIE has no series of a histogram's beginning
        self._labels = (model_name,)
        self._stats = stats
        self._samples: deque[tuple[float, int, int]] = deque()  # (time, prompt tokens, generated tokens)
        self._warm_up_tokens = stats().generated_tokens
        self.received = self.succeeded = self.failed = 0
        self.prompt_tokens = 0
        self._histograms: list[Histogram] = []
        self._first_token = self._make(
            "time_to_first_token_seconds", "Seconds to the first token.", FIRST_TOKEN_BUCKETS
        )
        self._token_time = self._make("time_per_output_token_seconds", "Seconds between tokens.", TOKEN_TIME_BUCKETS)
        self._request_time = self._make("e2e_request_latency_seconds", "Seconds of whole requests.", REQUEST_BUCKETS)
        self._prompt_length = self._make("request_prompt_tokens", "Tokens of prompts.", TOKEN_BUCKETS)
        self._answer_length = self._make("request_generation_tokens", "Tokens of answers.", TOKEN_BUCKETS)
        self.recent_first_tokens: deque[float] = deque(maxlen=RECENT)  # seconds
        self.recent_token_times: deque[float] = deque(maxlen=RECENT)
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def accept(self, prompt_tokens: int) -> None:
        """A prompt went to the engine."""
        self.prompt_tokens += prompt_tokens
        self._prompt_length.observe(prompt_tokens)

    def succeed(self, answers: Sequence[Answer], seconds: float) -> None:
        """A request was answered, `seconds` after it came."""
        self.succeeded += 1
        self._request_time.observe(seconds)
        self._answer_length.observe(sum(len(answer.token_ids) for answer in answers))
        for answer in answers:
            self._first_token.observe(answer.first_token_seconds)
            for interval in answer.intervals:
                self._token_time.observe(interval)
            if answer.intervals:
                self.recent_token_times.append(sum(answer.intervals) / len(answer.intervals))
        self.recent_first_tokens.append(answers[0].first_token_seconds)

    def text(self) -> bytes:
        """In Prometheus's format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Called by the registry."""
        stats = self._stats()
        prefill, decode = self._throughput(stats)
        failed = self.failed / max(self.received, 1)
        host_use = stats.host_blocks_used / stats.host_blocks_total if stats.host_blocks_total else 0.0
        counter, gauge = CounterMetricFamily, GaugeMetricFamily
        for kind, name, text, value in (
            (counter, "request_received", "Requests that came.", self.received),
            (counter, "request_success", "Requests that were answered.", self.succeeded),
            (counter, "request_failed", "Requests that were refused or failed.", self.failed),
            (counter, "prompt_tokens", "Tokens of prompts.", self.prompt_tokens),
            (counter, "generation_tokens", "Tokens of answers.", stats.generated_tokens - self._warm_up_tokens),
            (counter, "num_preemptions", "Times that a running request gave its cache back.", stats.preemptions),
            (gauge, "num_requests_running", "Requests that hold cache.", stats.running),
            (gauge, "num_requests_waiting", "Requests that wait for cache.", stats.waiting),
            (gauge, "num_requests_swapped", "Requests whose cache is in host memory.", stats.swapped),
            (gauge, "avg_prompt_throughput_toks_per_s", "Tokens of prompts a second.", prefill),
            (gauge, "avg_generation_throughput_toks_per_s", "Tokens of answers a second.", decode),
            (gauge, "failed_request_perc", "Failed part of the requests, 1 for all.", failed),
            (gauge, "npu_cache_usage_perc", "Used part of the cache, 1 for all.", stats.block_use),
            (gauge, "cpu_cache_usage_perc", "Used part of the host's.", host_use),
            (gauge, "npu_prefix_cache_hit_rate", "Part of the prompts found in the cache.", stats.prefix_hit_rate),
        ):
            family = kind(name, text, labels=("model_name",))
            family.add_metric(self._labels, value)
            yield family
        for histogram in self._histograms:
            yield from histogram.collect()

    def _make(self, name: str, text: str, bounds: Sequence[float]) -> Histogram:
        histogram = Histogram(name, text, ("model_name",), registry=None, buckets=bounds)
        self._histograms.append(histogram)
        return histogram.labels(*self._labels)

    def _throughput(self, stats: EngineStats) -> tuple[float, float]:
        """Tokens a second of prompts and answers since the oldest look that is in the window."""
        now = time.monotonic()
        self._samples.append((now, stats.prompt_tokens, stats.generated_tokens))
        while len(self._samples) > 2 and self._samples[1][0] < now - WINDOW_SECONDS:
            self._samples.popleft()
        then, prompt, generated = self._samples[0]
        if now - then <= 0:
            return 0.0, 0.0
        return (stats.prompt_tokens - prompt) / (now - then), (stats.generated_tokens - generated) / (now - then)
