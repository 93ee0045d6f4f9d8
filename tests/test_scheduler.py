"""The queue: order, backfill, retries, and the promise that no node is ever given more than it has."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.scheduler import Job, Queue, makespan_s, ordered, place


def test_large_jobs_start_first_then_long_ones() -> None:
    jobs = [Job("short", 1, 1), Job("long", 1, 9), Job("wide", 4, 2)]
    assert [job.id for job in ordered(jobs)] == ["wide", "long", "short"]


def test_small_job_waits_when_it_would_delay_the_head() -> None:
    head, small = Job("head", 4, 10), Job("small", 1, 50)
    placed = place([head, small], {"a": 2}, [(5.0, "a", 2)], now=0.0)
    assert placed == []


def test_small_job_is_backfilled_when_it_ends_before_the_head_can_start() -> None:
    head, small = Job("head", 4, 10), Job("small", 1, 3)
    assert place([head, small], {"a": 2}, [(5.0, "a", 2)], now=0.0) == [(small, "a")]


def test_twelve_equal_jobs_on_four_slots_take_three_rounds() -> None:
    assert makespan_s([Job(str(i), 1, 20) for i in range(12)], {"a": 4}) == 60


async def test_retry_goes_to_another_node_and_ends() -> None:
    seen: list[tuple[str, int]] = []

    async def execute(job: Job, node: str) -> bool:
        seen.append((node, job.attempt))
        return True

    await Queue({"a": 1, "b": 1}).run([Job("x", 1, 1)], execute)
    assert [attempt for _, attempt in seen] == [1, 2, 3]
    assert seen[0][0] != seen[1][0]


async def test_a_large_job_is_tried_again_on_the_only_node_that_holds_it() -> None:
    seen: list[str] = []

    async def execute(job: Job, node: str) -> bool:
        seen.append(node)
        return len(seen) < 2

    await Queue({"a": 4, "b": 1}).run([Job("x", 4, 1)], execute)
    assert seen == ["a", "a"]


async def test_a_job_that_fits_nowhere_is_an_error_not_a_hang() -> None:
    async def execute(job: Job, node: str) -> bool:
        return False

    with pytest.raises(ValueError, match="no node has room"):
        await Queue({"a": 1}).run([Job("x", 2, 1)], execute)


async def test_cancelling_waits_for_running_jobs() -> None:
    ended: list[str] = []

    async def execute(job: Job, node: str) -> bool:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0)
            ended.append(job.id)
        return False

    task = asyncio.ensure_future(Queue({"a": 2}).run([Job("x", 1, 1), Job("y", 1, 1)], execute))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert sorted(ended) == ["x", "y"]


job_lists = st.lists(st.tuples(st.integers(1, 4), st.floats(0.1, 20)), min_size=1, max_size=30)


@given(job_lists, st.integers(1, 3))
def test_no_node_is_overbooked_and_every_job_runs_once(sizes: list[tuple[int, float]], nodes: int) -> None:
    free = {f"n{i}": 4 for i in range(nodes)}
    in_use = dict.fromkeys(free, 0)
    ran: list[str] = []

    async def execute(job: Job, node: str) -> bool:
        in_use[node] += job.slots
        assert in_use[node] <= 4
        await asyncio.sleep(0)
        in_use[node] -= job.slots
        ran.append(job.id)
        return False

    jobs = [Job(str(i), slots, seconds) for i, (slots, seconds) in enumerate(sizes)]
    asyncio.run(Queue(dict(free)).run(jobs, execute))
    assert sorted(ran) == sorted(job.id for job in jobs)
    total = sum(job.slots * job.estimate_s for job in jobs)
    lower = max(total / (4 * nodes), max(job.estimate_s for job in jobs))
    assert lower - 1e-6 <= makespan_s(jobs, free) <= 4 * lower + 1e-6
