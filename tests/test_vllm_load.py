"""Real vLLM (the CPU build) under loads of drawn lengths, shared prefixes and chats: one server for all."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from statistics import fmean

import psutil
import pytest

from contract.failures import FailureClass
from contract.lengths import LogNormal, Uniform, draw
from contract.rows import CLIENT_LIMITED, FAILED, MEASURED, PointRow
from contract.specs import (
    Api,
    Mode,
    ModelSpec,
    Point,
    PointKind,
    Purpose,
    ServerSpec,
    SessionSpec,
    SharedPrefix,
    Timeouts,
)
from tests.chaos.servers import LiveServer
from tests.configs import load
from workers import processes
from workers.engines import vllm
from workers.load.client import generate
from workers.load.plan import LoadPlan, LoadResult
from workers.session import Session

pytestmark = pytest.mark.vllm

PROMPTS, ANSWERS = LogNormal(80, 60, 16, 300), Uniform(1, 12)
DRAWN = Point("d", PointKind.LOAD, Purpose.CONCURRENCY, "concurrency", 4, 24, PROMPTS, ANSWERS, 4, seed=3)
CHAT = Point("c", PointKind.LOAD, Purpose.CONCURRENCY, "concurrency", 4, 16, 120, 8, 4, api=Api.CHAT)
SHARED = Point(
    "s", PointKind.LOAD, Purpose.CONCURRENCY, "concurrency", 2, 16, 320, 4, 2, shared_prefix=SharedPrefix(2, 256)
)


def together(plans: list[LoadPlan]) -> list[LoadResult]:
    with ThreadPoolExecutor(len(plans)) as pool:
        return list(pool.map(generate, plans))


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    assert vllm.is_installed(), "make test installs the CPU build of vLLM"
    model = ModelSpec("tiny", load("model/tiny.yaml")["config"], dummy_weights=True)
    server = ServerSpec(512, gpu_memory_utilization=0.05, kv_cache_memory_bytes=2**26, enforce_eager=True)
    points = (DRAWN, CHAT, SHARED)
    one = Session(
        SessionSpec("s", model, server, "vllm", "cpu", Mode.COMMITTED, 0, 32, points, Timeouts(300, 10, 10, 60)),
        "run", 1, [], together,
    )  # fmt: skip
    try:
        started = one.start()
        assert started.status == MEASURED, f"{started.failure_message}\n{started.log_tail}"
        yield one
    finally:
        one.stop()


def is_measured(row: PointRow) -> bool:
    """Also where the client was the limit, and says so, as on a busy machine it may."""
    said = (row.failure_message or "").startswith("the load client was the limit")
    return row.status == MEASURED or (row.status == CLIENT_LIMITED and said)


def test_every_request_of_drawn_lengths_has_exactly_its_own(session: Session) -> None:
    row = session.measure(DRAWN)
    assert is_measured(row), row.failure_message
    assert (row.completed, row.failed, row.prefix_hit_ratio) == (24, 0, 0)
    drawn = [(draw(PROMPTS, "prompt", 3, n), draw(ANSWERS, "output", 3, n)) for n in range(24)]
    assert [(r.prompt_tokens, r.completion_tokens) for r in row.requests] == drawn
    assert row.server_generation_tokens == sum(output for _, output in drawn)
    assert row.mean_prompt_tokens == fmean(prompt for prompt, _ in drawn)


def test_chats_succeed_at_about_the_asked_length_and_share_no_prompt(session: Session) -> None:
    row = session.measure(CHAT)
    assert is_measured(row), row.failure_message
    assert (row.completed, row.failed, row.prefix_hit_ratio) == (16, 0, 0)
    assert {r.completion_tokens for r in row.requests} == {8}
    cost = session.measuring.plans.text_cost
    assert cost is not None
    assert cost.tokens_per_word == 5  # the shape's tokenizer makes a token of every byte
    assert {r.prompt_tokens for r in row.requests} == {len("user: " + 20 * "word ") - 1 + len("\nassistant: ")} == {117}
    assert row.server_generation_tokens == 16 * 8
    assert all(r.chunks <= 8 for r in row.requests)  # the role's is none


def test_shared_prefixes_are_answered_from_the_cache(session: Session) -> None:
    row = session.measure(SHARED)
    assert is_measured(row), row.failure_message
    assert (row.completed, row.prefix_reset) == (16, True)
    assert row.prefix_hit_ratio == pytest.approx(256 / 320, abs=0.01)  # all were warm, and nothing else is shared


def test_requests_that_are_cut_by_the_time_limit_end_on_the_server_too(session: Session) -> None:
    plan = replace(session.measuring.plans.plan(4, 8, 16, 480), timeout_s=0.5)
    before = session.measuring.scrape().generation_tokens or 0
    with ThreadPoolExecutor(1) as pool:
        load = pool.submit(generate, plan)
        assert comes(lambda: (session.measuring.scrape().running or 0) > 0)
        rows = load.result().requests
    assert {row.failure_class for row in rows} == {FailureClass.TIMEOUT}
    assert all("no end within 0.5 s" in (row.failure_message or "") for row in rows)
    assert comes(lambda: session.measuring.scrape().running == 0)
    generated = (session.measuring.scrape().generation_tokens or 0) - before
    assert generated < 8 * 480  # they were aborted, and did not run to their ends


def test_an_engine_core_that_is_killed_under_load_is_told_and_nothing_of_its_server_is_left(session: Session) -> None:
    """The last of this module: it costs the server."""
    process = session._process
    assert process is not None
    server = LiveServer(session._workspace, psutil.Process(process.guard_pid), psutil.Process(process.pid))
    core, tree = server.engine_core(), server.tree()
    assert core is not None
    with ThreadPoolExecutor(1) as pool:
        measuring = pool.submit(session.measure, replace(DRAWN, num_requests=400))
        assert comes(lambda: (session.measuring.scrape().running or 0) > 0)
        core.kill()
        row = measuring.result()
    assert (row.status, row.failure_class) == (FAILED, FailureClass.ENGINE_DEAD)  # so that a fresh server is started
    session.stop()
    assert not [each for each in tree if processes.is_running(each.pid)]
    assert not session._workspace.root.exists()


def comes(true: Callable[[], bool]) -> bool:
    """Whether it becomes true within seconds."""
    deadline_s = time.monotonic() + 5
    while not true():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.02)
    return True
