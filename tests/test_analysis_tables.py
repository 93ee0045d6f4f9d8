"""Shards become tables, whole or with one clear message; nothing is written outside the run directory."""

import os
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis import AnalysisError, answer, reduce
from analysis.memory.kv_account import Accounts
from analysis.memory.kv_fit import kv_results
from analysis.rows.shards import build_tables
from analysis.rows.tables import NESTED, read_tables
from contract.lateness import RAISED
from contract.rows import SCHEMA_VERSION, ClientRow, PointRow, SessionRow, to_table
from tests import synthetic_run as synthetic


def frame(run_dir: Path, name: str) -> pd.DataFrame:
    return pd.read_parquet(run_dir / f"{name}.parquet")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return synthetic.write_run(tmp_path / "run", synthetic.rows()[:12])


def test_points_carry_their_session(run: Path) -> None:
    build_tables(run)
    points = frame(run, "points")
    assert set(points.ready_s) == {42.0}
    assert set(points.memory_back_s) == {0.5}
    assert set(points.node) == {"node-a"}
    assert "requests" not in points.columns


def test_requests_carry_the_ids_of_their_point(run: Path) -> None:
    build_tables(run)
    requests, points = frame(run, "requests"), frame(run, "points")
    counts = requests.groupby("point_id").size()
    measured = points[points.kind == "load"].set_index("point_id").num_requests
    assert counts.to_dict() == measured.astype(int).to_dict()
    assert not requests.simulated.any()
    assert frame(run, "telemetry").power_w.notna().all()


def test_rows_come_back_as_they_were_written(run: Path) -> None:
    build_tables(run)
    by_id = {row.point_id: row for row in synthetic.rows()[:12]}
    for point in read_tables(run).points:
        row = by_id[point.point_id]
        for name in PointRow.__slots__:
            if name not in NESTED:
                assert getattr(point, name) == getattr(row, name), name


def test_run_that_was_sent_without_shards_is_analysed_from_its_tables(run: Path) -> None:
    reduce(run)
    before = (run / "kv_cache_scaling.csv").read_bytes()
    (run / "kv_cache_scaling.csv").unlink()
    for shard in (run / "shards").rglob("*.parquet"):
        shard.unlink()
    reduce(run)
    assert (run / "kv_cache_scaling.csv").read_bytes() == before


def test_session_without_points_is_enough_for_tables(tmp_path: Path) -> None:
    synthetic.write_run(tmp_path, synthetic.rows()[:1])
    (tmp_path / "shards/session-c512/committed-512.parquet").unlink()
    tables = ["points.parquet", "requests.parquet", "telemetry.parquet", "server_samples.parquet", "sessions.parquet"]
    pages = ["kv_cache_scaling_notes.md", "batching_benchmark.md", "operating_point.md", "report.html", "figures.csv"]
    assert [path.name for path in reduce(tmp_path)] == [*tables, *pages]
    nothing, incomplete, files = answer(tmp_path).splitlines()
    assert (nothing, files) == ("No point was measured.", f"Files: {tmp_path}")
    assert incomplete.startswith("no manifest.json that can be read in this run: its objectives, targets")
    for shard in (tmp_path / "shards").rglob("*.parquet"):
        shard.unlink()
    assert [path.name for path in reduce(tmp_path)] == pages


def test_a_point_has_its_own_start_of_the_server_and_a_session_all_of_them(run: Path) -> None:
    row = synthetic.rows()[0]
    first = replace(synthetic.session_of(row), status="failed", node="node-a", memory_back_s=None)
    last = replace(first, attempt=2, status="measured", node="node-b", memory_back_s=0.7)
    shard = run / "shards/session-c512/session.parquet"
    pq.write_table(to_table([last, first], SessionRow), shard)
    build_tables(run)
    point = next(point for point in read_tables(run).points if point.session_id == "session-c512")
    assert (point.attempt, point.node, point.memory_back_s) == (1, "node-a", None)
    starts = [s for s in read_tables(run).sessions if s.session_id == "session-c512"]
    assert sorted((s.attempt, s.status) for s in starts) == [(1, "failed"), (2, "measured")]
    reading = next(
        each for each in kv_results(read_tables(run).points)[0].committed[0].series.measured if each.at == 512
    )
    assert Accounts(read_tables(run).sessions).at(reading, "ready") is not None, "of its own start"
    pq.write_table(to_table([replace(last, attempt=3)], SessionRow), shard)
    build_tables(run)
    point = next(point for point in read_tables(run).points if point.session_id == "session-c512")
    assert (point.node, point.ready_s) == (None, None), "of another start's server it has nothing"
    pq.write_table(to_table([last, last], SessionRow), shard)
    with pytest.raises(AnalysisError, match="one row a start"):
        build_tables(run)


