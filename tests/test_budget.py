"""Budgets: the order that makes the most of one, what it holds, and that what it leaves out are rows."""

import io
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contract.rows import FAILED, MEASURED, OVER_BUDGET, RESULT_STATUSES
from contract.specs import PointKind, SessionSpec
from orchestrator import __main__ as main
from orchestrator.budget import Budget, Spending, by_use, coarse_first, fitting, jobs, ranks
from orchestrator.driver import Driver
from orchestrator.plan import make_plan
from orchestrator.preview import describe
from orchestrator.problems import ConfigError
from orchestrator.progress import Progress
from orchestrator.resume import left_to_do
from orchestrator.scheduler import ordered
from orchestrator.schema import BudgetConfig
from orchestrator.store import Store
from tests.command_line import Place, orchestrate
from tests.configs import cpu_fleet, experiment, gpu_fleet, resolved, sim_fleet
from tests.test_driver import LEVELS, PretendedCluster, always, drive, statuses


def planned(sweep: str, **changes: object) -> list[SessionSpec]:
    return list(make_plan(resolved(experiment(sweep, engine="sim", controls="off", **changes)), sim_fleet(1)).sessions)


def test_a_budget_counts_the_import_that_forked_servers_wait_for() -> None:
    """18 s by the estimates, from the run's start on; a server started then waits for it, a later one does not."""
    fleet = gpu_fleet(1)
    ways = {
        how: make_plan(resolved(experiment("kv", "phi-3-mini-4k", server__start=how)), fleet).sessions[:1]
        for how in ("warm", "cold")
    }
    warm = ways["warm"][0].start_estimate_s + ways["warm"][0].points[0].estimate_s
    assert Budget(minutes=(warm + 17) / 60).problems(ways["warm"])
    assert not Budget(minutes=(warm + 19) / 60).problems(ways["warm"])
    assert fitting(ways["warm"], {"n0": 1}, Budget(minutes=(warm + 17) / 60)) == 0
    assert fitting(ways["warm"], {"n0": 1}, Budget(minutes=(warm + 19) / 60)) == 1
    cold = ways["cold"][0].start_estimate_s + ways["cold"][0].points[0].estimate_s
    assert not Budget(minutes=(cold + 1) / 60).problems(ways["cold"])
    both = make_plan(resolved(experiment("kv", "phi-3-mini-4k", server__start="warm")), fleet).sessions[:2]
    assert fitting(both, {"n0": 1}, Budget(minutes=(2 * warm + 17) / 60)) == 1, "the second one waits as well"
    assert fitting(both, {"n0": 1}, Budget(minutes=(2 * warm + 19) / 60)) == 2
    now = [0.0]
    spending = Spending(Budget(minutes=(warm + 20) / 60), clock=lambda: now[0])
    (session,) = ways["warm"]
    assert spending.over(session, session.points[0]) is None
    now[0] = 3.0
    assert spending.over(session, session.points[0]) is None, "the import has gone on meanwhile"
    now[0] = 21.0
    assert spending.over(session, session.points[0]) is not None


@given(st.integers(0, 200))
def test_every_beginning_of_the_order_spans_the_whole(n: int) -> None:
    order = coarse_first(range(n))
    assert sorted(order) == list(range(n))
    for length in range(2, n + 1):
        begun = sorted(order[:length])
        assert (begun[0], begun[-1]) == (0, n - 1)
        gaps = [after - before for before, after in pairwise(begun)]
        assert max(gaps) <= 2 * max(1, min(gaps)) + 2


def test_ends_of_a_curve_come_before_its_middle_and_all_levels_before_a_repeat() -> None:
    (session,) = planned("concurrency", sweep__concurrency=[1, 2, 4, 8, 16], sweep__repeats=2)
    order = [(point.repeat, point.concurrency) for point in by_use(session).points]
    assert order == [(repeat, level) for repeat in (0, 1) for level in (1, 16, 4, 2, 8)]
    assert sorted(by_use(session).points, key=lambda p: p.id) == sorted(session.points, key=lambda p: p.id)


def test_shortest_and_longest_length_are_measured_first_and_memory_before_load() -> None:
    sessions = planned("capacity")
    budget = Budget(minutes=10)
    first = [job.id for job in ordered(jobs(sessions, budget)) if job.rank == 0]
    lengths = {
        mode: sorted(s.server.max_model_len for s in sessions if s.mode == mode and len(s.points) == 1)
        for mode in {s.mode for s in sessions}
    }
    rank = ranks(sessions)
    for mode, found in lengths.items():
        ends = {s.server.max_model_len for s in sessions if s.mode == mode and len(s.points) == 1 and rank[s.id] <= 1}
        assert ends == {found[0], found[-1]}
    assert all(s.id in first for s in sessions if len(s.points) > 1)
    for session in sessions:
        kinds = [point.kind for point in by_use(session).points]
        assert kinds == sorted(kinds, key=lambda kind: kind is not PointKind.MEMORY)
    assert {job.rank for job in jobs(sessions, Budget())} == {0}


