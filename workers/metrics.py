"""A server's /metrics, read by name with the names of older vLLM versions as fallbacks. Pure parsing."""

from __future__ import annotations

from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

_KV_USAGE = ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc")
_PREEMPTIONS = ("vllm:num_preemptions_total", "vllm:num_preemptions")
_PREFIX_QUERIES = (
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_queries",
    "vllm:gpu_prefix_cache_queries_total",
)
_PREFIX_HITS = ("vllm:prefix_cache_hits_total", "vllm:prefix_cache_hits", "vllm:gpu_prefix_cache_hits_total")
_GENERATED = ("vllm:generation_tokens_total", "vllm:generation_tokens")
_CACHE_CONFIG = ("vllm:cache_config_info",)
_ITERATION_BUCKETS = ("vllm:iteration_tokens_total_bucket",)


@dataclass(frozen=True, slots=True)
class ServerMetrics:
    """One scrape. Counters count since the server's start; gauges are of the moment."""

    running: int | None = None
    waiting: int | None = None
    kv_usage: float | None = None
    """Share of KV blocks in use, 0 to 1."""
    preemptions: int | None = None
    prefix_queries: int | None = None
    """Tokens looked up in the prefix cache."""
    prefix_hits: int | None = None
    generation_tokens: int | None = None
    iteration_buckets: dict[float, int] = field(default_factory=dict)
    """Cumulative number of engine steps by upper bound of tokens scheduled in a step."""
    cache_config: dict[str, str] = field(default_factory=dict)
    """Labels of vllm:cache_config_info."""

    def cache_figure(self, name: str) -> float | None:
        """Return a numeric label of the cache configuration; None where it is absent or says None."""
        try:
            return float(self.cache_config[name])
        except (KeyError, ValueError):
            return None


def parse(text: str) -> ServerMetrics:
    """Return the figures of a Prometheus text exposition; what is not there is None."""
    samples: dict[str, list[Sample]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            samples.setdefault(sample.name, []).append(sample)

    def total(*names: str) -> float | None:
        found = next((samples[name] for name in names if name in samples), None)
        return None if found is None else sum(sample.value for sample in found)

    def whole(*names: str) -> int | None:
        value = total(*names)
        return None if value is None else int(value)

    buckets: dict[float, int] = {}
    for sample in samples.get(_ITERATION_BUCKETS[0], []):
        bound = float(sample.labels["le"])
        buckets[bound] = buckets.get(bound, 0) + int(sample.value)
    return ServerMetrics(
        running=whole("vllm:num_requests_running"),
        waiting=whole("vllm:num_requests_waiting"),
        kv_usage=total(*_KV_USAGE),
        preemptions=whole(*_PREEMPTIONS),
        prefix_queries=whole(*_PREFIX_QUERIES),
        prefix_hits=whole(*_PREFIX_HITS),
        generation_tokens=whole(*_GENERATED),
        iteration_buckets=buckets,
        cache_config=dict(samples[_CACHE_CONFIG[0]][0].labels) if _CACHE_CONFIG[0] in samples else {},
    )


def largest_step_since(before: ServerMetrics, after: ServerMetrics) -> float | None:
    """Return the lower bound of the largest engine step (tokens) between two scrapes, from the histogram's buckets.

    None where the server has no such histogram or took no step.
    """
    bounds = sorted(after.iteration_buckets)
    previous_bound, previous_count, largest = 0.0, 0, None
    for bound in bounds:
        count = after.iteration_buckets[bound] - before.iteration_buckets.get(bound, 0)
        if count > previous_count:
            largest = previous_bound
        previous_bound, previous_count = bound, count
    return largest
