"""The driver on a pretended cluster: what is tried again and where, by cause, and that no late row counts."""

import asyncio
import contextlib
import io
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from contract.causes import POINT_TRIES, SESSION_STARTS
from contract.failures import FailureClass
from contract.rows import FAILED, MEASURED, SCHEMA_VERSION, PointRow, SessionEnd, SessionRow
from contract.specs import Point, SessionSpec
from orchestrator.cluster import ActorLost
from orchestrator.driver import Driver, Outcome
from orchestrator.fleet import Fleet, Node
from orchestrator.plan import make_plan
from orchestrator.progress import Progress
from orchestrator.store import NotWritten, Store
from tests.configs import GIB, experiment, resolved, sim_fleet
from workers import point_rows
from workers.kv_figures import KvFigures

MIB = 2**20
LEVELS = [1, 2, 4]
Behave = Callable[["Handle", Point], str | None]
"""What becomes of a point: None, it is measured; a class of failure; `lost`, the actor is."""


def two_nodes() -> Fleet:
    return Fleet("sim", tuple(Node(name, 1, 80 * GIB, "simulated GPU", 24 * GIB, 2) for name in "ab"))


@dataclass
class Handle:
    """A session actor that does as it is told."""

    cluster: "PretendedCluster"
    spec: SessionSpec
    node: str
    attempt: int
    dead: bool = False

    def row(self, failure_class: str | None = None) -> SessionRow:
        status = FAILED if failure_class else MEASURED
        row = SessionRow(SCHEMA_VERSION, "run", self.spec.id, self.attempt, status, True, "", "", failure_class, "why")
        return replace(row, ready_s=1.0)

    async def start(self) -> SessionRow:
        return self.row(self.cluster.starts(self))

    async def measure(self, point: Point) -> PointRow:
        self.cluster.asked.append((point.concurrency, self.attempt, self.node))
        what = self.cluster.behave(self, point)
        if what == "lost":
            raise ActorLost("it is gone")
        if what == "never":
            await asyncio.sleep(60)
        row = point_rows.blank(point_rows.Origin(self.spec, self.row(), None, KvFigures(), None), point, 0.0)
        if what == "late":
            return replace(row, attempt=self.attempt - 1)
        return replace(row, status=FAILED, failure_class=what, failure_message="why") if what else row

    async def settle(self) -> None:
        pass

    def hurry(self) -> None:
        self.cluster.hurried.append(self.spec.id)

    async def stop(self, limit_s: float) -> SessionEnd:
        self.cluster.stopped.append(self.attempt)
        return SessionEnd(self.row(), "log")


@dataclass
class PretendedCluster:
    behave: Behave = lambda handle, point: None
    starts: Callable[[Handle], str | None] = lambda handle: None
    gone: set[str] = field(default_factory=set)
    asked: list[tuple[int, int, str]] = field(default_factory=list)
    """Concurrency, attempt and node of every point that an actor was asked for."""
    stopped: list[int] = field(default_factory=list)
    hurried: list[str] = field(default_factory=list)

    async def session(self, spec: SessionSpec, node: str, run_id: str, attempt: int) -> Handle:
        return Handle(self, spec, node, attempt)

    async def has_lost(self, node: str) -> bool:
        return node in self.gone


@dataclass
class Ran:
    outcome: Outcome
    rows: dict[int, PointRow]
    """Of the levels that are done or failed, by concurrency."""
    said: str


def drive(cluster: PretendedCluster, directory: Path, fleet: Fleet | None = None, **timeouts: float) -> Ran:
    import pyarrow.parquet as pq

    fleet = fleet or sim_fleet(1)
    asked = experiment("concurrency", engine="sim", sweep__concurrency=LEVELS, sweep__repeats=1, controls="off")
    (spec,) = make_plan(resolved(asked), fleet).sessions
    spec = replace(spec, timeouts=replace(spec.timeouts, **timeouts))
    store, said = Store.create(directory, "test"), io.StringIO()
    outcome = Driver(cluster, fleet, store, Progress(len(LEVELS), 1.0, said)).run([spec])  # type: ignore[arg-type]
    rows: dict[int, PointRow] = {}
    names = [name for name in PointRow.__dataclass_fields__ if name in ("status", "attempt", "failure_class")]
    for path in store.directory.glob("shards/*/[!s]*.parquet"):
        (read,) = pq.read_table(path, columns=["concurrency", "failure_message", *names]).to_pylist()
        assert read["concurrency"] not in rows
        rows[read["concurrency"]] = read
    return Ran(outcome, rows, said.getvalue())


def statuses(ran: Ran) -> dict[int, tuple[str, str | None, int]]:
    return {level: (row["status"], row["failure_class"], row["attempt"]) for level, row in ran.rows.items()}  # type: ignore[index]


