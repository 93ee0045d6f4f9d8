"""One level over several processes: what is divided adds up, what is merged is whole, and all start together."""

from __future__ import annotations

import asyncio
import heapq
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mock_openai import MockOpenAI, serving

from contract.lengths import Lengths, LogNormal, Uniform, draw
from contract.rows import ClientRow, InFlight, RequestRow
from workers.load import start_line
from workers.load.bodies import prepare
from workers.load.client import generate
from workers.load.endpoint import Endpoint
from workers.load.failed import LoadLost
from workers.load.limits import achieved_share, client_limits
from workers.load.plan import LoadPlan, LoadResult
from workers.load.start_line import StartLine
from workers.load.summary import end_s, mean_in_flight
from workers.load.tasks import STREAMS_PER_PROCESS, merge, processes_again, processes_for, split

NOWHERE = Path("/nowhere")


def plan(concurrency: int, requests: int, cores: tuple[int, ...] = (), url: str = "http://h") -> LoadPlan:
    return LoadPlan(Endpoint(url, "mock"), concurrency, requests, 20, 8, 50, 256, 7, 20.0, cores=cores)


@given(st.integers(1, 600), st.integers(1, 3000), st.integers(1, 16), st.integers(0, 20))
def test_the_parts_of_a_plan_add_up_to_it(concurrency: int, requests: int, processes: int, cores: int) -> None:
    whole = plan(concurrency, requests, tuple(range(cores)))
    streams = min(concurrency, requests)
    if processes > streams:
        with pytest.raises(ValueError, match="cannot be divided"):
            split(whole, processes, NOWHERE)
        return
    parts = split(whole, processes, NOWHERE)
    assert len(parts) == processes
    if processes > 1:
        assert sum(part.concurrency for part in parts) == streams
        assert max(part.concurrency for part in parts) - min(part.concurrency for part in parts) <= 1
        assert [(part.start.parties, part.start.index) for part in parts if part.start] == [
            (processes, index) for index in range(processes)
        ]
        assert sorted(number for part in parts for number in part.numbers) == list(range(requests))
        for part in parts:  # a share of the requests that is that of the streams, to one of each
            assert abs(part.num_requests - requests * part.concurrency / streams) <= part.concurrency
    assert sum(part.num_requests for part in parts) == requests
    assert {part.cores for part in parts} == {tuple(range(cores))}


@given(st.integers(1, 9), st.integers(1, 60), st.integers(1, 4), st.booleans())
def test_a_request_is_the_same_however_many_processes_send_its_level(
    concurrency: int, requests: int, processes: int, open_loop: bool
) -> None:
    """Ordinal, lengths (so the body) and, of an open loop, the moment it is due."""
    due_s = tuple(0.1 * number for number in range(requests)) if open_loop else ()
    whole = replace(plan(concurrency, requests), output_tokens=Uniform(1, 500), due_s=due_s)
    parts = split(whole, min(processes, concurrency, requests), NOWHERE)
    assert sorted(one for part in parts for one in as_sent(part)) == as_sent(whole)


def as_sent(part: LoadPlan) -> list[tuple[int, bytes, float]]:
    made = [each for each in prepare(part) if each is not None]
    return [(each.ordinal, each.body, due) for each, due in zip(made, part.due_s or [0.0] * len(made), strict=True)]


def test_a_level_has_as_many_processes_as_it_needs_and_the_host_can_spare() -> None:
    per = STREAMS_PER_PROCESS
    needed = [processes_for(streams, 32) for streams in (1, per, per + 1, 4 * per, 100 * per)]
    assert needed == [1, 1, 2, 4, 16]
    assert [processes_for(4 * per, cores) for cores in (0, 1, 2, 5)] == [1, 1, 1, 2]


@pytest.mark.parametrize(("first", "cores", "again"), [(1, 128, 64), (2, 128, 64), (1, 6, 3), (2, 2, 2), (1, 0, 1)])
def test_a_second_try_takes_half_of_the_cores_and_no_fewer_processes_than_the_first(
    first: int, cores: int, again: int
) -> None:
    assert processes_again(first, 1000, cores) == again
    assert processes_again(first, first, cores) == first


def test_processes_of_a_second_try_have_several_streams_each() -> None:
    assert [processes_again(1, streams, 256) for streams in (1, 4, 64, 128, 129, 512)] == [1, 4, 16, 16, 17, 64]


@given(st.integers(1, 2000), st.integers(0, 256))
def test_behind_a_second_try_there_is_nothing_left_to_try(streams: int, cores: int) -> None:
    again = processes_again(processes_for(streams, cores), streams, cores)
    assert processes_again(again, streams, cores) == again <= streams


def result(started_s: float, duration_s: float, ordinals: range) -> LoadResult:
    rows = [RequestRow(o, sent_s=0.0, ok=True, e2e_s=duration_s) for o in ordinals]
    return LoadResult(rows, duration_s, started_s, 1000.0 + started_s, [ClientRow(len(ordinals), 0.5)])


def test_merged_times_count_from_the_first_start() -> None:
    merged = merge([result(10.5, 2.0, range(3, 6)), result(10.0, 1.0, range(3))])
    assert (merged.started_monotonic_s, merged.started_wall_s, merged.duration_s) == (10.0, 1010.0, 2.5)
    assert [(row.ordinal, row.sent_s) for row in merged.requests] == [(o, 0.5 if o > 2 else 0.0) for o in range(6)]
    assert len(merged.clients) == 2
    assert mean_in_flight(merged.requests, merged.duration_s) == pytest.approx((3 * 1.0 + 3 * 2.0) / 2.5)