def test_a_budget_that_holds_no_point_is_refused_in_words() -> None:
    sessions = planned("concurrency")
    assert Budget().problems(sessions) == Budget(60, 60).problems(sessions) == []
    (line,) = Budget(minutes=0.001).problems(sessions)
    assert line.startswith("budget.minutes=0.001 does not hold one point: with its server's start the cheapest is")
    assert "budget.gpu_hours=1e-06" in Budget(gpu_hours=1e-6).problems(sessions)[0]
    on_cpu = make_plan(resolved(experiment("concurrency")), cpu_fleet()).sessions
    assert Budget(gpu_hours=1).problems(on_cpu) == ["budget.gpu_hours: these servers hold no GPU; set budget.minutes"]


@given(st.floats(0.001, 100), st.floats(0.001, 100))
def test_more_minutes_never_hold_less(one: float, other: float) -> None:
    sessions = [by_use(session) for session in planned("capacity")]
    small, large = sorted((one, other))
    assert fitting(sessions, {"a": 1}, Budget(minutes=small)) <= fitting(sessions, {"a": 1}, Budget(minutes=large))
    assert fitting(sessions, {"a": 1}, Budget(minutes=1e6)) == sum(len(session.points) for session in sessions)


@given(st.floats(0.001, 100))
def test_gpu_hours_hold_nothing_where_they_are_refused_and_all_where_they_are_enough(minutes: float) -> None:
    """Not the more the larger they are: a dear server's start that just fits leaves less for those after it."""
    sessions = [by_use(session) for session in planned("capacity")]
    budget, every = Budget(gpu_hours=minutes / 60), sum(len(session.points) for session in sessions)
    took = sum(s.gpus * (s.start_estimate_s + sum(point.estimate_s for point in s.points)) for s in sessions)
    fit = fitting(sessions, {"a": 1}, budget)
    assert 0 <= fit <= every
    assert fit == 0 or not budget.problems(sessions)
    assert fitting(sessions, {"a": 1}, Budget(gpu_hours=(took + 1) / 3600)) == every


def test_spending_counts_time_cards_and_what_points_really_take() -> None:
    (session,) = planned("concurrency", server__tensor_parallel_size=1)
    point = replace(session.points[0], estimate_s=10.0)
    session = replace(session, gpus=2, start_estimate_s=20.0)
    now = [0.0]
    minutes = Spending(Budget(minutes=1), lambda: now[0])
    assert minutes.over(session, point) is None
    now[0] = 31.0
    assert minutes.over(session, point) == "budget.minutes=1 has no room for it"  # 31 + 20 + 10
    minutes.begins(session)
    assert minutes.over(session, point) is None  # its server is there
    minutes.measured(point, 30.0)
    assert minutes.over(session, point)  # points take three times their estimate

    now[0] = 0.0
    cards = Spending(Budget(gpu_hours=100 / 3600), lambda: now[0])
    cards.begins(session)
    now[0] = 39.0
    assert cards.over(session, point) is None  # 2 x 39 + 2 x 10 GPU-seconds
    now[0] = 41.0
    assert cards.over(session, point) == f"budget.gpu_hours={100 / 3600:g} has no room for it"
    cards.ends(session)
    now[0] = 1000.0
    assert (
        cards.over(replace(session, start_estimate_s=0.0), replace(point, estimate_s=8.0)) is None
    )  # cards were given back

    waiting = Spending(Budget(gpu_hours=100 / 3600), lambda: now[0])
    waiting.begins(session)
    now[0] = 2000.0
    waiting.ends(session, had_cards=False)
    assert waiting.over(session, point) is None


def test_what_has_no_room_is_a_row_that_resume_measures(tmp_path: Path) -> None:
    asked = experiment("concurrency", engine="sim", sweep__concurrency=[1, 2, 4, 8], sweep__repeats=1, controls="off")
    plan = make_plan(resolved(asked), sim_fleet(1))
    (session,) = plan.sessions
    points = tuple(replace(point, estimate_s=1.0 if point.concurrency < 4 else 1e9) for point in session.points)
    store, said = Store.create(tmp_path, "test"), io.StringIO()
    cluster = PretendedCluster()
    driver = Driver(cluster, sim_fleet(1), store, Progress(4, 1.0, said), Budget(minutes=60))  # type: ignore[arg-type]
    outcome = driver.run([replace(session, points=points)])
    assert (outcome.measured, outcome.left_out, outcome.failed) == (2, 2, [])
    assert [level for level, _, _ in cluster.asked] == [1, 2]
    columns = ["concurrency", "status", "failure_class", "failure_message"]
    rows = [pq.read_table(path, columns=columns).to_pylist()[0] for path in tmp_path.glob("*/shards/*/[!s]*.parquet")]
    found = {row["concurrency"]: row for row in rows}
    assert {level: row["status"] for level, row in found.items()} == {
        1: MEASURED, 2: MEASURED, 4: OVER_BUDGET, 8: OVER_BUDGET,
    }  # fmt: skip
    assert (found[8]["failure_class"], found[8]["failure_message"]) == (None, "budget.minutes=60 has no room for it")
    assert OVER_BUDGET not in RESULT_STATUSES
    (left,) = left_to_do(plan, store)
    assert {point.concurrency for point in left.points} == {4, 8}


