"""The driver on a pretended cluster: what is tried again and where, by cause, and that no late row counts."""

import asyncio
import contextlib
import io
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis.rows.shards import _starts
from contract.causes import POINT_TRIES, SESSION_STARTS
from contract.failures import FailureClass
from contract.rows import FAILED, MEASURED, SCHEMA_VERSION, MemoryAccount, PointRow, SessionEnd, SessionRow, to_table
from contract.specs import Point, SessionSpec
from orchestrator.cluster import ActorLost, NoCards
from orchestrator.driver import Driver, Outcome, _limit_s
from orchestrator.fleet import Fleet, Node
from orchestrator.plan import make_plan
from orchestrator.progress import Progress
from orchestrator.store import NotWritten, Store, _rows_of_starts
from tests.configs import GIB, experiment, gpu_fleet, resolved, sim_fleet
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
        row = SessionRow(
            SCHEMA_VERSION, "run", self.spec.id, self.attempt, status, True, "", None, failure_class, "why"
        )
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

    async def stop(self, limit_s: float, keep_cards: bool = False) -> SessionEnd:
        self.cluster.stopped.append(self.attempt)
        if keep_cards:
            self.cluster.holding.append(self)
        return SessionEnd(replace(self.row(), ended_at="then"), "log")

    def kill(self) -> None:
        self.cluster.holding.remove(self)


@dataclass
class PretendedCluster:
    behave: Behave = lambda handle, point: None
    starts: Callable[[Handle], str | None] = lambda handle: None
    gone: set[str] = field(default_factory=set)
    asked: list[tuple[int, int, str]] = field(default_factory=list)
    """Concurrency, attempt and node of every point that an actor was asked for."""
    stopped: list[int] = field(default_factory=list)
    holding: list["Handle"] = field(default_factory=list)
    """Actors that live on without a server."""
    again: list[bool] = field(default_factory=list)
    hurried: list[str] = field(default_factory=list)

    async def session(self, spec: SessionSpec, node: str, run_id: str, attempt: int, again: bool = False) -> Handle:
        self.again.append(again)
        return Handle(self, spec, node, attempt)

    async def has_lost(self, node: str) -> bool:
        return node in self.gone


@dataclass
class Ran:
    outcome: Outcome
    rows: dict[int, PointRow]
    """Of the levels that are done or failed, by concurrency."""
    said: str
    store: Store


def drive(
    cluster: PretendedCluster,
    directory: Path,
    fleet: Fleet | None = None,
    store: Store | None = None,
    levels: list[int] = LEVELS,
    progress: Progress | None = None,
    **timeouts: float,
) -> Ran:
    """Measure what is not done yet, in a new run or in that of `store`."""
    fleet = fleet or sim_fleet(1)
    asked = experiment("concurrency", engine="sim", sweep__concurrency=levels, sweep__repeats=1, controls="off")
    (spec,) = make_plan(resolved(asked), fleet).sessions
    store, said = store or Store.create(directory, "test"), io.StringIO()
    points = tuple(replace(p, estimate_s=0.01) for p in spec.points if p.id not in store.rows(spec.id))
    spec = replace(spec, points=points, timeouts=replace(spec.timeouts, **timeouts))
    printing = progress or Progress(len(levels), 1.0, said)
    try:
        outcome = Driver(cluster, fleet, store, printing).run([spec])  # type: ignore[arg-type]
    finally:
        if progress is None:
            printing.close()
    rows: dict[int, PointRow] = {}
    names = [name for name in PointRow.__dataclass_fields__ if name in ("status", "attempt", "failure_class")]
    for path in store.directory.glob("shards/*/[!s]*.parquet"):
        (read,) = pq.read_table(path, columns=["concurrency", "failure_message", *names]).to_pylist()
        assert read["concurrency"] not in rows
        rows[read["concurrency"]] = read
    return Ran(outcome, rows, said.getvalue(), store)


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