def once(level: int, what: str) -> Behave:
    return lambda handle, point: what if point.concurrency == level and handle.attempt == 1 else None


def always(level: int, what: str) -> Behave:
    return lambda handle, point: what if point.concurrency == level else None


def test_a_dead_engine_costs_one_try_and_its_point_comes_last_on_a_fresh_server(tmp_path: Path) -> None:
    cluster = PretendedCluster(once(1, "engine_dead"))
    ran = drive(cluster, tmp_path)
    assert [(level, attempt) for level, attempt, _ in cluster.asked] == [(1, 1), (2, 2), (4, 2), (1, 2)]
    assert statuses(ran) == dict.fromkeys(LEVELS, (MEASURED, None, 2))
    assert (ran.outcome.measured, ran.outcome.failed) == (3, [])
    assert cluster.stopped == [1, 2]


def test_a_point_that_ends_every_server_fails_and_costs_the_others_nothing(tmp_path: Path) -> None:
    ran = drive(PretendedCluster(always(2, "engine_dead")), tmp_path)
    found = statuses(ran)
    assert (found[1], found[4]) == ((MEASURED, None, 1), (MEASURED, None, 2))
    assert found[2] == (FAILED, "engine_dead", POINT_TRIES)


def test_what_a_load_needed_too_much_memory_for_is_not_tried_again_but_the_others_get_a_server(tmp_path: Path) -> None:
    cluster = PretendedCluster(always(2, "memory_under_load"))
    assert statuses(drive(cluster, tmp_path)) == {
        1: (MEASURED, None, 1), 2: (FAILED, "memory_under_load", 1), 4: (MEASURED, None, 2),
    }  # fmt: skip


def test_a_lost_load_process_is_tried_again_on_the_same_server(tmp_path: Path) -> None:
    cluster = PretendedCluster()
    cluster.behave = lambda handle, point: "load_lost" if len(cluster.asked) == 1 else None
    assert statuses(drive(cluster, tmp_path)) == dict.fromkeys(LEVELS, (MEASURED, None, 1))
    assert [level for level, _, _ in cluster.asked] == [1, 2, 4, 1]


@pytest.mark.parametrize("what", ["load_error_rate", "prefix_hits", "client_limited", "internal", "of a later version"])
def test_what_would_happen_again_is_not_tried_again(what: str, tmp_path: Path) -> None:
    cluster = PretendedCluster(always(2, what))
    assert statuses(drive(cluster, tmp_path))[2] == (FAILED, what, 1)
    assert [level for level, _, _ in cluster.asked] == LEVELS


def test_a_lost_actor_is_replaced_on_another_node(tmp_path: Path) -> None:
    cluster = PretendedCluster(once(2, "lost"))
    assert statuses(drive(cluster, tmp_path, two_nodes())) == {
        1: (MEASURED, None, 1), 2: (MEASURED, None, 2), 4: (MEASURED, None, 2),
    }  # fmt: skip
    nodes = {attempt: node for _, attempt, node in cluster.asked}
    assert nodes[1] != nodes[2]


def test_after_so_many_starts_what_is_left_fails_with_the_last_cause(tmp_path: Path) -> None:
    cluster = PretendedCluster(lambda handle, point: "lost")
    ran = drive(cluster, tmp_path)
    assert {row[:2] for row in statuses(ran).values()} == {(FAILED, "actor_lost")}
    assert len(ran.outcome.failed) == 3
    assert len(cluster.stopped) == SESSION_STARTS


def test_a_lost_node_gets_no_more_work_and_without_another_every_point_says_so(tmp_path: Path) -> None:
    cluster = PretendedCluster(lambda handle, point: "lost", gone={"a"})
    ran = drive(cluster, tmp_path)
    assert {row[:2] for row in statuses(ran).values()} == {(FAILED, "node_lost")}
    assert cluster.stopped == [1]


@pytest.mark.parametrize(
    ("failure", "starts"),
    [
        (FailureClass.BAD_ARGUMENT, 1),
        (FailureClass.OUT_OF_MEMORY, 1),
        (FailureClass.PORT_TAKEN, SESSION_STARTS),
        (FailureClass.NO_PROGRESS, SESSION_STARTS),
        (FailureClass.FREE_MEMORY_LOW, SESSION_STARTS),
    ],
)
def test_a_start_is_tried_again_where_another_may_do(failure: FailureClass, starts: int, tmp_path: Path) -> None:
    cluster = PretendedCluster(lambda handle, point: failure, lambda handle: failure)
    ran = drive(cluster, tmp_path)
    assert cluster.stopped == list(range(1, starts + 1))
    assert statuses(ran) == dict.fromkeys(LEVELS, (FAILED, failure, starts))