def test_last_attempt_wins_in_tables_that_hold_them_all(run: Path) -> None:
    build_tables(run)
    known = read_tables(run)
    table = pq.ParquetFile(run / "points.parquet").read()
    earlier = [row | {"attempt": 0, "status": "failed", "tok_s": 1.0} for row in table.to_pylist()]
    both = pa.concat_tables([pa.Table.from_pylist(earlier, schema=table.schema), table])
    pq.write_table(both, run / "points.parquet")
    assert read_tables(run) == known
    table = pq.ParquetFile(run / "sessions.parquet").read()
    pq.write_table(pa.concat_tables([table, table]), run / "sessions.parquet")
    with pytest.raises(AnalysisError, match="holds a start of a session twice"):
        read_tables(run)


def test_point_whose_session_row_is_not_yet_there_is_kept(run: Path) -> None:
    (run / "shards/session-c512/session.parquet").unlink()
    build_tables(run)
    points = frame(run, "points").set_index("point_id")
    assert points.ready_s.isna()["committed-512"]


def test_empty_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AnalysisError, match="nothing to analyse"):
        reduce(tmp_path)
    with pytest.raises(AnalysisError, match="no such run directory"):
        reduce(tmp_path / "missing")


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def _other_version(path: Path) -> None:
    pq.write_table(to_table([replace(synthetic.rows()[0], schema_version=99)], PointRow), path)


def _foreign(path: Path) -> None:
    pq.write_table(pa.table({"a": [1]}), path)


def _unknown_column(path: Path) -> None:
    pq.write_table(to_table([synthetic.rows()[0]], PointRow).append_column("surprise", pa.array([1])), path)


def _wrong_type(path: Path) -> None:
    table = to_table([synthetic.rows()[0]], PointRow)
    index = table.column_names.index("max_model_len")
    pq.write_table(table.set_column(index, "max_model_len", pa.array(["long"])), path)


def _no_status(path: Path) -> None:
    table = to_table([synthetic.rows()[0]], PointRow)
    pq.write_table(table.set_column(table.column_names.index("status"), "status", pa.array([None], pa.string())), path)


def _two_rows(path: Path) -> None:
    pq.write_table(to_table(synthetic.rows()[:2], PointRow), path)


def _another_point(path: Path) -> None:
    pq.write_table(to_table([replace(synthetic.rows()[0], point_id="../../elsewhere")], PointRow), path)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_truncate, "not a readable Parquet file"),
        (_other_version, "schema version 99, this analysis reads versions up to"),
        (_foreign, "schema version none"),
        (_unknown_column, "unknown: surprise"),
        (_wrong_type, "another type"),
        (_no_status, "status is empty"),
        (_two_rows, "holds one row"),
        (_another_point, "not the shard its path says"),
    ],
)
def test_shard_that_cannot_be_trusted_stops_the_analysis_by_name(run: Path, spoil, words: str) -> None:  # type: ignore[no-untyped-def]
    shard = run / "shards/session-c512/committed-512.parquet"
    spoil(shard)
    with pytest.raises(AnalysisError, match=words) as caught:
        reduce(run)
    assert str(shard) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not (run / "points.parquet").exists()


NEW_IN_4 = ("token_count_difference", "server_steps", "server_samples")


def _older(path: Path, *without: str) -> None:
    row = replace(synthetic.rows()[-1], schema_version=3)
    path.parent.mkdir(parents=True)
    pq.write_table(to_table([row], PointRow).drop_columns(list(without)), path.parent / f"{row.point_id}.parquet")


def test_run_of_an_older_version_is_read_without_the_columns_it_had_not(tmp_path: Path) -> None:
    row = synthetic.rows()[-1]
    _older(tmp_path / "shards" / row.session_id / "x", *NEW_IN_4)
    build_tables(tmp_path)
    (point,) = read_tables(tmp_path).points
    assert (point.schema_version, point.tok_s) == (3, row.tok_s)
    assert (point.token_count_difference, point.server_steps) == (None, None)
    assert frame(tmp_path, "server_samples").empty
    assert len(frame(tmp_path, "requests")) == row.num_requests
    reduce(tmp_path)


