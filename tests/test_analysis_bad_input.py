"""Files that cannot be trusted: one clear message, exit 2, nothing written. Values that are none, ids like paths."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis.__main__ import main
from analysis.rows.tables import read_tables
from contract.rows import PointRow
from tests import synthetic_run as synthetic


def sent(run: Path) -> Path:
    """Write a run of tables alone, with objectives, so that its requests are read."""
    rows = [row for row in synthetic.rows() if row.kind == "memory" or row.purpose in ("concurrency", "batching")]
    synthetic.write_tables(run, rows)
    requests = {"session_id": "session-load", "point_id": "x", "ok": True, "e2e_s": 1.0, "ttft_s": 0.1, "tpot_s": 0.1}
    pq.write_table(pa.Table.from_pylist([requests]), run / "requests.parquet")
    telemetry = {"session_id": "s", "point_id": "x", "device_id": "GPU-0", "t_s": 0.1, "utilization_pct": 50.0}
    pq.write_table(pa.Table.from_pylist([telemetry]), run / "telemetry.parquet")
    samples = {"session_id": rows[0].session_id, "point_id": rows[0].point_id, "t_s": 0.1, "kv_usage": 0.5}
    pq.write_table(pa.Table.from_pylist([samples]), run / "server_samples.parquet")
    (run / "manifest.json").write_text(json.dumps({"slo": {"p95_e2e_s": 1.0}, "target": {"concurrency": 4}}))
    return run


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def foreign(path: Path) -> None:
    pq.write_table(pa.table({"a": [1]}), path)


def column(name: str, values: Callable[[int], pa.Array]) -> Callable[[Path], None]:
    """Return what puts other values into a column."""

    def spoil(path: Path) -> None:
        table = pq.ParquetFile(path).read()
        pq.write_table(table.set_column(table.column_names.index(name), name, values(table.num_rows)), path)

    return spoil


def twice(name: str) -> Callable[[Path], None]:
    """Return what adds a second column of the same name."""

    def spoil(path: Path) -> None:
        table = pq.ParquetFile(path).read()
        pq.write_table(table.append_column(name, table.column(name)), path)

    return spoil


def lists(rows: int) -> pa.Array:
    return pa.array([[1]] * rows)


def words(rows: int) -> pa.Array:
    return pa.array(["many"] * rows)


def version(rows: int) -> pa.Array:
    return pa.array([99] * rows)


def nothing(rows: int) -> pa.Array:
    return pa.nulls(rows, pa.string())


SPOILED = {
    "points truncated": ("points", truncate, "not a readable Parquet file"),
    "points empty": ("points", empty, "not a readable Parquet file"),
    "points foreign": ("points", foreign, "schema version none"),
    "points of a later version": ("points", column("schema_version", version), "schema version 99"),
    "points of a version that is none": ("points", column("schema_version", lists), "schema version none"),
    "points with another type": ("points", column("tok_s", words), "another type"),
    "points with nested values": ("points", column("max_model_len", lists), "another type"),
    "points with a column twice": ("points", twice("tok_s"), "unknown: tok_s"),
    "points without a model": ("points", column("model", nothing), "model is empty"),
    "sessions truncated": ("sessions", truncate, "not a readable Parquet file"),
    "sessions foreign": ("sessions", foreign, "schema version none"),
    "sessions with another type": ("sessions", column("ready_s", words), "another type"),
}
READ_FOR_ARTIFACTS = {
    "requests truncated": ("requests", truncate, "not a table of requests"),
    "requests foreign": ("requests", foreign, "not a table of requests"),
    "requests with another type": ("requests", column("e2e_s", words), "not a table of requests"),
    "requests with nested values": ("requests", column("ok", lists), "not a table of requests"),
    "server samples truncated": ("server_samples", truncate, "not a table of server_samples"),
    "server samples with another type": ("server_samples", column("kv_usage", lists), "not a table of server_samples"),
    "telemetry truncated": ("telemetry", truncate, "not a table of telemetry"),
    "telemetry foreign": ("telemetry", foreign, "not a table of telemetry"),
    "telemetry with another type": ("telemetry", column("t_s", words), "not a table of telemetry"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sent(tmp_path_factory.mktemp("good") / "good")


def refused(arguments: list[str], table: Path, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in table.parent.rglob("*")}
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("analysis: ")
    assert message in captured.err
    assert str(table) in captured.err
    assert {path: path.stat().st_mtime_ns for path in table.parent.rglob("*")} == before


@pytest.mark.parametrize("name", [*SPOILED, *READ_FOR_ARTIFACTS])
def test_artifacts_of_a_run_that_cannot_be_trusted(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, spoil, message = (SPOILED | READ_FOR_ARTIFACTS)[name]
    table = sent(tmp_path / "run") / f"{file}.parquet"
    spoil(table)
    refused([str(table.parent)], table, message, capsys)


@pytest.mark.parametrize("file", ["requests", "telemetry", "server_samples"])
@pytest.mark.parametrize("spoil", [truncate, empty, foreign])
def test_a_table_that_nothing_will_be_read_from_is_refused_too(
    file: str, spoil: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Requests are read for goodput alone, which needs an objective."""
    table = sent(tmp_path / "run") / f"{file}.parquet"
    (table.parent / "manifest.json").unlink()
    spoil(table)
    refused([str(table.parent)], table, f"not a table of {file}", capsys)


