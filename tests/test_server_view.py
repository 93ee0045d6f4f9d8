"""The server's side of a level: the client's window, the client's tokens, and the engine rather than its cache."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contract.failures import FailureClass
from contract.rows import PointRow, RequestRow, ServerSample
from contract.specs import Api, SharedPrefix
from tests.mock_openai import Fault, MockOpenAI, serving
from workers import metrics, probe, server_view
from workers.devices.base import CardProcess
from workers.devices.sim import SimDevice
from workers.histogram import Histogram
from workers.load.client import generate
from workers.load.endpoint import Endpoint
from workers.load.plan import LoadPlan
from workers.load.prompts import TextCost
from workers.metrics import ServerMetrics
from workers.sampler import METRICS_PERIOD_S, Observed, Sampler
from workers.standstill import LIMIT_S, at_rest


def row() -> PointRow:
    return PointRow(4, "run", "s", "p", "concurrency", "load", "concurrency", 1, "measured", False, "")


def request(tokens: int | None, ok: bool = True) -> RequestRow:
    return RequestRow(0, 0.0, ok, completion_tokens=tokens)


def filled(before: ServerMetrics, after: ServerMetrics, *samples: ServerSample) -> PointRow:
    made = row()
    server_view.fill(made, before, after, list(samples), [request(8), request(8)])
    return made


def test_counters_and_histograms_are_those_of_the_window() -> None:
    times = Histogram(10.0, 5, {0.3: 0, 5.0: 5, math.inf: 5})
    later = Histogram(11.0, 7, {0.3: 1, 5.0: 7, math.inf: 7})
    before = ServerMetrics(
        generation_tokens=100, preemptions=3, prefix_queries=50, prefix_hits=10, queue_s=times, prefill_s=times,
        decode_s=times, ttft_s=times, step_tokens=Histogram(1000.0, 10),
    )  # fmt: skip
    after = ServerMetrics(
        generation_tokens=120, preemptions=4, prefix_queries=90, prefix_hits=20, queue_s=later, prefill_s=times,
        decode_s=later, ttft_s=later, step_tokens=Histogram(1064.0, 18),
    )  # fmt: skip
    made = filled(before, after)
    assert (made.server_generation_tokens, made.token_count_difference) == (20, 4)
    assert (made.preemptions, made.prefix_hit_ratio) == (1, 0.25)
    assert (made.server_steps, made.server_step_mean_tokens) == (8, 8.0)
    for phase in ("queue", "decode", "ttft"):
        assert getattr(made, f"server_{phase}_mean_s") == 0.5
        assert getattr(made, f"server_{phase}_p95_le_s") == 5.0
    assert (made.server_prefill_mean_s, made.server_prefill_p95_le_s) == (None, None)


def test_what_a_server_does_not_count_is_not_made_up() -> None:
    assert filled(ServerMetrics(), ServerMetrics()) == row()
    assert server_view.token_count_difference(None, [request(8)]) is None


def test_highest_gauges_are_those_of_the_samples() -> None:
    made = filled(
        ServerMetrics(), ServerMetrics(),
        ServerSample(0.2, 4, 3, 2, 1, 0.5), ServerSample(0.7, 8, 1, 1, 0, 0.25), ServerSample(1.2),
    )  # fmt: skip
    assert (made.running_max, made.waiting_max, made.kv_usage_max) == (8, 3, 0.5)
    assert (made.waiting_capacity_max, made.waiting_deferred_max) == (2, 1)
    assert [sample.t_s for sample in made.server_samples] == [0.2, 0.7, 1.2]


def test_samples_are_cut_to_the_window_and_told_from_its_start() -> None:
    observed = Observed(server=[ServerSample(at, running=round(at)) for at in (99.9, 100.0, 102.5, 103.0, 103.1)])
    assert observed.server_window(100.0, 3.0) == [
        ServerSample(0.0, running=100),
        ServerSample(2.5, running=102),
        ServerSample(3.0, running=103),
    ]


def test_tokens_of_failed_requests_are_counted_where_the_client_knows_them() -> None:
    assert server_view.token_count_difference(24, [request(8), request(8, ok=False), request(None, ok=False)]) == 8
    assert server_view.token_count_difference(8, [request(8), request(8)]) == -8


@pytest.mark.parametrize(
    ("ratio", "limit", "shared", "fails"),
    [
        (0.03, 0.02, None, True),
        (0.02, 0.02, 0.0, False),
        (1.0, 1.0, 0.0, False),
        (0.001, 0.0, 0.0, True),
        (0.0, 0.0, 0.0, False),
        (None, 0.0, 0.0, False),
        (0.51, 0.02, 0.5, False),
        (0.53, 0.02, 0.5, True),
        (1.0, 0.02, 0.3, True),  # a chat all of which was cached, not its template alone
        (0.0, 0.02, 0.5, False),  # nothing was cached: the engine did more than it had to
    ],
)
def test_a_level_that_measured_the_cache_is_told_by_the_share_of_hits(
    ratio: float | None, limit: float, shared: float | None, fails: bool
) -> None:
    made = row()
    made.prefix_hit_ratio, made.prefix_shared_ratio = ratio, shared
    failure = server_view.prefix_hit_failure(made, limit)
    assert (failure is not None) == fails
    if failure:
        assert failure.failure_class == FailureClass.PREFIX_HITS
        assert f"{ratio:.2%} of the prompt tokens" in failure.message
        assert f"limit: {limit:.2%}" in failure.message
        assert "server.enable_prefix_caching=false" in failure.message


@pytest.mark.parametrize(
    ("changes", "mean_prompt_tokens", "shared"),
    [
        ({}, 100.0, 0.0),
        ({"shared_prefix": SharedPrefix(8, 60)}, 100.0, 0.6),
        ({"shared_prefix": SharedPrefix(8, 60)}, None, 0.6),
        ({"api": Api.CHAT, "text_cost": TextCost(1.5, 20.0)}, 98.0, 20 / 98),
        ({"api": Api.CHAT, "text_cost": TextCost(1.5, 20.0), "shared_prefix": SharedPrefix(8, 60)}, 100.0, 0.8),
        ({"api": Api.CHAT}, 125.0, 0.2),  # nobody told what the template takes: what came on top
        ({"api": Api.CHAT}, 90.0, 0.0),
    ],
)
def test_what_prompts_share_on_purpose_is_known(
    changes: dict[str, object], mean_prompt_tokens: float | None, shared: float
) -> None:
    plan = LoadPlan(Endpoint("http://x", "m"), 1, 8, 100, 8, 0, 256, 0, 20.0)
    assert server_view.shared_ratio(replace(plan, **changes), mean_prompt_tokens) == pytest.approx(shared)


def scrapes(*seen: ServerMetrics) -> Callable[[], ServerMetrics]:
    left: Iterator[ServerMetrics] = iter(seen)
    return lambda: next(left)


def busy(tokens: int, running: int = 0, waiting: int = 0) -> ServerMetrics:
    return ServerMetrics(running=running, waiting=waiting, generation_tokens=tokens)


def test_a_server_is_at_rest_when_nothing_runs_and_its_tokens_stand_still() -> None:
    assert at_rest(scrapes(busy(7), busy(7))) == busy(7)
    last_step_late = scrapes(busy(7, running=1), busy(7, running=1), busy(7, waiting=1), busy(8), busy(9), busy(9))
    assert at_rest(last_step_late) == busy(9)
    assert at_rest(scrapes(ServerMetrics(), ServerMetrics())) == ServerMetrics()


def test_a_server_that_never_rests_is_not_waited_for() -> None:
    started = time.monotonic()
    assert at_rest(lambda: busy(7, running=1)) == busy(7, running=1)
    assert LIMIT_S <= time.monotonic() - started < LIMIT_S + 1


def loaded(server: MockOpenAI, streams: int, tokens: int) -> tuple[int | None, list[RequestRow]]:
    """Return by how many tokens a server's /metrics and the client differ over ten requests, and the client's rows."""
    endpoint = Endpoint(server.url, "mock")

    def scrape() -> ServerMetrics:
        return metrics.parse(probe.get(endpoint, "/metrics")[1])

    before = at_rest(scrape)
    result = generate(
        LoadPlan(endpoint, streams, 10, 20, tokens, first_ordinal=0, vocab_size=256, seed=0, timeout_s=20.0)
    )
    generated = (at_rest(scrape).generation_tokens or 0) - (before.generation_tokens or 0)
    return server_view.token_count_difference(generated, result.requests), result.requests


NEVER_LEARNT = {Fault.NONE: 0, Fault.NO_DONE: 0, Fault.SHORT: 0, Fault.NO_USAGE: 1.0, Fault.BREAKS_OFF: 0.5}
"""The share of an answer's tokens that the server made and the client cannot know of."""


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.sampled_from(list(NEVER_LEARNT)), max_size=8),
    st.integers(1, 4),
    st.sampled_from([2, 8, 20]),
)
def test_client_and_server_count_the_same_tokens_but_for_those_the_client_never_learnt(
    faults: list[Fault], streams: int, tokens: int
) -> None:
    with serving(MockOpenAI(faults=list(faults))) as server:
        found, requests = loaded(server, streams, tokens)
    assert found == sum(NEVER_LEARNT[fault] * tokens for fault in faults)
    assert sum(not request.ok for request in requests) == sum(fault is not Fault.NONE for fault in faults)


