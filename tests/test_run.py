"""Whole runs on pretended GPUs: one Ray for those in this process, real command lines for what only they can show."""

import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

import psutil
import pyarrow.parquet as pq
import pytest
import ray

from contract.causes import SESSION_STARTS
from contract.rows import MEASURED, PointRow, SessionRow
from contract.specs import Point, Purpose, SessionSpec
from orchestrator.cluster import Cluster, SessionHandle, actors
from orchestrator.cluster.actors import together
from orchestrator.driver import Driver, Outcome
from orchestrator.fleet import Fleet, local_fleet
from orchestrator.plan import make_plan
from orchestrator.progress import Progress
from orchestrator.search.control import Control
from orchestrator.store import Store
from tests.command_line import ROOT, Place, orchestrate
from tests.configs import experiment, resolved
from workers.devices.nvml import driver_version
from workers.load import start_line
from workers.load.endpoint import Endpoint
from workers.load.failed import LoadLost, TooFewFiles
from workers.load.plan import LoadPlan
from workers.load.process import generate
from workers.load.tasks import split

pytestmark = pytest.mark.ray
QUICK = {"load__requests_min": 4, "load__requests_per_level": 1, "load__output_tokens": 4}
QUICK_ARGS = ["engine=sim", "load.requests_min=4", "load.requests_per_level=1", "load.output_tokens=4"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[Cluster, Fleet]]:
    asked = experiment("kv", engine="sim", cluster__num_gpus=4)
    with Cluster(asked.cluster, local_fleet(asked.cluster, asked.engine)) as connected:
        yield connected, connected.fleet(asked.engine)


def run(cluster: tuple[Cluster, Fleet], sessions: list[SessionSpec], directory: Path) -> tuple[Outcome, Store]:
    store = Store.create(directory, "test")
    progress = Progress(sum(len(s.points) for s in sessions), 1.0)
    return Driver(*cluster, store, progress).run(sessions), store


def session_rows(store: Store) -> list[dict[str, object]]:
    return [pq.read_table(path).to_pylist()[0] for path in store.directory.glob("shards/*/session.parquet")]


def test_sessions_share_the_cards_and_each_server_sees_only_its_own(
    cluster: tuple[Cluster, Fleet], tmp_path: Path
) -> None:
    extra = {"start_s": 1.0}
    pairs = experiment("concurrency", engine="sim", server__tensor_parallel_size=2, server__extra_args=extra, **QUICK)
    singles = experiment("kv", engine="sim", server__extra_args=extra, **QUICK)
    plan = make_plan(resolved(pairs, singles), cluster[1])
    outcome, store = run(cluster, list(plan.sessions), tmp_path)
    rows = session_rows(store)
    assert (outcome.failed, outcome.measured) == ([], plan.points)
    for row in rows:
        log = (store.directory / "logs" / f"{row['session_id']}.log").read_text()
        named = re.search(r"CUDA_VISIBLE_DEVICES=([\d,]+)", log)
        assert named
        assert named[1].split(",") == row["visible_devices"]
        assert row["device_ids"] == [f"SIM-{name}" for name in named[1].split(",")]
    assert sorted(len(row["visible_devices"]) for row in rows)[-1] == 2  # type: ignore[arg-type]
    moments = sorted(str(row["started_at"]) for row in rows)
    most_cards = 0
    for moment in moments:
        cards = [
            card
            for row in rows
            if str(row["started_at"]) <= moment < str(row["ended_at"])
            for card in row["visible_devices"]  # type: ignore[attr-defined]
        ]
        assert len(cards) == len(set(cards)), "two servers on one card"
        most_cards = max(most_cards, len(cards))
    assert most_cards == 4
    points = [pq.read_table(p).to_pylist()[0] for p in store.directory.glob("shards/*/[!s]*.parquet")]
    assert any(point["co_running_sessions"] for point in points)