def test_what_only_an_older_version_had_is_left_out(tmp_path: Path) -> None:
    """Up to version 5 the cost of telemetry was wall time: it is no CPU time, and not read as such."""
    row = replace(synthetic.rows()[-1], schema_version=5)
    shard = tmp_path / "shards" / row.session_id / f"{row.point_id}.parquet"
    shard.parent.mkdir(parents=True)
    content = to_table([row], PointRow).drop_columns(["sampling_cpu_share"])
    content = content.append_column("telemetry_cost_share", pa.array([0.07], pa.float64()))
    pq.write_table(content, shard)
    build_tables(tmp_path)
    (point,) = read_tables(tmp_path).points
    assert (point.sampling_cpu_share, point.telemetry_hz) == (None, row.telemetry_hz)
    pq.write_table(content.set_column(0, "schema_version", pa.array([SCHEMA_VERSION])), shard)
    with pytest.raises(AnalysisError, match=r"missing: sampling_cpu_share; unknown: telemetry_cost_share"):
        build_tables(tmp_path)


def test_what_an_older_versions_nested_rows_had_not_is_empty(tmp_path: Path) -> None:
    """Version 5 added to samples and load processes."""
    row = replace(synthetic.rows()[-1], schema_version=4, clients=[ClientRow(8, 0.1)])
    shard = tmp_path / "shards" / row.session_id / f"{row.point_id}.parquet"
    shard.parent.mkdir(parents=True)
    content = to_table([row], PointRow).to_pylist()[0]
    for client in content["clients"]:
        for name in ("gap_p99_raised_s", "ttft_p95_raised_s", "held_s", "in_flight"):
            del client[name]
    for sample in content["server_samples"]:
        del sample["prefix_hits"], sample["ttft_total_s"]
    missing = ("sent_qps", "ended_qps", "keeps_up", "server_hz")
    pq.write_table(pa.Table.from_pylist([content]).drop_columns(list(missing)), shard)
    build_tables(tmp_path)
    (point,) = read_tables(tmp_path).points
    assert (point.keeps_up, point.server_hz, point.tok_s) == (None, None, row.tok_s)
    assert point.clients[0].gap_p99_raised_s is None
    assert frame(tmp_path, "server_samples").prefix_hits.isna().all()


def test_load_processes_of_before_version_10_say_nothing_of_e2el_and_tpot(tmp_path: Path) -> None:
    row = replace(synthetic.rows()[-1], schema_version=9, clients=[ClientRow(8, 0.1, gap_p99_raised_s=0.003)])
    shard = tmp_path / "shards" / row.session_id / f"{row.point_id}.parquet"
    shard.parent.mkdir(parents=True)
    content = to_table([row], PointRow).to_pylist()[0]
    for client in content["clients"]:
        del client["e2e_p95_raised_s"], client["tpot_p95_raised_s"]
    pq.write_table(pa.Table.from_pylist([content]), shard)
    build_tables(tmp_path)
    (client,) = read_tables(tmp_path).points[0].clients
    assert (client.gap_p99_raised_s, client.e2e_p95_raised_s, client.tpot_p95_raised_s) == (0.003, None, None)


def test_levels_of_before_version_12_say_only_what_a_process_did_to_its_own_figures(tmp_path: Path) -> None:
    row = replace(synthetic.rows()[-1], schema_version=11, clients=[ClientRow(8, 0.1, gap_p99_raised_s=0.003)])
    shard = tmp_path / "shards" / row.session_id / f"{row.point_id}.parquet"
    shard.parent.mkdir(parents=True)
    content = to_table([row], PointRow).to_pylist()[0]
    for name in RAISED:
        del content[name]
    pq.write_table(pa.Table.from_pylist([content]), shard)
    build_tables(tmp_path)
    (point,) = read_tables(tmp_path).points
    assert {getattr(point, name) for name in RAISED} == {None}
    assert (point.clients[0].gap_p99_raised_s, point.tok_s) == (0.003, row.tok_s)