def test_a_row_of_an_actor_that_was_given_up_does_not_count(tmp_path: Path) -> None:
    def behave(handle: Handle, point: Point) -> str | None:
        if point.concurrency != 1:
            return None
        return {1: "lost", 2: "late"}.get(handle.attempt)

    ran = drive(PretendedCluster(behave), tmp_path)
    found = statuses(ran)
    assert found[1] == (FAILED, "actor_lost", 2)
    assert "a row of attempt 1 came in attempt 2" in ran.rows[1]["failure_message"]  # type: ignore[index]
    assert found[2] == found[4] == (MEASURED, None, 2)


def test_a_point_that_never_ends_costs_its_server_and_only_itself(tmp_path: Path) -> None:
    ran = drive(PretendedCluster(always(1, "never")), tmp_path, point_s=0.05)
    assert statuses(ran) == {
        1: (FAILED, "point_timeout", 1), 2: (MEASURED, None, 2), 4: (MEASURED, None, 2),
    }  # fmt: skip


def test_where_nothing_can_be_written_any_more_the_run_ends_and_servers_are_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, cluster = Store.put, PretendedCluster()

    def full(self: Store, row: PointRow) -> None:
        if row.concurrency == 2:
            raise NotWritten("no space left on device")
        put(self, row)

    monkeypatch.setattr(Store, "put", full)
    ran = drive(cluster, tmp_path)
    assert ran.outcome.not_written == "no space left on device"
    assert list(ran.rows) == [1]
    assert cluster.stopped == [1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_keeps_what_has_ended_and_only_sigterm_hurries(number: int, tmp_path: Path) -> None:
    cluster = PretendedCluster()

    def behave(handle: Handle, point: Point) -> str | None:
        if point.concurrency == 2:
            os.kill(os.getpid(), number)
            return "never"
        return None

    cluster.behave = behave
    ran = drive(cluster, tmp_path)
    assert ran.outcome.interrupted
    assert statuses(ran) == {1: (MEASURED, None, 1)}
    assert cluster.stopped == [1]
    assert len(cluster.hurried) == (number == signal.SIGTERM)
    assert ("python -m analysis" in ran.said.splitlines()[-1]) == (number == signal.SIGTERM)


@pytest.mark.parametrize(
    ("after_bytes", "back_s", "words"),
    [
        (GIB, 0.4, None),
        (
            GIB + 700 * MIB,
            None,
            "WARNING  X: its memory did not come back after the stop: 700.0 MiB above the baseline",
        ),
        (GIB + 3 * MIB, None, "X: after the stop its memory stayed 3.0 MiB above the baseline, which is within what"),
        (None, None, "WARNING  X: whether its memory came back after the stop could not be read"),
    ],
)
def test_what_a_server_leaves_behind_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after_bytes: int | None, back_s: float | None, words: str | None
) -> None:
    made = Handle.row

    def row(self: Handle, failure_class: str | None = None) -> SessionRow:
        after = {"mem_baseline_bytes": GIB, "mem_after_stop_bytes": after_bytes, "memory_back_s": back_s}
        return replace(made(self, failure_class), server_pid=1, **after)

    monkeypatch.setattr(Handle, "row", row)
    monkeypatch.setattr("orchestrator.driver.title", lambda _: "X")
    said = drive(PretendedCluster(), tmp_path).said
    assert words in said if words else "memory" not in said
    assert ("WARNING" in said) == (words or "").startswith("WARNING")


def test_a_point_that_ends_as_the_stop_comes_is_a_shard(tmp_path: Path) -> None:
    cluster = PretendedCluster()

    def behave(handle: Handle, point: Point) -> str | None:
        if point.concurrency == 2:
            (task,) = (t for t in asyncio.all_tasks() if "_execute" in repr(t.get_coro()))
            asyncio.get_running_loop().call_soon(task.cancel)  # in the round of the loop in which the row arrives
        return None

    cluster.behave = behave
    with contextlib.suppress(asyncio.CancelledError):
        drive(cluster, tmp_path)
    (shards,) = tmp_path.glob("*/shards/*")
    assert len(list(shards.glob("[!s]*.parquet"))) == 2


def test_the_second_stop_does_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.driver.ONE_INTERRUPT_S", 0.0)
    cluster = PretendedCluster()

    async def stop(self: Handle, limit_s: float) -> SessionEnd:
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(600)
        raise AssertionError

    def behave(handle: Handle, point: Point) -> str | None:
        os.kill(os.getpid(), signal.SIGINT)
        return "never"

    cluster.behave = behave
    monkeypatch.setattr(Handle, "stop", stop)
    with pytest.raises(KeyboardInterrupt):
        drive(cluster, tmp_path)