def test_an_actor_that_is_lost_is_tried_again(cluster: tuple[Cluster, Fleet], tmp_path: Path) -> None:
    plan = make_plan(resolved(experiment("concurrency", engine="sim", sweep__concurrency=[1], **QUICK)), cluster[1])
    killed: list[int] = []

    class Killing(Progress):
        def ready(self, session: SessionSpec, row: object) -> None:
            super().ready(session, row)  # type: ignore[arg-type]
            if not killed:
                for process in psutil.Process().children(recursive=True):
                    if "SessionActor" in " ".join(process.cmdline()):
                        killed.append(process.pid)
                        process.kill()

    store = Store.create(tmp_path, "test")
    outcome = Driver(*cluster, store, Killing(1, 1.0)).run(list(plan.sessions))
    assert killed
    assert (outcome.measured, outcome.failed) == (1, [])
    (row,) = [pq.read_table(p).to_pylist()[0] for p in store.directory.glob("shards/*/[!s]*.parquet")]
    assert row["attempt"] == 2


def test_a_load_task_that_is_killed_costs_one_try_on_the_same_server(
    cluster: tuple[Cluster, Fleet], tmp_path: Path
) -> None:
    slow = experiment("concurrency", engine="sim", sweep__concurrency=[2], server__extra_args={"step_s": 0.3}, **QUICK)
    plan = make_plan(resolved(slow), cluster[1])
    killed: list[int] = []

    def kill_one() -> None:
        deadline = time.monotonic() + 60
        while not killed and time.monotonic() < deadline:
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if "ray::generate" in " ".join(process.cmdline()):
                        killed.append(process.pid)
                        process.kill()
                        break
            time.sleep(0.02)

    class Killing(Progress):
        def ready(self, session: SessionSpec, row: object) -> None:
            super().ready(session, row)  # type: ignore[arg-type]
            threading.Thread(target=kill_one).start()

    store = Store.create(tmp_path, "test")
    outcome = Driver(*cluster, store, Killing(1, 1.0)).run(list(plan.sessions))
    assert killed
    assert (outcome.measured, outcome.failed) == (1, [])
    assert len(outcome.servers) == 1


