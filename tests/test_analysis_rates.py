"""rate_sweep.md and rate_sweep.csv: numbers recomputed from the rows, and sentences that stand only where they may."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd
import pytest

from analysis import reduce
from contract.arrivals import ArrivalProcess, Arrivals, Stage
from contract.rows import CLIENT_LIMITED, PointRow, RequestRow
from tests import synthetic_run as synthetic
from workers.load.keeping_up import keeping_up, waits_s

RATES = (1.0, 4.0, 16.0, 64.0)


def rows(
    rates: Sequence[float] = RATES, repeats: int = 2, capacity: float = 30.0, seconds: float = 30
) -> list[PointRow]:
    """Open-loop rows made of a concurrency sweep's, of a server that ends `capacity` requests a second."""
    model = next(row for row in synthetic.rows() if row.purpose == "concurrency")
    made = []
    for rate in rates:
        for repeat in range(repeats):
            arrivals = Arrivals(ArrivalProcess.CONSTANT, rate, (Stage(seconds),))
            sends = arrivals.times(arrivals.requests, "")
            waits = waits_s(sends, capacity * (1 + repeat / 100))
            requests = [
                RequestRow(n, at_s, True, ttft_s=0.01, e2e_s=wait_s + 0.2, completion_tokens=8)
                for n, (at_s, wait_s) in enumerate(zip(sends, waits, strict=True))
            ]
            found = keeping_up(requests)
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
                    offered_qps=rate * (1 + repeat / 100),
                    **(asdict(found) if found else {}),
                    qps=min(rate, capacity) * 0.9,
                    p95_e2e_s=0.2 * rate**0.5,
                    steady_from_s=1.0,
                    steady_to_s=31.0,
                    requests=requests,
                    most_in_flight=round(rate) + repeat,
                    p99_send_delay_s=0.001,
                    p99_connect_s=0.0005 * (1 + repeat),
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
    requests = pd.read_parquet(run_dir / "requests.parquet").sort_values("sent_s")
    for at, point_id in points.point_id.items():
        own = requests[requests.point_id == point_id]
        n = len(own) // 4
        first, last, apart = own.iloc[:n], own.iloc[len(own) - n :], len(own) - n
        sent_s = last.sent_s.mean() - first.sent_s.mean()
        points.loc[at, "sent_qps"] = apart / sent_s
        points.loc[at, "ended_qps"] = apart / (sent_s + last.e2e_s.mean() - first.e2e_s.mean())
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
    assert list(table.p99_connect_s) == pytest.approx([0.00075] * 4)


def test_it_says_up_to_which_rate_the_server_keeps_up(tmp_path: Path) -> None:
    text = page(tmp_path, rows())
    assert "16 requests/s, at p95 0.8000 s. At 64 it did not: 30.15 ended a second, less than 90 % of the 64.00" in text


def test_it_says_when_no_higher_rate_was_tried_and_when_the_lowest_was_too_much(tmp_path: Path) -> None:
    assert "4 requests/s, at p95 0.4000 s; no higher rate was tried." in page(tmp_path / "a", rows([4.0]))
    assert "keep up? At 4 it did not: 2.010 ended a second" in page(tmp_path / "b", rows([4.0], capacity=2.0))


def test_a_level_far_beyond_the_servers_limit_does_not_hide_the_others(tmp_path: Path) -> None:
    text = page(tmp_path, rows((1.0, 4.0, 500.0), capacity=6.0))
    assert "4 requests/s, at p95 0.4000 s. At 500 it did not: 6.030 ended a second" in text


def test_the_answer_holds_up_to_the_first_level_that_leaves_it_open(tmp_path: Path) -> None:
    made = [replace(row, keeps_up=None) if row.request_rate == 16 else row for row in rows()]
    text = page(tmp_path / "a", made)
    assert "4 requests/s, at p95 0.4000 s. At 16 that is not known from this run" in text
    assert "A longer level (sweep.seconds) would tell." in text
    assert "no higher rate" not in text
    made = [replace(row, keeps_up=row.repeat == 0) if row.request_rate == 1 else row for row in rows()]
    assert "keep up? At 1 that is not known from this run" in page(tmp_path / "b", made)
    short = rows(seconds=15)
    assert [row.keeps_up for row in short if row.request_rate == 1] == [None, None]  # too few requests
    assert "keep up (ends at least 90 % of what is sent)? 16 requests/s" in page(tmp_path / "c", short)
    assert "keep up? At 1 that is not known" in page(tmp_path / "d", [r for r in short if r.request_rate in (1, 64)])


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


def test_rates_with_others_on_the_card_are_named(tmp_path: Path) -> None:
    made = synthetic.changed(rows(), lambda r: r.request_rate == 16, foreign_processes=["pid 7 on GPU-0: 300 MiB"])
    text = page(tmp_path, made)
    assert "another process on the card: pid 7 on GPU-0: 300 MiB |" in text
    assert "- Other processes were on the card at 16 requests/s." in text
    report = (tmp_path / "run" / "report.html").read_text()
    assert "at 16 requests/s in 2 of 2 repeats another process on the card" in report