def test_a_merged_share_is_that_of_all_streams_together() -> None:
    """Of 64 streams in one process each, one that wakes up late is not the level's limit."""
    parts = [replace(result(10.0, 1.0, range(n, n + 1)), achieved_share=0.94 if n == 0 else 1.0) for n in range(64)]
    assert merge(parts).achieved_share == pytest.approx((63 + 0.94) / 64)
    many = replace(result(10.0, 1.0, range(64, 67)), achieved_share=0.5)
    assert merge([*parts[1:2], many]).achieved_share == pytest.approx((1.0 + 3 * 0.5) / 4)
    assert merge([replace(part, achieved_share=None) for part in parts]).achieved_share is None


def test_merged_judging_time_is_that_of_all_processes() -> None:
    parts = [replace(result(10.0, 1.0, range(n, n + 1)), judging_cpu_s=0.25) for n in range(3)]
    assert merge(parts).judging_cpu_s == 0.75


def test_what_a_process_had_in_flight_is_shifted_as_its_requests_are() -> None:
    early, late = result(10.0, 1.0, range(1)), result(10.5, 1.0, range(1, 2))
    for part in (early, late):
        part.clients[0].in_flight = [InFlight(0.1, 1)]
    assert [client.in_flight for client in merge([early, late]).clients] == [[InFlight(0.1, 1)], [InFlight(0.6, 1)]]


def sent_to_an_ideal_server(part: LoadPlan, slip_s: float = 0.0) -> LoadResult:
    """What a process sees of a server that writes every stream's tokens 10 ms apart; `slip_s` is its own doing."""
    free = [0.0] * part.concurrency
    rows = []
    for number in part.numbers or range(part.num_requests):
        sent_s = heapq.heappop(free)
        took_s = 0.01 * draw(part.output_tokens, "output", part.seed, number)
        rows.append(RequestRow(number, sent_s, ok=True, ttft_s=0.01, e2e_s=took_s))
        heapq.heappush(free, sent_s + took_s + slip_s)
    share = achieved_share(rows, part.concurrency)
    client = ClientRow(part.concurrency, 0.1)
    return LoadResult(rows, max(map(end_s, rows)), 0.0, 0.0, [client], achieved_share=share)


DRAWN = [
    (Uniform(16, 512), 8, 10, 4),
    (Uniform(16, 512), 64, 5, 16),
    (LogNormal(128, 128, 1, 2048), 16, 10, 4),
    (LogNormal(128, 128, 1, 2048), 512, 4, 8),
]


def limits_of_a_level(parts: list[LoadPlan], slips_s: list[float]) -> list[str]:
    merged = merge([sent_to_an_ideal_server(part, slip_s) for part, slip_s in zip(parts, slips_s, strict=True)])
    return client_limits(merged)


@pytest.mark.parametrize(("lengths", "streams", "rounds", "processes"), DRAWN)
def test_a_process_that_has_no_more_to_send_does_not_make_a_client_the_limit(
    lengths: Lengths, streams: int, rounds: int, processes: int
) -> None:
    for seed in range(20):
        whole = replace(plan(streams, streams * rounds), output_tokens=lengths, seed=seed)
        assert limits_of_a_level(split(whole, processes, NOWHERE), [0.0] * processes) == []


@pytest.mark.parametrize(("lengths", "streams", "rounds", "processes"), DRAWN)
def test_slow_processes_are_the_limit_as_far_as_they_lower_the_level(
    lengths: Lengths, streams: int, rounds: int, processes: int
) -> None:
    parts = split(replace(plan(streams, streams * rounds), output_tokens=lengths), processes, NOWHERE)
    half = processes // 2
    (words,) = limits_of_a_level(parts, [*[1.0] * half, *[0.0] * (processes - half)])
    assert "of the streams were in flight while their processes had requests left to send" in words
    late = merge([sent_to_an_ideal_server(part, 1.0 if part is parts[0] else 0.0) for part in parts])
    assert late.achieved_share is not None
    assert bool(client_limits(late)) == (late.achieved_share < 0.95)


async def test_nobody_starts_before_the_moment_even_where_timers_wake_up_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def early(seconds: float) -> None:
        await sleep(0.7 * seconds)

    sleep = asyncio.sleep
    monkeypatch.setattr(start_line.asyncio, "sleep", early)
    moment = await StartLine(str(tmp_path), 1, 0).wait()
    assert time.monotonic() >= moment == float((tmp_path / "start").read_text())


def test_processes_of_a_level_are_in_flight_together_and_lose_no_row(tmp_path: Path) -> None:
    with serving(MockOpenAI(gate=6)) as server:  # nothing is answered before all six streams are in flight
        parts = split(replace(plan(6, 24), endpoint=Endpoint(server.url, "mock")), 3, tmp_path)
        with ProcessPoolExecutor(3, get_context("spawn")) as pool:
            merged = merge(list(pool.map(generate, parts)))
        assert server.max_in_flight == 6
    assert [row.ordinal for row in merged.requests] == list(range(50, 74))
    assert all(row.ok for row in merged.requests)
    assert [client.streams for client in merged.clients] == [2, 2, 2]
    assert all(client.cpu_share > 0 for client in merged.clients)
    moment = float((tmp_path / "start").read_text())
    assert merged.started_monotonic_s == moment  # of all of them, whenever each woke up
    assert all(row.sent_s >= 0 for row in merged.requests)


async def test_a_process_that_does_not_come_is_not_waited_for_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start_line, "GATHER_LIMIT_S", 0.05)
    with pytest.raises(LoadLost, match="not all 2 load processes came to the start"):
        await StartLine(str(tmp_path), 2, 0).wait()