def test_a_point_that_failed_stays_so_where_the_next_budget_has_no_room_for_it(tmp_path: Path) -> None:
    failed = drive(PretendedCluster(always(4, "internal")), tmp_path)
    assert statuses(failed)[4] == (FAILED, "internal", 1)
    (session,) = planned("concurrency", sweep__concurrency=[1, 2, 4], sweep__repeats=1)
    left = replace(session, points=tuple(point for point in session.points if point.concurrency == 4))
    budget, progress = Budget(minutes=1), Progress(1, 1.0, io.StringIO())
    driver = Driver(PretendedCluster(), sim_fleet(1), failed.store, progress, budget)  # type: ignore[arg-type]
    assert driver.run([replace(left, start_estimate_s=1e4)]).left_out == 1
    (path,) = failed.store.directory.glob(f"shards/*/{left.points[0].id}.parquet")
    columns = ["status", "failure_class", "failure_message"]
    assert pq.read_table(path, columns=columns).to_pylist() == [
        {"status": FAILED, "failure_class": "internal", "failure_message": "why"}
    ]


def test_a_budget_is_held_against_what_is_left_of_a_run(tmp_path: Path) -> None:
    """Its long points are all that is left: one that is done does not make the budget large enough."""
    failed = drive(PretendedCluster(always(4, "internal")), tmp_path)
    asked = experiment("concurrency", engine="sim", sweep__concurrency=LEVELS, sweep__repeats=1, controls="off")
    plan = make_plan(resolved(asked), sim_fleet(1))
    (session,) = plan.sessions
    slow = tuple(replace(p, estimate_s=1e4 if p.concurrency == 4 else 1.0) for p in session.points)
    plan = replace(plan, sessions=(replace(session, points=slow),))
    small = asked.model_copy(update={"budget": BudgetConfig(minutes=5)})
    main._check_budget(left_to_do(plan, None), small)
    with pytest.raises(ConfigError, match=r"budget.minutes=5 does not hold one point"):
        main._check_budget(left_to_do(plan, failed.store), small)


def test_a_session_whose_first_point_has_no_room_is_not_started(tmp_path: Path) -> None:
    (session,) = planned("concurrency", sweep__concurrency=[1, 2], sweep__repeats=1)
    cluster, store = PretendedCluster(), Store.create(tmp_path, "test")
    budget, progress = Budget(minutes=1), Progress(2, 1.0, io.StringIO())
    driver = Driver(cluster, sim_fleet(1), store, progress, budget)  # type: ignore[arg-type]
    outcome = driver.run([replace(session, start_estimate_s=1e4)])
    assert (outcome.left_out, cluster.asked, cluster.stopped) == (2, [], [])


def test_the_plan_says_what_a_budget_holds() -> None:
    plan = make_plan(resolved(experiment("concurrency", engine="sim", controls="off")), sim_fleet(1))
    words = describe(plan, sim_fleet(1), Budget(minutes=0.1, gpu_hours=9))
    assert "budget.minutes=0.1, of about" in words
    assert "budget.gpu_hours=9, of about" in words
    assert f"of {plan.points} planned points fit (rough), the most useful first" in words
    assert "budget" not in describe(plan, sim_fleet(1))


@pytest.mark.ray
def test_the_command_line_knows_budgets(place: Place) -> None:
    asked = ["+sweep=concurrency", "engine=sim", "sweep.concurrency=[1,2,4]", "sweep.repeats=1"]
    asked += ["load.requests_min=2", "load.requests_per_level=1", "load.output_tokens=32"]
    refused = orchestrate(place, *asked, "budget.minutes=0.001")
    assert (refused.returncode, list(place.outputs.iterdir())) == (2, [])
    assert "budget.minutes=0.001 does not hold one point" in refused.stderr
    dry = orchestrate(place, *asked, "budget.minutes=0.15", "dry_run=true")
    assert "budget.minutes=0.15, of about" in dry.stdout, dry.stdout + dry.stderr
    done = orchestrate(place, *asked, "budget.minutes=0.15", "server.extra_args={step_s: 0.1}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "left out: the budget had no room for them; go on with" in done.stdout
    (run_directory,) = place.outputs.iterdir()
    statuses = pq.read_table(run_directory / "points.parquet", columns=["status"]).column(0).to_pylist()
    assert len(statuses) == 3
    assert OVER_BUDGET in statuses
    page = (run_directory / "operating_point.md").read_text()
    assert "Left out because the run's budget had no room for them" in page
    assert place.leftovers() == []
