"""Drift of a server while it lives: how often a steady one is marked, how often a true drift is found, what is said."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from analysis.load.anchors import with_drift
from analysis.numbers.anchor_drift import Drift, Timed, find_drift
from analysis.pages.batching import batching_page
from benchmarks import drift_truth
from benchmarks.drift_truth import Session
from tests import synthetic_run as synthetic


@pytest.mark.parametrize("sd", [0.01, 0.02, 0.03])
@pytest.mark.parametrize("readings", drift_truth.READINGS)
def test_a_steady_server_is_hardly_ever_marked(readings: int, sd: float) -> None:
    assert drift_truth.marked(Session(readings, sd), 1000) <= 0.05


@pytest.mark.parametrize("readings", drift_truth.READINGS)
def test_more_are_marked_where_the_anchor_scatters_more_as_the_pages_say(readings: int) -> None:
    assert 0.08 <= drift_truth.marked(Session(readings, 0.02, anchor_sd=0.035), 1000) <= 0.23


def test_a_steady_servers_clearest_move_is_hardly_ever_more_than_noise() -> None:
    """The promise of the interval, without the limit."""
    rng = random.Random(3)
    told = [Session(readings, 0.02).drift(rng).told for readings in (2, 3, 5, 8) for _ in range(150)]
    assert 0.005 * len(told) <= sum(told) <= 0.06 * len(told)


@pytest.mark.parametrize("kind", ["step", "trend"])
@pytest.mark.parametrize("readings", drift_truth.READINGS)
def test_a_drift_of_a_tenth_is_found_in_most(readings: int, kind: str) -> None:
    assert drift_truth.marked(Session(readings, 0.02), 150, kind) >= 0.6


def test_a_drift_is_not_taken_for_noise() -> None:
    """Repeats of a server that slows down lie far apart; their noise is what is left less that."""
    found = Session(8, 0.005).drift(random.Random(1), lambda at: -0.3 * at)
    assert found.drifted
    assert found.low is not None
    assert found.high is not None
    assert found.high - found.low < 0.03


def test_more_than_noise_is_no_drift_below_the_limit() -> None:
    found = Session(8, 0.001).drift(random.Random(1), lambda at: 0.03 * at)
    assert (found.told, found.drifted) == (True, False)


def test_two_readings_without_repeats_tell_no_noise() -> None:
    found = find_drift([Timed(0, 100.0), Timed(1, 50.0)], [])
    assert found == Drift(pytest.approx(-0.5))
    assert not found.drifted
    assert found.furthest == found.share


def test_one_reading_or_readings_of_one_moment_tell_nothing() -> None:
    assert find_drift([Timed(0, 100.0)], []) is None
    assert find_drift([Timed(5, 100.0)] * 3, []) is None
    assert find_drift([], []) is None


def test_what_two_starts_of_a_server_differ_by_is_no_drift() -> None:
    rows = [synthetic.load_row(synthetic.GPU, "anchor", 8, n) for n in range(4)]
    tok_s = (800.0, 802.0, 720.0, 722.0)
    times = [f"2026-01-02T03:{10 * n:02}:00Z" for n in range(4)]
    one = [replace(row, tok_s=value, started_at=at) for row, value, at in zip(rows, tok_s, times, strict=True)]
    two = [replace(row, attempt=1 if n < 2 else 2) for n, row in enumerate(one)]
    drifts = [{point.anchor_drift for point in with_drift(synthetic.tables_of(each)).points} for each in (one, two)]
    assert min(drifts[0]) < -0.09
    assert all(abs(drift) < 0.01 for drift in drifts[1])


def page(tok_s: tuple[float, ...], repeats: int = 3) -> str:
    rows = []
    for level in (1, 8, 16):
        for r in range(repeats):
            row = synthetic.load_row(synthetic.GPU, "concurrency", level, r)
            when = f"2026-01-02T03:{4 + 10 * r:02}:{level:02}Z"
            rows.append(replace(row, tok_s=100.0 * level * (1, 1.01, 0.99)[r], started_at=when))
    for n, value in enumerate(tok_s):
        row = synthetic.load_row(synthetic.GPU, "anchor", 8, n)
        rows.append(replace(row, tok_s=value, started_at=f"2026-01-02T03:{3 + 6 * n:02}:00Z"))
    made = batching_page(with_drift(synthetic.tables_of(rows)))
    assert made is not None
    return made.text()


def test_page_says_drift_only_where_it_is_one() -> None:
    fallen = page((800.0, 805.0, 700.0, 698.0, 702.0))
    assert "tok_s drifted by -12." in fallen
    assert fallen.count("its session's anchor drifted by -12.") == 3
    odd = page((760.0, 805.0, 800.0, 795.0, 802.0))  # the first reading alone is 5 % off
    assert "no drift: the clearest step or trend in tok_s, " in odd
    assert "anchor drifted by" not in odd
    unknown = page((800.0, 500.0), repeats=1)
    assert "whether that is a drift is not known from this run" in unknown
    assert "anchor drifted by" not in unknown
