"""Summaries: numpy's percentiles, Little's law, and nothing invented where nothing succeeded."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, fields, replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contract.rows import PointRow, RequestRow
from workers.load.limits import achieved_share
from workers.load.summary import (
    LoadSummary,
    in_flight_from,
    mean_in_flight,
    percentile,
    percentile_of_counts,
    summarize,
)

seconds = st.floats(0, 1e4, allow_nan=False)


def request(sent_s: float, e2e_s: float, ok: bool = True, tokens: int = 10) -> RequestRow:
    tpot_s = e2e_s / 2 / (tokens - 1) if tokens > 1 else None
    return RequestRow(0, sent_s, ok, e2e_s / 2, e2e_s, tpot_s, prompt_tokens=100, completion_tokens=tokens)


requests = st.lists(st.builds(request, seconds, seconds, st.booleans(), st.integers(1, 50)), max_size=30)


@given(st.lists(seconds, min_size=1, max_size=60), st.floats(0, 100))
def test_percentile_is_numpys_default(values: list[float], q: float) -> None:
    assert percentile(values, q) == pytest.approx(float(np.percentile(values, q)), rel=1e-9, abs=1e-9)


@given(st.lists(st.integers(0, 20), max_size=60), st.floats(0, 100))
def test_the_percentile_of_counts_is_that_of_what_was_counted(values: list[int], q: float) -> None:
    assert percentile_of_counts(Counter(values), q) == percentile(values, q)


@given(
    st.lists(st.tuples(st.builds(request, seconds, seconds, st.booleans()), st.floats(0, 5)), min_size=1, max_size=30)
)
def test_littles_law_holds_between_rate_time_and_the_sweep_of_sends_and_ends(
    requests: list[tuple[RequestRow, float]],
) -> None:
    """L = lambda * W: the requests in flight, counted at every send and last byte, against rate times mean time."""
    rows = [replace(row, last_byte_s=(row.e2e_s or 0.0) + more_s) for row, more_s in requests]
    duration_s = max(row.sent_s + (row.last_byte_s or 0.0) for row in rows) + 1.0
    swept = [*in_flight_from(rows), (duration_s, 0)]
    area = sum(count * (until_s - at_s) for (at_s, count), (until_s, _) in pairwise(swept))
    rate, mean_s = len(rows) / duration_s, sum(row.last_byte_s or 0.0 for row in rows) / len(rows)
    assert area / duration_s == pytest.approx(rate * mean_s, abs=1e-6)
    assert summarize(rows, duration_s).achieved_concurrency == pytest.approx(area / duration_s, abs=1e-6)
    assert summarize(rows, duration_s).most_in_flight == max(count for _, count in swept)


@given(requests, st.floats(0.1, 2e4))
def test_concurrency_is_the_integral_of_requests_in_flight(rows: list[RequestRow], duration_s: float) -> None:
    events = sorted(
        [(min(row.sent_s, duration_s), 1) for row in rows]
        + [(min(row.sent_s + (row.e2e_s or 0), duration_s), -1) for row in rows]
    )
    area, in_flight, before = 0.0, 0, 0.0
    for at, step in events:
        area += in_flight * (at - before)
        in_flight, before = in_flight + step, at
    assert mean_in_flight(rows, duration_s) == pytest.approx(area / duration_s, rel=1e-9, abs=1e-6)


@given(st.lists(st.tuples(seconds, st.floats(0, 5)), min_size=9, max_size=30))
def test_a_request_is_in_flight_to_its_last_byte_in_a_summary_as_for_the_gate(spans: list[tuple[float, float]]) -> None:
    """The usage chunk and [DONE] are in it; a lone stream's requests, one straight after the other."""
    rows: list[RequestRow] = []
    for e2e_s, more_s in spans:
        sent_s = rows[-1].sent_s + (rows[-1].last_byte_s or 0.0) if rows else 0.0
        rows.append(replace(request(sent_s, e2e_s + 1e-3), last_byte_s=e2e_s + 1e-3 + more_s))
    end_s = rows[-1].sent_s + (rows[-1].last_byte_s or 0.0)
    assert summarize(rows, end_s).achieved_concurrency == pytest.approx(1)
    assert achieved_share(rows, 1) == pytest.approx(1)


@given(requests)
def test_failed_requests_move_no_latency_and_no_throughput(rows: list[RequestRow]) -> None:
    every, only = summarize(rows, 10.0), summarize([row for row in rows if row.ok], 10.0)
    assert every.failed == sum(not row.ok for row in rows)
    different = {"failed", "achieved_concurrency", "most_in_flight"}
    assert {k: v for k, v in asdict(every).items() if k not in different} == {
        k: v for k, v in asdict(only).items() if k not in different
    }


def test_a_small_load_by_hand() -> None:
    rows = [request(0, 2, tokens=11), request(0, 4, tokens=11), request(2, 2, tokens=1), request(0, 1, ok=False)]
    summary = summarize(rows, 4.0)
    assert (summary.completed, summary.failed, summary.duration_s) == (3, 1, 4.0)
    e2e = [summary.mean_e2e_s, summary.p50_e2e_s, summary.p95_e2e_s, summary.p99_e2e_s]
    assert e2e == pytest.approx([8 / 3, 2, 3.8, 3.96])
    assert [summary.mean_ttft_s, summary.p50_ttft_s, summary.p95_ttft_s] == pytest.approx([4 / 3, 1, 1.9])
    assert summary.mean_tpot_s == pytest.approx((0.1 + 0.2) / 2)  # one token has none
    assert summary.qps == 3 / 4
    assert summary.tok_s == 23 / 4
    assert summary.total_tok_s == 323 / 4
    assert summary.achieved_concurrency == (2 + 4 + 2 + 1) / 4


@pytest.mark.parametrize("rows", [[], [request(0, 1, ok=False)]])
def test_without_a_success_nothing_is_zero(rows: list[RequestRow]) -> None:
    summary = summarize(rows, 2.0)
    measured = {"completed", "failed", "duration_s", "achieved_concurrency", "most_in_flight"}
    assert summary.completed == 0
    assert summary.achieved_concurrency == len(rows) / 2
    assert {getattr(summary, column.name) for column in fields(LoadSummary) if column.name not in measured} == {None}


def test_prompt_tokens_a_server_left_out_are_not_counted_as_none_sent() -> None:
    row = request(0, 1)
    row.prompt_tokens = None
    assert summarize([row, request(0, 1)], 2.0).total_tok_s is None
    assert summarize([row, request(0, 1)], 2.0).tok_s == 10


def test_an_empty_window_has_no_rates() -> None:
    summary = summarize([request(0, 0)], 0.0)
    assert (summary.qps, summary.tok_s, summary.total_tok_s, summary.achieved_concurrency) == (None, None, None, None)


def test_every_field_is_a_column_of_a_point() -> None:
    assert {column.name for column in fields(LoadSummary)} <= {column.name for column in fields(PointRow)}
