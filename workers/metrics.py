"""A server's /metrics, read by name with the names of older vLLM versions as fallbacks. Pure parsing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from contract.rows import ServerSample
from workers.histogram import Histogram

_WAITING_BY_REASON = "vllm:num_requests_waiting_by_reason"
_KV_USAGE = ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc")
_PREEMPTIONS = ("vllm:num_preemptions_total", "vllm:num_preemptions")
_PREFIX_QUERIES = (
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_queries",
    "vllm:gpu_prefix_cache_queries_total",
)
_PREFIX_HITS = ("vllm:prefix_cache_hits_total", "vllm:prefix_cache_hits", "vllm:gpu_prefix_cache_hits_total")
_GENERATED = ("vllm:generation_tokens_total", "vllm:generation_tokens")
_CACHE_CONFIG = "vllm:cache_config_info"


@dataclass(frozen=True, slots=True)
class ServerMetrics:
    """One scrape. Counters and histograms count since the server's start; gauges are of the moment."""

    running: int | None = None
    waiting: int | None = None
    waiting_capacity: int | None = None
    """Of `waiting`, those that wait for room in the batch or in the KV pool."""
    waiting_deferred: int | None = None
    """Of `waiting`, those put off for another reason (a LoRA budget, a KV transfer)."""
    kv_usage: float | None = None
    """Share of KV blocks in use, 0 to 1."""
    preemptions: int | None = None
    prefix_queries: int | None = None
    """Tokens looked up in the prefix cache."""
    prefix_hits: int | None = None
    generation_tokens: int | None = None
    step_tokens: Histogram | None = None
    """Tokens of each engine step that gave any request a token."""
    queue_s: Histogram | None = None
    """Of each finished request: arrival in the engine to its first scheduling."""
    prefill_s: Histogram | None = None
    """Of each finished request: first scheduling to first token."""
    decode_s: Histogram | None = None
    """Of each finished request: first to last token."""
    ttft_s: Histogram | None = None
    """Of each request: arrival in the server's front end to first token."""
    cache_config: dict[str, str] = field(default_factory=dict)
    """Labels of vllm:cache_config_info."""

    def cache_figure(self, name: str) -> float | None:
        """Return a numeric label of the cache configuration; None where it is absent or says None."""
        try:
            return float(self.cache_config[name])
        except (KeyError, ValueError):
            return None

    def sample(self, t_s: float) -> ServerSample:
        """Return what a level's row keeps of a scrape that was answered at `t_s`."""
        return ServerSample(
            t_s=t_s,
            running=self.running,
            waiting=self.waiting,
            waiting_capacity=self.waiting_capacity,
            waiting_deferred=self.waiting_deferred,
            kv_usage=self.kv_usage,
            preemptions=self.preemptions,
            generation_tokens=self.generation_tokens,
            prefix_queries=self.prefix_queries,
            prefix_hits=self.prefix_hits,
            **_sums("steps", "step_tokens", self.step_tokens),
            **_sums("queued", "queue_total_s", self.queue_s),
            **_sums("prefilled", "prefill_total_s", self.prefill_s),
            **_sums("decoded", "decode_total_s", self.decode_s),
            **_sums("first_tokens", "ttft_total_s", self.ttft_s),
        )


def _sums(count: str, total: str, histogram: Histogram | None) -> dict[str, Any]:
    return {} if histogram is None else {count: histogram.count, total: histogram.total}


def parse(text: str) -> ServerMetrics:
    """Return the figures of a Prometheus text exposition; what is not there is None."""
    samples = _Samples(text)
    return ServerMetrics(
        running=samples.whole("vllm:num_requests_running"),
        waiting=samples.whole("vllm:num_requests_waiting"),
        waiting_capacity=samples.whole(_WAITING_BY_REASON, reason="capacity"),
        waiting_deferred=samples.whole(_WAITING_BY_REASON, reason="deferred"),
        kv_usage=samples.total(*_KV_USAGE),
        preemptions=samples.whole(*_PREEMPTIONS),
        prefix_queries=samples.whole(*_PREFIX_QUERIES),
        prefix_hits=samples.whole(*_PREFIX_HITS),
        generation_tokens=samples.whole(*_GENERATED),
        step_tokens=samples.histogram("vllm:iteration_tokens_total"),
        queue_s=samples.histogram("vllm:request_queue_time_seconds"),
        prefill_s=samples.histogram("vllm:request_prefill_time_seconds"),
        decode_s=samples.histogram("vllm:request_decode_time_seconds"),
        ttft_s=samples.histogram("vllm:time_to_first_token_seconds"),
        cache_config=samples.labels(_CACHE_CONFIG),
    )


class _Samples:
    """The samples of an exposition by name; those of several label sets are added up."""

    def __init__(self, text: str) -> None:
        self._by_name: dict[str, list[Sample]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                self._by_name.setdefault(sample.name, []).append(sample)

    def total(self, *names: str, **labels: str) -> float | None:
        """Return the value under the first of the names that is there, over the samples with these labels."""
        found = next((self._by_name[name] for name in names if name in self._by_name), [])
        values = [sample.value for sample in found if labels.items() <= sample.labels.items()]
        return sum(values) if values else None

    def whole(self, *names: str, **labels: str) -> int | None:
        value = self.total(*names, **labels)
        return None if value is None else int(value)

    def histogram(self, name: str) -> Histogram | None:
        buckets: dict[float, int] = {}
        for sample in self._by_name.get(f"{name}_bucket", []):
            bound = float(sample.labels["le"])
            buckets[bound] = buckets.get(bound, 0) + int(sample.value)
        total, count = self.total(f"{name}_sum"), self.whole(f"{name}_count")
        return None if total is None or count is None else Histogram(total, count, buckets)

    def labels(self, name: str) -> dict[str, str]:
        return dict(self._by_name[name][0].labels) if name in self._by_name else {}