@pytest.mark.parametrize("name", SPOILED)
def test_tools_on_a_run_that_cannot_be_trusted(
    name: str, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, spoil, message = SPOILED[name]
    table = sent(tmp_path / "run") / f"{file}.parquet"
    spoil(table)
    for arguments in (["compare", str(good), str(table.parent)], ["drift", str(table.parent), str(good), "--json"]):
        refused(arguments, table, message, capsys)
    refused(["whatif", str(table.parent), "concurrency=1"], table, message, capsys)


def test_the_run_itself_is_fine(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["drift", str(good), str(good)]) == 0
    assert main(["whatif", str(good), "max_model_len=8192"]) == 0
    assert main([str(good)]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "manifest", ["", "[]", "{", '{"slo": [], "sessions": [{"id": 1}], "versions": 3}', "[" * 100_000]
)
def test_a_manifest_that_is_none_is_no_manifest(good: Path, manifest: str, tmp_path: Path) -> None:
    run = sent(tmp_path / "run")
    (run / "manifest.json").write_text(manifest)
    for arguments in (["whatif", str(run), "concurrency=1"], ["drift", str(good), str(run)]):
        assert main(arguments) == 0


def test_a_number_that_is_none_is_not_shown(tmp_path: Path) -> None:
    row = next(row for row in synthetic.rows() if row.purpose == "concurrency")
    odd = replace(row, tok_s=math.nan, p95_e2e_s=math.inf, server_queue_p95_le_s=math.inf)
    (point,) = read_tables(synthetic.write_tables(tmp_path, [odd])).points
    assert (point.tok_s, point.p95_e2e_s, point.server_queue_p95_le_s) == (None, None, math.inf)


def test_ids_in_rows_never_become_paths(tmp_path: Path) -> None:
    ids = {"run_id": "../../run", "session_id": "../../../session", "point_id": "/tmp/point"}
    run = tmp_path / "a" / "b" / "run"
    rows = [replace(row, **ids | {"point_id": f"/tmp/{row.point_id}"}) for row in synthetic.rows()[:8]]
    synthetic.write_tables(run, rows)
    other = synthetic.write_tables(tmp_path / "a" / "b" / "other", rows)
    for arguments in ([str(run)], ["compare", str(run), str(other)], ["whatif", str(run), "concurrency=1"]):
        assert main(arguments) == 0
    assert not list(Path("/tmp").glob("committed-*"))
    outside = {path for path in tmp_path.rglob("*") if not path.is_relative_to(run) and not path.is_relative_to(other)}
    assert outside == {tmp_path / "a", tmp_path / "a" / "b"}
    assert {path.name for path in other.iterdir()} == {"points.parquet", "sessions.parquet"}


def test_escapes_of_a_terminal_do_not_reach_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[PointRow] = [
        replace(row, model="\x1b[2Jmodel\n", vllm_version="\x1b]0;x\x07") for row in synthetic.rows()[:8]
    ]
    runs = [str(synthetic.write_tables(tmp_path / name, rows)) for name in ("a", "b\x1b[2J")]
    for arguments in (["compare", *runs], ["drift", *runs], ["whatif", runs[0], "concurrency=1"]):
        assert main(arguments) == 0
        assert "\x1b" not in capsys.readouterr().out


MISSING: list[tuple[str, Callable[[PointRow], bool], str]] = [
    ("kv_cache_scaling_notes.md", lambda row: row.mode == "committed" and row.kind == "memory", "no utilization rows"),
    ("kv_cache_scaling_notes.md", lambda row: row.kind == "load", "no readings of memory"),
    ("batching_benchmark.md", lambda row: row.purpose == "concurrency", "What concurrency buys"),
    ("batching_benchmark.md", lambda row: row.kind == "memory", "no levels of a closed loop"),
    ("operating_point.md", lambda row: row.kind == "memory", "no levels of load to choose from"),
]


@pytest.mark.parametrize(("page", "kept", "missing"), MISSING, ids=[missing for *_, missing in MISSING])
def test_a_page_whose_rows_are_missing_names_them_and_the_sweep(
    page: str, kept: Callable[[PointRow], bool], missing: str, tmp_path: Path
) -> None:
    run = synthetic.write_tables(tmp_path, [row for row in synthetic.rows() if kept(row)])
    assert main([str(run)]) == 0
    (line,) = [line for line in (run / page).read_text().splitlines() if missing in line]
    assert "not known from this run" in line.lower()
    assert "`+sweep=" in line
