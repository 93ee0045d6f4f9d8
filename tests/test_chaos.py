"""The harness in tests/chaos: a seeded part of what `python -m tests.chaos` does, and that its oracle has eyes."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from contract.rows import MEASURED, PointRow
from orchestrator.store import Store
from tests import synthetic_run
from tests.chaos import oracle
from tests.chaos.place import chaos_place
from tests.chaos.schedule import Kind, Role, Where, trial
from tests.chaos.trial import carry_out

SUBSET = [(Where.PRIVATE, 110), (Where.PRIVATE, 111), (Where.NODES, 501)]


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


def test_half_a_row_of_a_server_does_not_bar_the_artifacts_of_a_run_that_is_gone_on_with(tmp_path: Path) -> None:
    """Its points may all be done, so that nobody starts it again."""
    whole, half = (tmp_path / "shards" / name / "session.parquet" for name in ("a", "b"))
    for path in (whole, half):
        path.parent.mkdir(parents=True)
        pq.write_table(pa.table({"status": [MEASURED]}), path)
    half.write_bytes(half.read_bytes()[:200])
    assert Store(tmp_path).discard_torn() == [half]
    assert (whole.exists(), half.exists()) == (True, False)