@pytest.mark.parametrize("what", ["lost", "card_lost"])
def test_a_lost_actor_or_card_is_replaced_on_another_node(what: str, tmp_path: Path) -> None:
    cluster = PretendedCluster(once(2, what))
    assert statuses(drive(cluster, tmp_path, two_nodes())) == {
        1: (MEASURED, None, 1), 2: (MEASURED, None, 2), 4: (MEASURED, None, 2),
    }  # fmt: skip
    nodes = {attempt: node for _, attempt, node in cluster.asked}
    assert nodes[1] != nodes[2]


def test_after_so_many_starts_every_point_that_was_tried_keeps_its_own_failure(tmp_path: Path) -> None:
    cluster = PretendedCluster(lambda handle, point: {1: "engine_dead", 2: "card_lost"}.get(point.concurrency, "lost"))
    ran = drive(cluster, tmp_path)
    assert statuses(ran) == {1: (FAILED, "engine_dead", 1), 2: (FAILED, "card_lost", 2), 4: (FAILED, "actor_lost", 3)}
    assert len(ran.outcome.failed) == 3
    assert len(cluster.stopped) == SESSION_STARTS


@pytest.mark.parametrize("what", ["memory_under_load", "never", "engine_dead", "lost"])
def test_a_point_whose_turn_never_came_has_no_failure_of_another(what: str, tmp_path: Path) -> None:
    levels = [1, 2, 4, 8, 16]
    cluster = PretendedCluster(lambda handle, point: what)
    ran = drive(cluster, tmp_path, levels=levels, point_s=0.05)
    asked = {level for level, _, _ in cluster.asked}
    failed_as = {"never": "point_timeout", "lost": "actor_lost"}.get(what, what)
    assert len(asked) == SESSION_STARTS
    assert {level: row[1] for level, row in statuses(ran).items()} == {
        level: failed_as if level in asked else "not_tried" for level in levels
    }
    assert f"3 starts of its server ended before its turn came, the last with {failed_as}: " in str(
        ran.rows[16]["failure_message"]  # type: ignore[index]
    )
    goes_on = PretendedCluster()
    assert {row[0] for row in statuses(drive(goes_on, tmp_path, store=ran.store, levels=levels)).values()} == {MEASURED}


def test_an_actor_that_is_lost_before_its_server_was_ready_is_every_points_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def start(self: Handle) -> SessionRow:
        raise ActorLost("it is gone")

    monkeypatch.setattr(Handle, "start", start)
    ran = drive(PretendedCluster(), tmp_path)
    assert statuses(ran) == dict.fromkeys(LEVELS, (FAILED, "actor_lost", SESSION_STARTS))


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
        (FailureClass.CARD_LOST, SESSION_STARTS),
        (FailureClass.CARD_FAILED, SESSION_STARTS),
        (FailureClass.CUDA_ERROR, SESSION_STARTS),
        (FailureClass.MODEL_MISSING, SESSION_STARTS),
        (FailureClass.NO_SPACE, SESSION_STARTS),
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

    def full(self: Store, row: PointRow, instead: bool = True) -> None:
        if row.concurrency == 2:
            raise NotWritten("no space left on device")
        put(self, row, instead)

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
    ("after_bytes", "back_s", "others", "to_others", "words"),
    [
        (GIB, 0.4, None, None, None),
        (
            GIB + 700 * MIB, None, [], 0,
            "WARNING  X: its memory did not come back after the stop: 700.0 MiB above the baseline\n",
        ),
        (
            GIB + 3 * MIB, None, None, None,
            "X: after the stop its memory stayed 3.0 MiB above the baseline, which is within what",
        ),
        (None, None, None, None, "WARNING  X: whether its memory came back after the stop could not be read"),
        (
            GIB + 2566 * MIB, None, ["pid 16595 on GPU-0: 2560 MiB"], 2560 * MIB,
            "WARNING  X: its memory came back after the stop, but others hold its cards 2566.0 MiB above the baseline: "
            "pid 16595 on GPU-0: 2560 MiB",
        ),
        (
            GIB + 700 * MIB, None, ["pid 7 on GPU-0: 300 MiB", "pid 8 on GPU-0: 4 MiB"], 304 * MIB,
            "WARNING  X: its memory did not come back after the stop: 396.0 MiB above the baseline; besides, others "
            "are on its cards: pid 7 on GPU-0: 300 MiB; pid 8 on GPU-0: 4 MiB",
        ),
        (
            GIB + 700 * MIB, None, None, None,
            "WARNING  X: after the stop its cards stayed 700.0 MiB above the baseline; whether that is its own or "
            "another's cannot be told",
        ),
        (
            GIB + 700 * MIB, None, ["pid 7 on GPU-0: unknown memory"], None,
            "its own or another's (pid 7 on GPU-0: unknown memory) cannot be told",
        ),
    ],
)  # fmt: skip
def test_what_a_server_leaves_behind_is_said(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    after_bytes: int | None,
    back_s: float | None,
    others: list[str] | None,
    to_others: int | None,
    words: str | None,
) -> None:
    made = Handle.row

    def row(self: Handle, failure_class: str | None = None) -> SessionRow:
        after = {"mem_baseline_bytes": GIB, "mem_after_stop_bytes": after_bytes, "memory_back_s": back_s}
        left = {"left_processes": others, "mem_left_to_others_bytes": to_others}
        return replace(made(self, failure_class), server_pid=1, **after, **left)

    monkeypatch.setattr(Handle, "row", row)
    monkeypatch.setattr("orchestrator.driver.title", lambda _: "X")
    said = drive(PretendedCluster(), tmp_path).said
    assert words in said if words else "memory" not in said
    assert ("WARNING" in said) == (after_bytes is None or after_bytes > GIB + 16 * MIB)


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

    async def stop(self: Handle, limit_s: float, keep_cards: bool = False) -> SessionEnd:
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


