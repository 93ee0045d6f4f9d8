"""Goodput: requests that met every objective, counted from the requests, and shown only where objectives are given."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest

from analysis import reduce
from analysis.errors import AnalysisError
from analysis.load.goodput import with_goodput
from analysis.rows.tables import read_tables
from analysis.rows.targets import Slo, read_slo
from tests import synthetic_run as synthetic
from tests import test_analysis_rates as rates


def run(tmp_path: Path, slo: dict[str, object] | None = None) -> Path:
    run_dir = synthetic.write_run(tmp_path / "run", synthetic.rows())
    (run_dir / "manifest.json").write_text(json.dumps({"slo": slo} if slo else {}))
    reduce(run_dir)
    return run_dir


def test_it_is_the_successes_within_all_limits_over_the_duration(tmp_path: Path) -> None:
    run_dir = run(tmp_path)
    slo = Slo(p95_e2e_s=0.15, p95_ttft_s=0.0145)
    requests = pd.read_parquet(run_dir / "requests.parquet")
    good = requests[requests.ok & (requests.e2e_s <= 0.15) & (requests.ttft_s <= 0.0145)].groupby("point_id").size()
    points = with_goodput(run_dir, read_tables(run_dir), slo).points
    loads = [point for point in points if point.kind == "load"]
    assert {bool(good.get(point.point_id, 0)) for point in loads} == {True, False}
    for point in loads:
        assert point.goodput_qps == pytest.approx(good.get(point.point_id, 0) / (point.duration_s or 1))
    assert all(point.goodput_qps is None for point in points if point.kind != "load")


def test_an_answer_of_one_token_cannot_miss_its_tpot(tmp_path: Path) -> None:
    run_dir = run(tmp_path)
    table = pd.read_parquet(run_dir / "requests.parquet")
    table["tpot_s"] = None
    table["tpot_s"] = table["tpot_s"].astype(float)
    table.to_parquet(run_dir / "requests.parquet")
    points = with_goodput(run_dir, read_tables(run_dir), Slo(p95_tpot_s=1e-9)).points
    assert all(p.goodput_qps == pytest.approx(p.qps) for p in points if p.kind == "load" and not p.failed)


def test_tables_show_it_only_where_there_are_objectives(tmp_path: Path) -> None:
    without, objectives = run(tmp_path / "a"), run(tmp_path / "b", {"p95_e2e_s": 0.2, "p95_ttft_s": None})
    assert read_slo(objectives) == Slo(p95_e2e_s=0.2)
    assert "goodput_qps" in (objectives / "batching_benchmark.md").read_text()
    assert "goodput_qps" not in (without / "batching_benchmark.md").read_text()


def test_requests_without_rows_are_named_and_never_counted_as_misses(tmp_path: Path) -> None:
    run_dir = synthetic.write_run(tmp_path / "run", [*synthetic.rows(), *rates.rows()])
    (run_dir / "manifest.json").write_text(json.dumps({"slo": {"p95_e2e_s": 0.2}}))
    reduce(run_dir)
    requests = pd.read_parquet(run_dir / "requests.parquet")
    requests[requests.point_id.str.startswith("batching")].to_parquet(run_dir / "requests.parquet")
    points = with_goodput(run_dir, read_tables(run_dir), Slo(p95_e2e_s=0.2)).points
    known = {point.purpose for point in points if point.goodput_qps is not None}
    assert known == {"batching"}
    shutil.rmtree(run_dir / "shards")
    reduce(run_dir)
    why = "goodput_qps is not known from this run: requests.parquet holds no rows of these requests."
    assert (run_dir / "batching_benchmark.md").read_text().count(why) == 1
    assert why in (run_dir / "rate_sweep.md").read_text()
    assert re.search(r"\| request_rate \|.*\| goodput_qps \|", (run_dir / "rate_sweep.md").read_text())


def test_objectives_that_are_no_numbers_are_none(tmp_path: Path) -> None:
    assert read_slo(run(tmp_path, {"p95_e2e_s": "soon", "p95_ttft_s": True, "p95_tpot_s": -1})) == Slo()


def test_a_foreign_table_of_requests_is_one_clear_message(tmp_path: Path) -> None:
    run_dir = run(tmp_path)
    (run_dir / "requests.parquet").write_bytes(b"PAR1 but no")
    with pytest.raises(AnalysisError, match="not a table of requests"):
        with_goodput(run_dir, read_tables(run_dir), Slo(p95_e2e_s=1.0))