def test_requests_of_before_version_9_have_no_time_of_connecting(tmp_path: Path) -> None:
    row = replace(synthetic.rows()[-1], schema_version=8)
    shard = tmp_path / "shards" / row.session_id / f"{row.point_id}.parquet"
    shard.parent.mkdir(parents=True)
    content = to_table([row], PointRow).to_pylist()[0]
    for request in content["requests"]:
        del request["connect_s"]
    del content["p99_connect_s"]
    pq.write_table(pa.Table.from_pylist([content]), shard)
    build_tables(tmp_path)
    (point,) = read_tables(tmp_path).points
    assert (point.p99_connect_s, point.tok_s) == (None, row.tok_s)
    assert frame(tmp_path, "requests").connect_s.isna().all()
    assert len(frame(tmp_path, "requests")) == row.num_requests


def test_an_account_of_before_version_7_is_read_without_what_the_workers_read_since(tmp_path: Path) -> None:
    synthetic.write_run(tmp_path, synthetic.rows()[:1])
    (shard,) = tmp_path.glob("shards/*/session.parquet")
    (content,) = pq.read_table(shard).to_pylist()
    for part in content["account"]:
        del part["outside_now_bytes"], part["outside_at_init_bytes"]
    pq.write_table(pa.Table.from_pylist([content | {"schema_version": 6}]), shard)
    build_tables(tmp_path)
    (session,) = read_tables(tmp_path).sessions
    assert {part.outside_now_bytes for part in session.account} == {None}
    assert session.account[0].outside_bytes == 757 * 2**20


def test_what_a_row_must_say_is_missed_in_an_older_version_too(tmp_path: Path) -> None:
    _older(tmp_path / "shards" / synthetic.rows()[-1].session_id / "x", "max_model_len", *NEW_IN_4)
    with pytest.raises(AnalysisError, match=r"missing: max_model_len; unknown: none"):
        build_tables(tmp_path)


def test_column_that_this_version_has_is_not_made_up(run: Path) -> None:
    shard = run / "shards/session-c512/committed-512.parquet"
    pq.write_table(to_table([synthetic.rows()[0]], PointRow).drop_columns(["server_steps"]), shard)
    with pytest.raises(AnalysisError, match="missing: server_steps"):
        build_tables(run)


def test_half_written_files_of_the_driver_are_ignored(run: Path) -> None:
    (run / "shards/session-c512/.committed-512.parquet.tmp").write_bytes(b"half")
    (run / "shards/session-c512/.hidden.parquet").write_bytes(b"half")
    build_tables(run)


def test_names_in_rows_never_become_paths(tmp_path: Path) -> None:
    shape = replace(synthetic.GPU, model="../../../tmp/evil", device_name="/etc/passwd")
    other = replace(shape, model="../other")
    run = tmp_path / "a" / "run"
    rows = [replace(r, session_id=f"o-{r.session_id}") for r in synthetic.rows(other)]
    synthetic.write_run(run, [*synthetic.rows(shape), *rows])
    written = reduce(run)
    assert all(path.resolve().is_relative_to(run.resolve()) for path in written)
    assert {path.name for path in tmp_path.rglob("*") if run not in path.parents} == {"a", "run"}


def test_artifacts_are_not_written_through_links(run: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    secret = outside / "secret"
    secret.write_text("untouched")
    (run / "kv_cache_scaling.csv").symlink_to(secret)
    reduce(run)
    assert secret.read_text() == "untouched"
    assert not (run / "kv_cache_scaling.csv").is_symlink()
    for plot in (run / "plots").iterdir():
        plot.unlink()
    (run / "plots").rmdir()
    (run / "plots").symlink_to(outside)
    with pytest.raises(AnalysisError, match="is a link"):
        reduce(run)


def test_run_reached_through_a_link_is_analysed(run: Path, tmp_path: Path) -> None:
    (tmp_path / "latest").symlink_to(run)
    assert reduce(tmp_path / "latest")


def test_no_temporary_file_stays_and_files_are_readable_by_others(run: Path) -> None:
    written = reduce(run)
    assert not list(run.rglob("*.tmp"))
    umask = os.umask(0)
    os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in written} == {0o666 & ~umask}


@pytest.mark.parametrize("name", ["example-cpu", "example-h100", "example-h200", "example-h200-slo"])
def test_the_runs_that_are_kept_can_be_read(name: str) -> None:
    tables = read_tables(Path(__file__).parent.parent / "outputs" / name)
    assert tables.points
    assert tables.sessions