@pytest.mark.parametrize(
    ("numbers", "at_once"),
    [
        ((signal.SIGINT, signal.SIGINT), False),
        ((signal.SIGTERM, signal.SIGTERM), False),
        ((signal.SIGINT, signal.SIGTERM), True),
        ((signal.SIGTERM, signal.SIGINT), True),
    ],
)
def test_only_the_same_signal_again_within_a_second_is_taken_for_one(
    numbers: tuple[int, int], at_once: bool, tmp_path: Path
) -> None:
    def behave(handle: Handle, point: Point) -> str | None:
        for number in numbers:
            os.kill(os.getpid(), number)
        return "never"

    with pytest.raises(KeyboardInterrupt) if at_once else contextlib.nullcontext():
        assert drive(PretendedCluster(behave), tmp_path).outcome.interrupted


# --- what is written, and when ---


def test_a_row_that_makes_no_shard_costs_its_own_point_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put, cluster = Store.put, PretendedCluster()

    def picky(self: Store, row: PointRow, instead: bool = True) -> None:
        if row.concurrency == 2 and row.status == MEASURED:
            raise ValueError("not a row")
        put(self, row, instead)

    monkeypatch.setattr(Store, "put", picky)
    ran = drive(cluster, tmp_path)
    assert statuses(ran) == {1: (MEASURED, None, 1), 2: (FAILED, "internal", 1), 4: (MEASURED, None, 1)}
    assert ran.rows[2]["failure_message"] == "its row could not be written: ValueError: not a row"  # type: ignore[index]
    assert (ran.outcome.measured, len(ran.outcome.failed), cluster.stopped) == (2, 1, [1])


def test_a_point_whose_rows_all_fail_at_first_has_one_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, refused = Store.put, list[str]()

    def picky(self: Store, row: PointRow, instead: bool = True) -> None:
        if row.concurrency == 2 and len(refused) < 2:
            refused.append(row.status)
            raise ValueError("not a row")
        put(self, row, instead)

    monkeypatch.setattr(Store, "put", picky)
    found = statuses(drive(PretendedCluster(), tmp_path))
    assert refused == [MEASURED, FAILED]
    assert (found[1], found[2]) == ((MEASURED, None, 1), (FAILED, "internal", 1))