def test_what_a_load_task_fails_by_comes_through_ray_as_it_is(
    cluster: tuple[Cluster, Fleet], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_few_files(plan: LoadPlan) -> object:  # nested, so that Ray sends it as it is: no worker imports tests
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
        return generate(plan)

    def soon_after_another(plan: LoadPlan) -> object:
        if plan.start and plan.start.index:
            time.sleep(0.5)
        raise LoadLost("as all do")

    def beside_one_that_does_not_come(plan: LoadPlan) -> object:
        if plan.start and plan.start.index:
            time.sleep(60)
        start_line.GATHER_LIMIT_S = 0.1
        return generate(plan)

    cancel, cancelled = ray.cancel, []
    monkeypatch.setattr(ray, "cancel", lambda task, force: (cancelled.append(task), cancel(task, force=force)))
    plan = LoadPlan(Endpoint("http://127.0.0.1:9", "m"), 300, 300, 20, 8, 0, 256, 7, 20.0)
    with pytest.raises(TooFewFiles) as few:
        together(_as_task(with_few_files), [plan])
    with monkeypatch.context() as patient, pytest.raises(LoadLost, match="as all do"):
        patient.setattr(actors, "ENDING_S", 60.0)
        together(_as_task(soon_after_another), split(plan, 2, tmp_path))
    assert cancelled == []  # Ray may end the process that cancels a task whose result is just coming in
    assert re.fullmatch("300 connections need [0-9]+ open files, and their process may have 256 .*", str(few.value))
    with pytest.raises(LoadLost) as lost:
        together(_as_task(beside_one_that_does_not_come), split(plan, 2, tmp_path))
    assert str(lost.value) == "not all 2 load processes came to the start within 0.1 s"
    assert len(cancelled) == 1
    assert (type(few.value), type(lost.value)) == (TooFewFiles, LoadLost)


def _as_task(generate: Callable[[LoadPlan], object]) -> object:
    """One that leaves no process behind for the next."""
    return ray.remote(num_cpus=0, max_retries=0, max_calls=1)(generate)


def test_only_what_is_missing_is_left_to_do(cluster: tuple[Cluster, Fleet], tmp_path: Path) -> None:
    from orchestrator.resume import left_to_do

    plan = make_plan(resolved(experiment("concurrency", engine="sim", sweep__concurrency=[1, 2], **QUICK)), cluster[1])
    (session,) = plan.sessions
    _, store = run(cluster, [replace(session, points=session.points[:1])], tmp_path)
    (left,) = left_to_do(plan, store)
    assert left.points == session.points[1:]
    _, store = Driver(*cluster, store, Progress(1, 1.0)).run([left]), store
    assert left_to_do(plan, store) == []


def test_a_search_adds_points_to_a_live_session_and_goes_on_from_the_rows_on_disk(
    cluster: tuple[Cluster, Fleet], tmp_path: Path
) -> None:
    from orchestrator.resume import left_to_do

    asked = experiment("envelope", engine="sim", sweep__context_tokens=[32, 64], sweep__sequences=2)
    plan = make_plan(resolved(asked), cluster[1])
    store = Store.create(tmp_path, "test")
    outcome = Driver(*cluster, store, Progress(1, 1.0)).run(left_to_do(plan, store), plan.searches)
    (session,) = plan.sessions
    whole = store.rows(session.id)
    assert len(whole) == plan.searched + plan.points
    assert outcome.measured == sum(row.status == MEASURED for row in whole.values()) < len(whole)
    assert left_to_do(plan, store) == []
    lost = [row.point_id for row in whole.values() if row.status == MEASURED][1:]
    for point_id in lost:
        (store.directory / "shards" / session.id / f"{point_id}.parquet").unlink()
    again = Driver(*cluster, store, Progress(1, 1.0)).run(left_to_do(plan, store), plan.searches)
    assert again.measured <= len(lost)
    assert left_to_do(plan, store) == []


def test_control_is_measured_alone_by_the_last_session_of_a_host(
    cluster: tuple[Cluster, Fleet], tmp_path: Path
) -> None:
    """The anchors that would pay for it are left out: two readings are asked for whatever they cost."""
    asked = [
        experiment("concurrency", engine="sim", sweep__concurrency=[2], server__max_num_seqs=seqs, **QUICK)
        for seqs in (8, 16, 32)
    ]
    plan = make_plan(resolved(*asked), cluster[1])

    class Twice:
        def __init__(self, session: SessionSpec) -> None:
            control = replace(session.points[0], purpose=Purpose.CONTROL)
            self.points = [replace(control, id=f"control{n}", repeat=n) for n in range(2)]

        def next(self, rows: Mapping[str, PointRow]) -> Point | None:
            return next((point for point in self.points if point.id not in rows), None)

    store = Store.create(tmp_path, "test")
    controls = cast("Mapping[str, Control]", {session.id: Twice(session) for session in plan.sessions})
    outcome = Driver(*cluster, store, Progress(3, 1.0)).run(list(plan.sessions), {}, controls)
    points = [pq.read_table(p).to_pylist()[0] for p in store.directory.glob("shards/*/[!s]*.parquet")]
    alone = [point for point in points if point["purpose"] == "control"]
    assert (len(points), outcome.measured, outcome.failed) == (5, 5, [])
    assert len({point["session_id"] for point in alone}) == 1
    assert [point["co_running_sessions"] for point in alone] == [[], []]
    assert sum(bool(point["co_running_sessions"]) for point in points) == 3


# --- command lines ---


def test_a_filled_card_costs_one_start_and_is_given_back_at_the_end(
    cluster: tuple[Cluster, Fleet], tmp_path: Path
) -> None:
    import ray

    full = "Free memory on device cuda:0 (1.2/79.1 GiB) on startup is less than desired GPU memory utilization (0.9)."
    extra = {"fail": full, "fail_on": "0", "start_s": 0.2}
    asked = experiment("kv", engine="sim", server__extra_args=extra, **QUICK)
    plan = make_plan(resolved(asked), cluster[1])
    outcome, store = run(cluster, list(plan.sessions), tmp_path)
    assert (outcome.failed, outcome.measured) == ([], plan.points)
    rows = [pq.read_table(path).to_pylist()[0] for path in store.directory.glob("shards/*/session*.parquet")]
    assert [row["visible_devices"] for row in rows if row["failure_class"]] == [["0"]]
    assert all(row["visible_devices"] != ["0"] for row in rows if not row["failure_class"])
    deadline = time.monotonic() + 30
    while ray.available_resources().get("GPU") != 4 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ray.available_resources().get("GPU") == 4


def test_a_sick_card_costs_one_start_and_the_rest_is_measured(cluster: tuple[Cluster, Fleet], tmp_path: Path) -> None:
    extra = {"fail": "RuntimeError: No CUDA GPUs are available", "fail_on": "1", "start_s": 0.2}
    plan = make_plan(resolved(experiment("kv", engine="sim", server__extra_args=extra, **QUICK)), cluster[1])
    outcome, _ = run(cluster, list(plan.sessions), tmp_path)
    assert (outcome.failed, outcome.measured) == ([], plan.points)
    failed = [(row.visible_devices, row.failure_class) for row in outcome.servers if row.failure_class]
    assert failed == [(["1"], "card_failed")]


@pytest.mark.skipif(driver_version() is not None, reason="needs a host whose NVML does not give the cards")
def test_a_card_that_cannot_be_opened_is_held_by_its_actor(cluster: tuple[Cluster, Fleet], tmp_path: Path) -> None:
    plan = make_plan(resolved(experiment("kv", engine="sim", server__extra_args={"start_s": 0.2}, **QUICK)), cluster[1])
    first, *others = plan.sessions
    outcome, _ = run(cluster, [replace(first, device="cuda"), *others], tmp_path)
    lost = [row for row in outcome.servers if row.failure_class]
    assert {row.session_id for row in lost} == {first.id}
    assert [row.failure_class for row in lost] == ["card_lost"] * SESSION_STARTS
    assert len({name for row in lost for name in row.visible_devices}) == SESSION_STARTS
    assert (len(outcome.failed), outcome.measured) == (len(first.points), plan.points - len(first.points))


def test_multirun_is_one_queue_and_one_directory_and_failures_are_rows(place: Place) -> None:
    done = orchestrate(
        place,
        "-m", "+sweep=concurrency,kv", "server.extra_args={},{fail:boom}", "cluster.num_gpus=4",
        *QUICK_ARGS,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr + done.stdout
    (directory,) = place.outputs.iterdir()
    points = pq.read_table(directory / "points.parquet").to_pylist()
    failed = [point for point in points if point["status"] != MEASURED]
    assert len(failed) == len(points) / 2
    assert {point["failure_message"] for point in failed} == {"the server ended with exit code 1 and no error line"}
    assert all("boom" in point["log_tail"] for point in failed)
    assert json.loads((directory / "manifest.json").read_text())["status"] == "failed points"
    assert {path.name for path in directory.iterdir()} >= {"kv_cache_scaling.csv", "concurrency_sweep.csv", "logs"}
    assert place.leftovers() == []


def test_a_run_goes_on_from_its_manifest_and_measures_only_what_is_missing_or_added(place: Place) -> None:
    asked = ["+sweep=concurrency", "sweep.concurrency=[1,2]", *QUICK_ARGS]
    assert orchestrate(place, *asked).returncode == 0
    (run_directory,) = place.outputs.iterdir()
    kept, lost = sorted(run_directory.glob("shards/*/[!s]*.parquet"))
    before = kept.stat().st_mtime_ns
    lost.unlink()

    def resume(*more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "orchestrator", f"resume={run_directory}", *more]
        return subprocess.run(command, cwd=ROOT, env=place.environment(), capture_output=True, text=True, timeout=120)

    done = resume("+sweep=concurrency", "sweep.concurrency=[1,4]", *QUICK_ARGS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert lost.exists()
    assert kept.stat().st_mtime_ns == before
    assert len(list(run_directory.glob("shards/*/[!s]*.parquet"))) == 3
    manifest = json.loads((run_directory / "manifest.json").read_text())
    assert [len(manifest[name]) for name in ("experiments", "servers", "earlier")] == [2, 2, 1]
    again = resume()
    assert "nothing is left to do" in again.stdout
    assert again.returncode == 0

    manifest["fleet"]["nodes"][0]["gpu_name"] = "another card"
    (run_directory / "manifest.json").write_text(json.dumps(manifest))
    elsewhere = resume()
    assert elsewhere.returncode == 2
    assert "GPU: another card then, simulated GPU now" in elsewhere.stderr
    agreed = resume("resume.strict=false")
    assert agreed.returncode == 0
    assert "WARNING  GPU: another card then" in agreed.stdout
    assert place.leftovers() == []


def test_an_unexpected_error_in_one_session_costs_the_others_nothing(
    cluster: tuple[Cluster, Fleet], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(resolved(experiment("kv", engine="sim", **QUICK)), cluster[1])
    broken = plan.sessions[0].id
    start = SessionHandle.start

    async def raise_for_one(self: SessionHandle) -> SessionRow:
        row = await start(self)
        if row.session_id == broken:
            raise RuntimeError("a defect")
        return row

    monkeypatch.setattr(SessionHandle, "start", raise_for_one)
    outcome, _ = run(cluster, list(plan.sessions), tmp_path)
    assert outcome.measured == plan.points - 1
    assert len(outcome.failed) == 1
    assert "internal" in outcome.failed[0]


@pytest.mark.parametrize(
    ("after", "number"),
    [
        ("launched", signal.SIGINT),
        ("Ray", signal.SIGINT),
        ("results in", signal.SIGINT),
        ("results in", signal.SIGTERM),
        ("ready", signal.SIGINT),
        ("[8/8]", signal.SIGTERM),
    ],
)
def test_interrupted_at_any_moment_nothing_is_left(place: Place, after: str, number: signal.Signals) -> None:
    arguments = [
        "+sweep=kv",
        "engine=sim",
        "cluster.num_gpus=2",
        "server.extra_args={start_s: 1}",
        f"output_root={place.outputs}",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "orchestrator", *arguments],
        cwd=ROOT,
        env=place.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout
    if after == "launched":
        time.sleep(1.0)
    elif after == "Ray":
        deadline = time.monotonic() + 60
        while not list(place.mark.glob("vc-ray-*")) and time.monotonic() < deadline:
            time.sleep(0.05)
    else:
        while after not in process.stdout.readline():
            assert process.poll() is None
    os.killpg(process.pid, number)
    if after == "ready":
        time.sleep(0.05)
        os.killpg(process.pid, number)  # as `timeout` does: still one interrupt
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert place.leftovers() == []
    if after in ("ready", "[8/8]"):
        (directory,) = place.outputs.iterdir()
        assert json.loads((directory / "manifest.json").read_text())["status"] == "interrupted"
        assert list(directory.glob("shards/*/session.parquet"))


def test_what_ray_job_stop_leaves_after_its_three_seconds_is_whole(place: Place) -> None:
    asked = ["+sweep=kv", "engine=sim", "cluster.num_gpus=2", "engine.stop_grace_s=60", f"output_root={place.outputs}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "orchestrator", *asked],
        cwd=ROOT, env=place.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert process.stdout
    said, servers = "", []
    while "[3/" not in said:
        said += process.stdout.readline()
        servers += place.servers()
        assert process.poll() is None, said
    assert servers
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(3)
    servers = place.servers()  # guards would end them once the driver is killed
    process.kill()
    said += process.communicate(timeout=60)[0]
    assert servers == [], said
    (run_directory,) = place.outputs.iterdir()
    shards = [path for path in run_directory.glob("shards/*/[!s]*.parquet") if pq.read_metadata(path).num_rows == 1]
    assert len(shards) == said.count("MiB when ready") >= 3
    assert str(run_directory) in said.splitlines()[-1]
    deadline = time.monotonic() + 30
    while place.leftovers() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert place.leftovers() == []