def test_a_scrape_is_kept_whole() -> None:
    scrape = ServerMetrics(
        running=1, generation_tokens=9, prefix_queries=50, prefix_hits=10, step_tokens=Histogram(90.0, 6),
        queue_s=Histogram(1.5, 3), prefill_s=Histogram(2.5, 3), decode_s=Histogram(4.5, 3), ttft_s=Histogram(4.0, 4),
    )  # fmt: skip
    assert scrape.sample(0.4) == ServerSample(
        0.4, running=1, generation_tokens=9, prefix_queries=50, prefix_hits=10, steps=6, step_tokens=90.0, queued=3,
        queue_total_s=1.5, prefilled=3, prefill_total_s=2.5, decoded=3, decode_total_s=4.5, first_tokens=4,
        ttft_total_s=4.0,
    )  # fmt: skip
    assert ServerMetrics().sample(0.4) == ServerSample(0.4)


def test_scrapes_that_failed_show_in_their_rate() -> None:
    observed = Observed(server=[ServerSample(100 + at) for at in (0.0, 0.4, 2.8, 3.2, 3.6)])
    assert observed.server_hz(100.0, 4.0) == 1.25
    assert observed.server_hz(100.0, 0.3) is None


def test_metrics_are_sampled_at_least_twice_a_second(tmp_path: Path) -> None:
    assert METRICS_PERIOD_S < 0.5
    started = time.monotonic()
    with (
        serving(MockOpenAI()) as server,
        Sampler(SimDevice(["0"], tmp_path / "state"), 0, Endpoint(server.url, "mock")) as sampler,
    ):
        time.sleep(1.45)
    seen = sampler.observed.server_window(started, 2.0)
    assert len(seen) >= 3
    assert all(sample.running == 0 and sample.generation_tokens == 0 for sample in seen)
    assert 0 < seen[0].t_s < seen[1].t_s < seen[2].t_s


def test_processes_are_looked_at_once_more_when_the_load_is_over(tmp_path: Path) -> None:
    """A window of less than a second has one look otherwise: before its load has taken any memory."""

    class Filling(SimDevice):
        held = 1

        def processes(self, pid: int | None) -> list[CardProcess]:
            return [CardProcess("0", 7, self.held, ours=True)]

    device = Filling(["0"], tmp_path / "state")
    with Sampler(device, 0, Endpoint("http://127.0.0.1:9", "nobody")) as sampler:
        time.sleep(0.1)
        assert sampler.observed.tree_memory_bytes() == 1
        device.held = 2
    assert sampler.observed.tree_memory_bytes() == 2
