"""The harness in tests/chaos: a seeded part of what `python -m tests.chaos` does, and that its oracle has eyes."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from contract.rows import MEASURED, PointRow
from orchestrator.store import Store
from tests import synthetic_run
from tests.chaos import oracle, real, standin
from tests.chaos import place as places
from tests.chaos.place import ChaosPlace, chaos_place
from tests.chaos.schedule import Fault, Kind, Role, Trial, Where, trial
from tests.chaos.shape import differences, shape_of
from tests.chaos.trial import Report, carry_out
from tests.command_line import ROOT
from tests.privileged import lines, not_shown
from tests.ray_hosts import RayHosts

SUBSET = [(Where.PRIVATE, 110), (Where.PRIVATE, 111), (Where.NODES, 501)]


WITHOUT_PYTEST = """
import sys
sys.modules.update(dict.fromkeys(("pytest", "_pytest", "hypothesis")))
import tests.chaos.killed, tests.chaos.real, tests.ray_hosts
"""


def test_kills_of_real_servers_need_no_pytest() -> None:
    """On a machine with cards there may be none."""
    subprocess.run([sys.executable, "-c", WITHOUT_PYTEST], cwd=ROOT, check=True)


@pytest.mark.ray
@pytest.mark.parametrize(("where", "seed"), SUBSET)
def test_nothing_is_lost_doubled_or_left_whatever_is_killed(where: Where, seed: int, tmp_path: Path) -> None:
    with chaos_place(where) as place:
        report = carry_out(trial(seed, where), place, tmp_path)
    assert report.findings == [], f"{report}\n{report.said}"
    assert report.done


def test_a_trial_is_drawn_from_its_seed_alone_and_all_kinds_come() -> None:
    for where in Where:
        assert trial(7, where) == trial(7, where) != trial(8, where)
    every = [
        fault for where in Where for seed in range(60) for each in [trial(seed, where)]
        for fault in (*each.during, *each.after)
    ]  # fmt: skip
    assert {fault.kind for fault in every} == set(Kind)
    assert {fault.role for fault in every if fault.kind is Kind.KILL} == set(Role)


@pytest.mark.parametrize(("may_mount", "why"), [(False, " (mounting is not permitted here)"), (True, "")])
def test_what_was_drawn_and_not_done_is_said(may_mount: bool, why: str) -> None:
    kill, disk = Fault(Kind.KILL, 1.0, Role.GUARD), Fault(Kind.FULL_DISK, 2.0)
    report = Report(Trial(1, Where.PRIVATE, False, False, (kill, disk), ()), [kill], may_mount=may_mount)
    assert report.not_tried == [f"full disk{why}"]
    assert str(report).endswith(f"kill -9 of guard; not tried: full disk{why}")


def test_what_is_not_shown_for_want_of_rights_is_named_by_the_run() -> None:
    try:
        not_shown("no users")
    except pytest.skip.Exception as skipped:
        why = f"Skipped: {skipped.msg}"
    reports = [SimpleNamespace(nodeid=name, longrepr=("file", 1, why)) for name in ("a", "b")]
    reports.append(SimpleNamespace(nodeid="c", longrepr=("file", 1, "Skipped: no vLLM")))
    assert lines(reports) == ["no users:", "  a", "  b"]


def a_process(place: ChaosPlace) -> str:
    return f"process {_asleep(place, (place.hosts or place).mark)}: "


def a_server(place: ChaosPlace) -> str:
    pid = _asleep(place, place.mark)
    (place.faults / f"core.{pid}").touch()
    return f"process {pid} of a server"


def _asleep(place: ChaosPlace, mark: Path) -> int:
    command = [sys.executable, "-c", "import time; time.sleep(60)", "guard.py"]
    place.workers.append(subprocess.Popen(command, env={**os.environ, "TMPDIR": str(mark)}, text=True))
    return place.workers[-1].pid


def a_socket(place: ChaosPlace) -> str:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(place.mark / "s"))
    return f"temporary file {place.mark}/s"


def a_file(place: ChaosPlace) -> str:
    (place.mark / "file").touch()
    return f"temporary file {place.mark}/file"


def a_directory(place: ChaosPlace) -> str:
    made = (place.hosts or place).mark / "vc-left"
    made.mkdir()
    (made / "status.json").write_text('{"exit_code": null}')
    return f"temporary file {made}"


def shared_memory(place: ChaosPlace) -> str:
    made = Path("/dev/shm", f"{standin.shared_memory(place.faults)}left")
    made.touch()
    return f"shared memory {made}"


@pytest.mark.parametrize("where", list(Where))
@pytest.mark.parametrize("leave", [a_process, a_server, a_socket, a_file, a_directory, shared_memory])
def test_what_a_run_leaves_is_seen_and_cleared(
    leave: Callable[[ChaosPlace], str], where: Where, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "LEFT_LIMIT_S", 0.0)
    with tempfile.TemporaryDirectory(prefix="vct-", dir="/tmp") as made:
        mark, faults, nodes = (Path(made) / name for name in ("t", "f", "n"))
        for directory in (mark, faults, nodes):
            directory.mkdir()
        place = ChaosPlace(mark, faults, RayHosts(nodes) if where is Where.NODES else None)
        assert place.left() == []
        what = leave(place)
        try:
            for killed in (False, True):
                assert any(seen.startswith(what) for seen in place.left(killed)), place.left(killed)
        finally:
            place.clear()
            for process in place.workers:
                process.wait(20)
        assert place.left() == []


def test_what_a_killed_run_left_without_a_guard_is_for_the_next_run(tmp_path: Path) -> None:
    mark, faults = tmp_path / "t", tmp_path / "f"
    for directory in (mark, faults, mark / "vc-left"):
        directory.mkdir(parents=True)
    place = ChaosPlace(mark, faults)
    assert place.left(killed=True) == []
    (mark / "vc-left" / "status.json").write_text('{"exit_code": -9}')
    assert place.left(killed=True) == []
    assert not places._for_the_next_run(f"temporary file {mark}/vc-ray-left")  # its caretaker's


@pytest.fixture
def stored(tmp_path: Path) -> tuple[Path, int]:
    """Return a run of four measured points that is as it should be."""
    rows = [row for row in synthetic_run.rows() if row.status == MEASURED][:4]
    store = Store(tmp_path / "run")
    store.directory.mkdir()
    for row in rows:
        store.put(row)
    synthetic_run.write_tables(store.directory, rows)
    sessions: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        sessions.setdefault(row.session_id, []).append({"id": row.point_id})
    plan = [{"id": session, "points": points} for session, points in sessions.items()]
    (store.directory / "manifest.json").write_text(json.dumps({"sessions": plan}))
    return store.directory, len(rows)


def a_shard(run: Path) -> Path:
    return sorted(run.glob("shards/*/*.parquet"))[0]


def lose(run: Path) -> None:
    a_shard(run).unlink()


def halve(run: Path) -> None:
    a_shard(run).write_bytes(a_shard(run).read_bytes()[:900])


def double(run: Path) -> None:
    table = pq.read_table(run / "points.parquet")
    pq.write_table(table.take([0, 0, 1, 2, 3]), run / "points.parquet")


def invent(run: Path) -> None:
    shutil.copy(a_shard(run), a_shard(run).with_name("nobody.parquet"))


def forget_the_class(run: Path) -> None:
    (row,) = pq.read_table(a_shard(run)).to_pylist()
    Store(run).put(replace(PointRow(**row), status="failed", failure_class="odd"))


def leave_a_temporary(run: Path) -> None:
    a_shard(run).with_suffix(".parquet.tmp").touch()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lose, "lost: "),
        (halve, "its row is unreadable"),
        (double, "doubled: "),
        (invent, "a shard that nobody planned"),
        (forget_the_class, "failed without a class: odd"),
        (leave_a_temporary, "temporary file: "),
    ],
)
def test_the_oracle_sees(spoil: Callable[[Path], None], words: str, stored: tuple[Path, int]) -> None:
    run, points = stored
    kept = oracle.kept_by(run)
    assert oracle.findings(run, points, kept) == []
    assert "the manifest plans 4 points, not 5" in oracle.findings(run, points + 1, kept)
    spoil(run)
    assert any(words in finding for finding in oracle.findings(run, points, [])), oracle.findings(run, points, [])
    if spoil in (lose, halve, forget_the_class):
        assert any("measured again" in finding for finding in oracle.findings(run, points, kept))


@pytest.mark.parametrize(
    ("told", "losing", "words"),
    [
        ([], False, None),
        (["begun s p 2", "measured s p 2", "kept s p 2"], False, "measured again: p of s in start 2, which start 1"),
        (["measured {} 1"], False, "measured 2 times in start 1"),
        (["begun s q 1", "measured s q 1"], False, "measured for nothing: q of s in start 1"),
        (["begun s q 1", "measured s q 1"], True, None),
        (["begun s q 1", "begun s q 2", "measured s q 2", "kept s q 2", "begun s q 1"], False, None),
        (["halved s p 0", "begun s p 2", "measured s p 2", "kept s p 2"], False, None),
        (None, True, "measured by nobody"),
    ],
)
def test_the_oracle_sees_what_was_measured_and_is_not_in_the_store(
    told: list[str] | None, losing: bool, words: str | None, stored: tuple[Path, int]
) -> None:
    run, _ = stored
    undisturbed = ["begun s p 1", "measured s p 1", "kept s p 1"]
    points = [f"{path.parent.name} {path.stem}" for path in oracle._shards(run)]
    undisturbed += [f"{what} {point} 1" for point in points for what in ("begun", "measured", "kept")]
    lines = [] if told is None else [*undisturbed, *(line.format(points[0]) for line in told)]
    found = oracle.repeated(run, "\n".join(lines), losing)
    assert any(words in finding for finding in found) if words else found == []


def test_half_a_row_of_a_server_does_not_bar_the_artifacts_of_a_run_that_is_gone_on_with(tmp_path: Path) -> None:
    """Its points may all be done, so that nobody starts it again."""
    whole, half = (tmp_path / "shards" / name / "session.parquet" for name in ("a", "b"))
    for path in (whole, half):
        path.parent.mkdir(parents=True)
        pq.write_table(pa.table({"status": [MEASURED]}), path)
    half.write_bytes(half.read_bytes()[:200])
    assert Store(tmp_path).discard_torn() == [half]
    assert (whole.exists(), half.exists()) == (True, False)


@pytest.mark.ray
def test_a_killed_driver_leaves_nothing_and_its_run_ends_like_an_undisturbed_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What `tests.chaos.real` does to real vLLM, on the simulator."""
    asked = ["engine=sim", "cluster.num_gpus=1", "server.extra_args={step_s: 0.01}"]
    asked += ["sweep.concurrency=[1,2]", "load.requests_min=24"]
    monkeypatch.setattr(sys, "argv", ["real", "--victims", "driver", *asked])
    code, said = real.main(), capsys.readouterr().out
    assert code == 0, said
    assert "| driver | exit -9, 1 start of the server, cold |" in said
    assert "| 2 of 2, resumed 1 x | yes |" in said


def test_runs_are_told_apart_by_what_they_consist_of(stored: tuple[Path, int]) -> None:
    run, _ = stored
    shape = shape_of(run)
    assert differences(shape, shape_of(run)) == []
    gone = a_shard(run)
    gone.unlink()
    (run / "new.csv").write_text("a,b\n1,2\n")
    table = pq.read_table(run / "points.parquet")
    rows = table.to_pylist()
    rows[0]["status"] = "failed"
    pq.write_table(pa.Table.from_pylist([*rows, rows[-1]], table.schema), run / "points.parquet")
    assert differences(shape, shape_of(run)) == [
        f"no {gone.relative_to(run)}",
        "new.csv, which the undisturbed run has not",
        "columns of new.csv: ('a', 'b'), not None",
        "rows of new.csv: 1, not None",
        "rows of points.parquet: 5, not 4",
        f"statuses of {rows[0]['point_id']}: failed, not measured",
    ]