@pytest.mark.parametrize("what", ["put", "put_session"])
def test_leases_are_renewed_while_a_file_system_stalls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """A write goes on for as long as nobody renews: with the leases on the same loop, for ever."""
    write, start, renewed = getattr(Store, what), Handle.start, threading.Event()
    renewing: list[asyncio.Future[None]] = []
    stalled: list[bool] = []

    def stalling(self: Store, *row: object, **how: bool) -> None:
        renewed.clear()
        stalled.append(not renewed.wait(5))
        write(self, *row, **how)

    async def renew() -> None:
        while True:
            renewed.set()
            await asyncio.sleep(0.01)

    async def starting(self: Handle) -> SessionRow:
        renewing.append(asyncio.ensure_future(renew()))
        return await start(self)

    monkeypatch.setattr(Store, what, stalling)
    monkeypatch.setattr(Handle, "start", starting)
    assert statuses(drive(PretendedCluster(), tmp_path)) == dict.fromkeys(LEVELS, (MEASURED, None, 1))
    assert set(stalled) == {False}


def test_a_disk_that_is_full_as_the_run_is_stopped_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def behave(handle: Handle, point: Point) -> str | None:
        os.kill(os.getpid(), signal.SIGINT)
        return "never"

    def full(self: Store, end: SessionEnd, instead: bool = True) -> None:
        if end.log:
            raise NotWritten("no space left on device")

    monkeypatch.setattr(Store, "put_session", full)
    outcome = drive(PretendedCluster(behave), tmp_path).outcome
    assert (outcome.interrupted, outcome.not_written) == (True, "no space left on device")


# --- earlier starts ---


def server(store: Store) -> dict[str, object]:
    """Return the row of the last start."""
    (path,) = store.directory.glob("shards/*/session.parquet")
    return pq.read_table(path).to_pylist()[-1]  # type: ignore[no-any-return]


def logs(store: Store) -> dict[str, str]:
    """Return the logs by what stands behind the session's name."""
    return {path.name.partition(".")[2]: path.read_text() for path in store.directory.glob("logs/*")}


def test_starts_are_counted_through_all_of_a_run_and_each_keeps_its_log(tmp_path: Path) -> None:
    first = drive(PretendedCluster(once(4, "internal")), tmp_path)
    assert logs(first.store) == {"log": "log"}
    cluster = PretendedCluster(starts=lambda handle: "port_taken" if handle.attempt == 2 else None)
    second = drive(cluster, tmp_path, store=first.store)
    assert cluster.stopped == [2, 3]
    assert cluster.again == [False, True]  # of this run: that the first run's start is over says nothing
    assert statuses(second) == {1: (MEASURED, None, 1), 2: (MEASURED, None, 1), 4: (MEASURED, None, 3)}
    assert server(first.store)["attempt"] == 3
    assert set(logs(first.store)) == {"1.log", "2.log", "log"}


def test_a_run_that_is_gone_on_with_has_all_its_starts_anew(tmp_path: Path) -> None:
    store = drive(PretendedCluster(lambda handle, point: "lost"), tmp_path).store
    cluster = PretendedCluster(starts=lambda handle: "port_taken")
    drive(cluster, tmp_path, store=store)
    assert cluster.stopped == [SESSION_STARTS + start for start in range(1, SESSION_STARTS + 1)]


def test_the_manifest_knows_of_starts_whose_rows_were_replaced(tmp_path: Path) -> None:
    store = Store.create(tmp_path, "test")
    servers = [{"session_id": "s", "attempt": 4}, {"session_id": "s", "attempt": 2}, "odd", {"attempt": "odd"}]
    store.put_manifest({"experiments": [{}], "servers": servers})
    assert store.starts() == {"s": 4}


def test_a_start_whose_row_was_torn_is_no_start_that_comes_again(tmp_path: Path) -> None:
    store = drive(PretendedCluster(), tmp_path).store
    (folder,) = store.directory.glob("shards/*")
    assert store.starts() == {folder.name: 1}
    row = folder / "session.parquet"
    row.write_bytes(row.read_bytes()[:100])
    store.discard_torn()
    assert store.starts() == {folder.name: 1}, "its points tell"
    for shard in folder.glob("[!.]*.parquet"):
        shard.write_bytes(b"")
    store.discard_torn()
    assert store.starts() == {folder.name: 1}, "something was there"


