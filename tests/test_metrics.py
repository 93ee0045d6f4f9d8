"""Figures read from /metrics and from the log: names and formats of the versions we support."""

import math
from dataclasses import astuple, fields

from contract.specs import Mode, ModelSpec, ServerSpec, SessionSpec
from tests.configs import load
from workers import kv_figures, metrics
from workers.engines import vllm_log
from workers.engines.sim_server import Counted
from workers.histogram import Histogram

METRICS = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="tiny"} 3.0
vllm:num_requests_waiting{engine="0",model_name="tiny"} 1.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="tiny",reason="capacity"} 1.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="tiny",reason="deferred"} 0.0
vllm:kv_cache_usage_perc{engine="0",model_name="tiny"} 0.25
# TYPE vllm:num_preemptions counter
vllm:num_preemptions_total{engine="0",model_name="tiny"} 2.0
vllm:num_preemptions_created{engine="0",model_name="tiny"} 1.7e9
# TYPE vllm:prefix_cache_queries counter
vllm:prefix_cache_queries_total{engine="0",model_name="tiny"} 1000.0
# TYPE vllm:prefix_cache_hits counter
vllm:prefix_cache_hits_total{engine="0",model_name="tiny"} 0.0
# TYPE vllm:generation_tokens counter
vllm:generation_tokens_total{engine="0",model_name="tiny"} 512.0
# TYPE vllm:request_queue_time_seconds histogram
vllm:request_queue_time_seconds_bucket{engine="0",le="0.3",model_name="tiny"} 7.0
vllm:request_queue_time_seconds_bucket{engine="0",le="+Inf",model_name="tiny"} 8.0
vllm:request_queue_time_seconds_count{engine="0",model_name="tiny"} 8.0
vllm:request_queue_time_seconds_sum{engine="0",model_name="tiny"} 2.0
# TYPE vllm:iteration_tokens_total histogram
vllm:iteration_tokens_total_bucket{engine="0",le="1.0",model_name="tiny"} 4.0
vllm:iteration_tokens_total_bucket{engine="0",le="1024.0",model_name="tiny"} 4.0
vllm:iteration_tokens_total_bucket{engine="0",le="2048.0",model_name="tiny"} 6.0
vllm:iteration_tokens_total_bucket{engine="0",le="+Inf",model_name="tiny"} 6.0
vllm:iteration_tokens_total_count{engine="0",model_name="tiny"} 6.0
vllm:iteration_tokens_total_sum{engine="0",model_name="tiny"} 4004.0
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="128",engine="0",kv_cache_max_concurrency="4.25",kv_cache_memory_bytes="8912896",\
kv_cache_size_tokens="2176",num_gpu_blocks="17"} 1.0
"""

LOG_032 = """\
(Worker pid=1) INFO 11-24 22:06:58 [gpu_worker.py:1] Available KV cache memory: 63.32 GiB
(EngineCore pid=1) INFO 11-24 22:06:58 [kv_cache_utils.py:2327] GPU KV cache size: 172,896 tokens, \
Maximum concurrency for 4,096 tokens per request: 42.21x
(EngineCore pid=1) INFO CUDA graph pool memory: 0.52 GiB (actual), 0.60 GiB (estimated)
(EngineCore pid=1) INFO 11-25 01:36:01 [model_runner.py:722] Graph capturing finished in 7 secs, took 0.66 GiB
(APIServer pid=1) INFO Chunked prefill is enabled with max_num_batched_tokens=8192.
"""
LOG_025 = """\
INFO [kv_cache_utils.py:1] GPU KV cache size: 322,016 tokens
INFO [kv_cache_utils.py:2] Maximum concurrency for 4,096 tokens per request: 78.62x
"""
COMPILED = """\
(EngineCore pid=7543) INFO 11-28 02:24:44 [backends.py:378] Cache the graph of compile range (1, 8192) for later use
(EngineCore pid=7543) INFO 11-28 02:24:47 [backends.py:393] Compiling a graph for compile range (1, 8192) takes 4.58 s
(EngineCore pid=7543) INFO 11-28 02:24:52 [decorators.py:708] saved AOT compiled function to /c/rank_0_0/model
(EngineCore pid=7543) INFO 11-28 02:24:52 [monitor.py:53] torch.compile took 15.52 s in total
"""
LOADED = """\
(EngineCore pid=8143) INFO 11-28 02:26:14 [backends.py:292] Directly load the compiled graph(s) for compile range \
(1, 8192) from the cache, took 1.715 s
(EngineCore pid=8143) INFO 11-28 02:26:14 [decorators.py:311] Directly load AOT compilation from path /c/rank_0_0/model
(EngineCore pid=8143) INFO 11-28 02:26:14 [monitor.py:53] torch.compile took 5.04 s in total
"""
LOG_CPU = "(Worker) INFO [cpu_worker.py:260] Auto set (0.19/8.34) GiB for KV cache on node 0, with 0.83 GiB requested"


def session(mode: Mode = Mode.COMMITTED, pool: int | None = 8912896) -> SessionSpec:
    model = ModelSpec("tiny", load("model/tiny.yaml")["config"], dummy_weights=True)
    server = ServerSpec(max_model_len=512, kv_cache_memory_bytes=pool)
    return SessionSpec("s", model, server, "vllm", "cpu", mode, 0, 4, ())


def test_metrics_are_read_by_name() -> None:
    seen = metrics.parse(METRICS)
    assert (seen.running, seen.waiting, seen.kv_usage, seen.preemptions) == (3, 1, 0.25, 2)
    assert (seen.prefix_queries, seen.prefix_hits) == (1000, 0)
    assert (seen.waiting_capacity, seen.waiting_deferred, seen.generation_tokens) == (1, 0, 512)
    assert seen.queue_s == Histogram(2.0, 8, {0.3: 7, math.inf: 8})
    assert seen.step_tokens == Histogram(4004.0, 6, {1.0: 4, 1024.0: 4, 2048.0: 6, math.inf: 6})
    assert seen.cache_figure("kv_cache_size_tokens") == 2176


def test_old_names_are_fallbacks_and_absent_ones_are_none() -> None:
    seen = metrics.parse('vllm:gpu_cache_usage_perc{engine="0"} 0.5\n')
    assert seen.kv_usage == 0.5
    assert seen == metrics.ServerMetrics(kv_usage=0.5)
    assert seen.cache_figure("num_gpu_blocks") is None


def test_waiting_is_not_split_where_the_version_does_not_split_it() -> None:
    seen = metrics.parse('vllm:num_requests_waiting{engine="0"} 2\nvllm:generation_tokens{engine="0"} 9\n')
    assert (seen.waiting, seen.waiting_capacity, seen.waiting_deferred) == (2, None, None)
    assert seen.generation_tokens == 9


def test_a_sample_is_a_scrape_at_its_time() -> None:
    gauges = astuple(metrics.parse(METRICS).sample(1.5))[:8]
    assert gauges == (1.5, 3, 1, 1, 0, 0.25, 2, 512)


def test_the_stand_in_says_all_that_is_read() -> None:
    seen = metrics.parse(Counted().exposition(running=3, waiting=2, kv_usage=0.5))
    assert (seen.running, seen.waiting, seen.waiting_capacity, seen.waiting_deferred, seen.kv_usage) == (
        3,
        2,
        2,
        0,
        0.5,
    )
    assert [f.name for f in fields(seen) if getattr(seen, f.name) is None] == []


def test_log_of_0_32_and_of_0_25_and_of_the_cpu_backend() -> None:
    new, old, cpu = vllm_log.parse(LOG_032), vllm_log.parse(LOG_025), vllm_log.parse(LOG_CPU)
    assert (new.kv_tokens, new.max_concurrency, new.max_num_batched_tokens) == (172_896, 42.21, 8192)
    assert new.available_kv_bytes == round(63.32 * 2**30)
    assert (new.graph_capture_bytes, old.graph_capture_bytes) == (round(0.66 * 2**30), None)
    assert (old.kv_tokens, old.max_concurrency, old.available_kv_bytes) == (322_016, 78.62, None)
    assert cpu.available_kv_bytes == round(0.19 * 2**30)


def test_a_server_compiled_where_one_of_its_graphs_was_not_in_the_cache() -> None:
    assert [vllm_log.parse(log).compiled for log in (COMPILED, LOADED, LOADED + COMPILED)] == [True, False, True]
    assert vllm_log.parse("INFO [monitor.py:53] torch.compile took 5.04 s in total").compiled is None
    assert vllm_log.parse(LOG_CPU).compiled is None, "eager"


def test_engines_rate_is_exact_where_the_pool_was_given() -> None:
    figures = kv_figures.of_server(session(), metrics.parse(METRICS), vllm_log.parse(""), None)
    assert figures.engine_bytes_per_token == figures.formula_bytes_per_token == 4096
    assert figures.engine_max_concurrency == figures.formula_max_concurrency == 4.25


def test_no_rate_from_a_pool_that_the_log_rounds_too_coarsely() -> None:
    text = METRICS.replace('kv_cache_memory_bytes="8912896"', 'kv_cache_memory_bytes="None"')
    figures = kv_figures.of_server(session(Mode.UTILIZATION, None), metrics.parse(text), vllm_log.parse(LOG_CPU), None)
    assert figures.engine_kv_bytes == round(0.19 * 2**30)
    assert figures.engine_bytes_per_token is None
