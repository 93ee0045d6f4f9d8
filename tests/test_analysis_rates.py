"""rate_sweep.md and rate_sweep.csv: numbers recomputed from the rows, and sentences that stand only where they may."""

from __future__ import annotations

import csv
import re
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from analysis import reduce
from contract.rows import CLIENT_LIMITED, PointRow
from tests import synthetic_run as synthetic

RATES = {1.0: (1.0, 1.02), 4.0: (3.9, 4.1), 16.0: (15.0, 15.8), 64.0: (30.0, 63.0)}
"""Rate: (ended a second in the steady part, offered)."""


def rows(rates: dict[float, tuple[float, float]] = RATES, repeats: int = 2) -> list[PointRow]:
    """Open-loop rows made of a concurrency sweep's."""
    model = next(row for row in synthetic.rows() if row.purpose == "concurrency")
    made = []
    for rate, (ended, offered) in rates.items():
        for repeat in range(repeats):
            made.append(
                replace(
                    model,
                    point_id=f"rate-{rate:g}-{repeat}",
                    purpose="rate",
                    sweep="rate",
                    concurrency=None,
                    repeat=repeat,
                    arrivals="poisson, 30 s",
                    request_rate=rate,
                    offered_qps=offered * (1 + repeat / 100),
                    qps=ended * 0.9,
                    p95_e2e_s=0.2 * rate**0.5,
                    steady_from_s=1.0,
                    steady_to_s=31.0,
                    steady_completed=round(30 * ended),
                    most_in_flight=round(rate) + repeat,
                    p99_send_delay_s=0.001,
                )
            )
    return made


def page(tmp_path: Path, made: list[PointRow]) -> str:
    run_dir = synthetic.write_run(tmp_path / "run", made)
    reduce(run_dir)
    return (run_dir / "rate_sweep.md").read_text()


def test_every_figure_is_what_the_rows_say(tmp_path: Path) -> None:
    run_dir = synthetic.write_run(tmp_path / "run", rows())
    written = reduce(run_dir)
    assert {"rate_sweep.md", "rate_sweep.csv", "rate_sweep.svg"} <= {path.name for path in written}
    points = pd.read_parquet(run_dir / "points.parquet")
    points["steady_qps"] = points.steady_completed / (points.steady_to_s - points.steady_from_s)
    medians = points.groupby("request_rate").median(numeric_only=True)
    checked = 0
    for line in csv.DictReader((run_dir / "figures.csv").open()):
        found = re.search(r"\.r([\d.]+)\.([a-z][a-z_0-9]*)$", line["name"])
        if line["file"] != "rate_sweep.md" or found is None or found[2] not in medians.columns:
            continue
        assert float(line["value"]) == pytest.approx(medians.loc[float(found[1]), found[2]], rel=1e-3), line
        checked += 1
    assert checked > 30
    table = pd.read_csv(run_dir / "rate_sweep.csv")
    assert list(table.request_rate) == [1, 4, 16, 64]
    assert list(table.p95_e2e_s) == pytest.approx(list(medians.p95_e2e_s), rel=1e-4)


def test_it_says_up_to_which_rate_the_server_keeps_up(tmp_path: Path) -> None:
    text = page(tmp_path, rows())
    assert "16 requests/s, at p95 0.8000 s. At 64 it did not: 30.00 ended a second" in text


def test_it_says_when_no_higher_rate_was_tried_and_when_the_lowest_was_too_much(tmp_path: Path) -> None:
    assert "4 requests/s, at p95 0.4000 s; no higher rate was tried." in page(tmp_path / "a", rows({4.0: (3.9, 4.0)}))
    assert "It did not at the lowest, 4 requests/s: 2.000 ended" in page(tmp_path / "b", rows({4.0: (2.0, 4.0)}))


def test_a_level_without_a_steady_part_leaves_the_question_open(tmp_path: Path) -> None:
    made = [replace(row, steady_completed=None) if row.request_rate == 16 else row for row in rows()]
    text = page(tmp_path, made)
    assert "Not known from this run: a level was too short for a steady part" in text
    assert "no higher rate" not in text


def test_a_level_whose_client_was_late_is_no_result(tmp_path: Path) -> None:
    made = [
        replace(row, status=CLIENT_LIMITED, failure_class=CLIENT_LIMITED) if row.request_rate == 64 else row
        for row in rows()
    ]
    text = page(tmp_path, made)
    assert "16 requests/s, at p95 0.8000 s; no higher rate was tried." in text
    assert "2 not measured (client_limited)" in text


def test_a_run_without_an_open_loop_has_no_such_page(tmp_path: Path) -> None:
    run_dir = synthetic.write_run(tmp_path / "run", synthetic.rows())
    assert not [path for path in reduce(run_dir) if path.name.startswith("rate_sweep")]