def test_what_a_server_is_measured_with_is_written_as_soon_as_it_is_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody may be left to write it when the driver is killed."""
    made, seen = Handle.row, list[tuple[object, ...]]()
    monkeypatch.setattr(Handle, "row", lambda self, why=None: replace(made(self, why), environment=["A=b"]))
    store = Store.create(tmp_path, "test")

    def behave(handle: Handle, point: Point) -> str | None:
        row = server(store)
        seen.append((row["attempt"], row["ready_s"], row["environment"], row["ended_at"]))
        return "engine_dead" if (handle.attempt, point.concurrency) == (1, 2) else None

    drive(PretendedCluster(behave), tmp_path, store=store)
    assert seen == [(1, 1.0, ["A=b"], None)] * 2 + [(2, 1.0, ["A=b"], None)] * 2
    (path,) = store.directory.glob("shards/*/session.parquet")
    assert [(row.attempt, row.ended_at) for row in _rows_of_starts(path)] == [(1, "then"), (2, "then")]


def test_a_start_is_written_beside_the_rows_of_an_older_version(tmp_path: Path) -> None:
    store, row = Store.create(tmp_path, "test"), SessionRow(7, "run", "s", 1, MEASURED, True, "then", ready_s=2.0)
    row.account = [MemoryAccount("ready", "card", 1)]
    (content,) = to_table([row], SessionRow).to_pylist()
    del content["warm_wait_s"], content["account"][0]["outside_now_bytes"]
    (store.directory / "shards" / "s").mkdir(parents=True)
    path = store.directory / "shards" / "s" / "session.parquet"
    pq.write_table(pa.Table.from_pylist([content | {"given_up": 1}]), path)
    store.put_session(SessionEnd(replace(row, schema_version=SCHEMA_VERSION, attempt=2), "log"))
    starts = _starts(path)
    assert starts.column("attempt").to_pylist() == [1, 2]
    assert starts.column("account").to_pylist()[0] == [asdict(row.account[0])]
    assert store.starts() == {"s": 2}


def lost_as_it_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    async def stop(self: Handle, limit_s: float, keep_cards: bool = False) -> SessionEnd:
        raise ActorLost("it is gone")

    monkeypatch.setattr(Handle, "stop", stop)


def test_a_card_that_somebody_has_filled_is_held_while_another_is_tried_and_let_go_at_the_end(tmp_path: Path) -> None:
    held: list[int] = []

    def starts(handle: Handle) -> str | None:
        held.append(len(cluster.holding))
        return "free_memory_low" if handle.attempt == 1 else None

    cluster = PretendedCluster(starts=starts)
    ran = drive(cluster, tmp_path, sim_fleet(2))
    assert sorted(ran.rows) == sorted(LEVELS)
    assert held == [0, 1]
    assert cluster.holding == []


class CardsOfRay(PretendedCluster):
    """One node whose lowest free card each actor gets, and of which some fail what is started on them."""

    def __init__(self, sick: dict[int, FailureClass]) -> None:
        super().__init__(starts=lambda handle: sick.get(self.card_of[id(handle)]))
        self.card_of: dict[int, int] = {}
        self.taken: list[int] = []
        self.runs: list[int] = []

    async def session(self, spec: SessionSpec, node: str, run_id: str, attempt: int, again: bool = False) -> Handle:
        handle = OnACard(self, spec, node, attempt)
        card = self.card_of[id(handle)] = min(set(range(8)) - set(self.taken))
        self.taken.append(card)
        self.runs.append(card)
        return handle


class OnACard(Handle):
    async def measure(self, point: Point) -> PointRow:
        for _ in range(50):  # what fails at its start is through long before
            await asyncio.sleep(0)
        return await super().measure(point)

    async def stop(self, limit_s: float, keep_cards: bool = False) -> SessionEnd:
        end = await super().stop(limit_s, keep_cards)
        if not keep_cards:
            self.give_back()
        return end

    def kill(self) -> None:
        super().kill()
        self.give_back()

    def give_back(self) -> None:
        cluster = self.cluster
        assert isinstance(cluster, CardsOfRay)
        cluster.taken.remove(cluster.card_of[id(self)])


@pytest.mark.parametrize("what", [FailureClass.CARD_LOST, FailureClass.CARD_FAILED, FailureClass.CUDA_ERROR])
@pytest.mark.parametrize("sick", [{5}, {0, 5}])
def test_a_sick_card_costs_one_start_and_the_rest_of_the_plan_is_measured(
    what: FailureClass, sick: set[int], tmp_path: Path
) -> None:
    asked = experiment("concurrency", engine="sim", sweep__concurrency=[1], sweep__repeats=1, controls="off")
    (spec,) = make_plan(resolved(asked), sim_fleet(1)).sessions
    (point,) = spec.points
    sessions = [replace(spec, id=f"s{n}", points=(replace(point, id=f"p{n}", estimate_s=0.01),)) for n in range(20)]
    cluster = CardsOfRay(dict.fromkeys(sick, what))
    driver = Driver(cluster, sim_fleet(8), Store.create(tmp_path, "test"), Progress(20, 1.0, io.StringIO()))  # type: ignore[arg-type]
    outcome = driver.run(sessions)
    assert (outcome.measured, outcome.failed) == (20, [])
    assert [cluster.runs.count(card) for card in sick] == [1] * len(sick)
    assert cluster.taken == []


def test_a_card_that_fails_the_last_start_of_a_session_is_held_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_go: list[Handle] = []
    monkeypatch.setattr(Handle, "kill", lambda handle: let_go.append(handle))
    cluster = PretendedCluster(starts=lambda handle: "cuda_error")
    asked = experiment("concurrency", engine="sim", sweep__concurrency=[1], sweep__repeats=1, controls="off")
    (spec,) = make_plan(resolved(asked), sim_fleet(1)).sessions
    (point,) = spec.points
    sessions = [replace(spec, id=f"s{n}", points=(replace(point, id=f"p{n}"),)) for n in range(2)]
    progress = Progress(2, 1.0, io.StringIO())
    Driver(cluster, sim_fleet(8), Store.create(tmp_path, "test"), progress).run(sessions)  # type: ignore[arg-type]
    assert let_go == cluster.holding
    assert len(let_go) == 2 * SESSION_STARTS
    assert len(cluster.stopped) == 2 * SESSION_STARTS


def test_the_only_card_is_not_held_from_the_next_start(tmp_path: Path) -> None:
    held: list[int] = []

    def starts(handle: Handle) -> str | None:
        held.append(len(cluster.holding))
        return "free_memory_low"

    cluster = PretendedCluster(starts=starts)
    drive(cluster, tmp_path, sim_fleet(1))
    assert held == [0, 0, 0]


def test_of_an_actor_that_is_lost_as_it_stops_what_it_said_before_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost_as_it_stops(monkeypatch)
    ran = drive(PretendedCluster(), tmp_path)
    row = server(ran.store)
    assert (row["ready_s"], row["status"], row["failure_class"]) == (1.0, FAILED, "actor_lost")
    assert logs(ran.store) == {}


def test_an_actor_that_is_lost_before_it_said_anything_replaces_no_row_and_no_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = drive(PretendedCluster(always(4, "internal")), tmp_path).store
    before = server(store)

    async def start(self: Handle) -> SessionRow:
        raise ActorLost("it is gone")

    lost_as_it_stops(monkeypatch)
    monkeypatch.setattr(Handle, "start", start)
    ran = drive(PretendedCluster(), tmp_path, store=store)
    assert statuses(ran)[4] == (FAILED, "actor_lost", 1 + SESSION_STARTS)
    assert (server(store), logs(store)) == (before, {"log": "log"})
    assert [row.failure_class for row in ran.outcome.servers] == ["actor_lost"] * SESSION_STARTS


@pytest.mark.parametrize(("estimate_s", "limit_s"), [(1.0, 3600.0), (1199.0, 3600.0), (7200.0, 21600.0)])
def test_a_level_that_is_planned_to_be_long_is_given_the_time(estimate_s: float, limit_s: float) -> None:
    (spec,) = make_plan(resolved(experiment("concurrency", engine="sim", controls="off")), sim_fleet(1)).sessions
    assert _limit_s(spec, replace(spec.points[0], estimate_s=estimate_s)) == limit_s


def test_a_server_finds_what_another_of_its_key_has_compiled(tmp_path: Path) -> None:
    said: list[str] = []
    second_began = asyncio.Event()

    class Starting(Handle):
        async def start(self) -> SessionRow:
            said.append("starts")
            if said.count("starts") == 2:
                second_began.set()
            for _ in range(100):
                await asyncio.sleep(0)
            said.append("is ready")
            return self.row()

        async def measure(self, point: Point) -> PointRow:
            await second_began.wait()
            return await super().measure(point)

    class Node(PretendedCluster):
        async def session(self, spec: SessionSpec, node: str, run_id: str, attempt: int, again: bool = False) -> Handle:
            return Starting(self, spec, node, attempt)

    shares = [
        experiment("concurrency", controls="off", server__enforce_eager=False, server__gpu_memory_utilization=share,
                   sweep__concurrency=[1], sweep__repeats=1)
        for share in (0.8, 0.9)
    ]  # fmt: skip
    sessions = [
        replace(spec, timeouts=replace(spec.timeouts, point_s=20.0), points=(replace(spec.points[0], estimate_s=0.01),))
        for spec in make_plan(resolved(*shares), gpu_fleet(2)).sessions
    ]
    store, progress = Store.create(tmp_path, "test"), Progress(2, 1.0, io.StringIO())
    driver = Driver(Node(), gpu_fleet(2), store, progress)  # type: ignore[arg-type]
    outcome = driver.run(sessions)
    assert said == ["starts", "is ready"] * 2
    assert (outcome.measured, outcome.failed) == (2, [])


# --- cards that another job holds ---


def on_a_node_of_two(held: int, directory: Path, sessions: int = 3) -> tuple[Outcome, list[tuple[str, int, bool]], str]:
    """Run sessions of one card each on a node of two, of which another job holds so many all the time."""
    starts: list[tuple[str, int, bool]] = []

    class Held(PretendedCluster):
        def __init__(self) -> None:
            super().__init__()
            self.free = 2 - held

        async def session(self, spec: SessionSpec, node: str, run_id: str, attempt: int, again: bool = False) -> Handle:
            starts.append((spec.id, attempt, again))
            if not self.free:
                await asyncio.sleep(0.001)
                raise NoCards("no actor")
            self.free -= 1
            return Alone(self, spec, node, attempt)

    class Alone(Handle):
        async def measure(self, point: Point) -> PointRow:
            await asyncio.sleep(0.05)  # some tries of who gets no card
            return await super().measure(point)

        async def stop(self, limit_s: float, keep_cards: bool = False) -> SessionEnd:
            self.cluster.free += 1  # type: ignore[attr-defined]
            return await super().stop(limit_s, keep_cards)

    asked = [
        experiment("concurrency", engine="sim", controls="off", server__gpu_memory_utilization=0.6 + 0.1 * at,
                   sweep__concurrency=[1, 2], sweep__repeats=1)
        for at in range(sessions)
    ]  # fmt: skip
    said = io.StringIO()
    fleet, progress = sim_fleet(2), Progress(2 * sessions, 1.0, said)
    planned = make_plan(resolved(*asked), fleet).sessions
    assert len(planned) == sessions
    try:
        outcome = Driver(Held(), fleet, Store.create(directory, "test"), progress).run(planned)  # type: ignore[arg-type]
    finally:
        progress.close()
    return outcome, starts, said.getvalue()


def test_a_card_that_another_job_holds_costs_no_point_while_others_turn_over(tmp_path: Path) -> None:
    outcome, starts, said = on_a_node_of_two(1, tmp_path)
    assert (outcome.measured, outcome.failed) == (6, [])
    assert len(starts) > 3 + SESSION_STARTS, "more than would have been enough to give one up"
    assert not any(again for _, _, again in starts), "no server of it came to nothing"
    assert len({start[:2] for start in starts}) == len(starts), "each start has a number of its own"
    assert 1 <= said.count("another job holds GPUs of its node") <= 2, "once a session"
    assert "again " not in said


def test_where_another_job_holds_all_cards_a_session_is_given_up_after_its_starts(tmp_path: Path) -> None:
    outcome, starts, _ = on_a_node_of_two(2, tmp_path)
    assert (outcome.measured, len(outcome.failed)) == (0, 6)
    assert len(starts) == 3 * SESSION_STARTS
