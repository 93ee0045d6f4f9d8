"""When a level ends: by its requests, its time, or because its metric is known."""

from __future__ import annotations

import asyncio
import math
import os
import random
import statistics
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import stopping_truth
from contract.specs import METRICS, Precision
from workers.load import ending
from workers.load.ending import PRECISION, REQUESTS, TIME, Ending, Estimate, Stop
from workers.load.start_line import StartLine


def half_width(values: list[float], metric: str) -> float | None:
    estimate = Estimate(metric)
    for value in values:
        estimate.add(value)
    return estimate.half_width()


@pytest.mark.parametrize("metric", METRICS)
def test_the_interval_covers_the_truth_in_nineteen_of_twenty_samples(metric: str) -> None:
    """Exponential latencies of mean 1, whose quantile at q is -ln(1 - q); the half width as a one-sample promise."""
    dice = random.Random(metric)
    truth, share = {"mean": (1.0, None), "p50": (0.6931, 0.5), "p95": (2.9957, 0.95)}[metric.partition("_")[0]]
    hits = 0
    for _ in range(400):
        values = [dice.expovariate(1) for _ in range(400)]
        width = half_width(values, metric)
        assert width is not None
        ordered = sorted(values)
        middle = sum(values) / len(values) if share is None else ordered[int(len(values) * share)]
        hits += abs(middle - truth) <= width * middle
    assert hits / 400 >= 0.9


@pytest.mark.parametrize("within", [0.2, 0.3])
@pytest.mark.parametrize("metric", stopping_truth.SHARES)
@pytest.mark.parametrize("latencies", stopping_truth.LATENCIES, ids=lambda latencies: latencies.name)
def test_a_level_that_ended_for_its_precision_holds_the_truth_as_often_as_is_said(
    latencies: stopping_truth.Latencies, metric: str, within: float
) -> None:
    """Stopped at the first narrow look, so in fewer than nineteen of twenty: docs/definitions.md gives the shares."""
    assert stopping_truth.covered(latencies, metric, within, 300) >= 0.86


def test_ending_at_the_first_narrow_interval_costs_confidence() -> None:
    """Of skewed latencies most; were it nothing, the docs would say too little of the rule."""
    assert stopping_truth.covered(stopping_truth.LATENCIES[2], "mean_e2e_s", 0.3, 1000) < 0.93


@given(st.lists(st.floats(0.001, 100), max_size=19), st.sampled_from(sorted(METRICS)))
def test_few_values_have_no_interval(values: list[float], metric: str) -> None:
    assert half_width(values, metric) is None


@given(st.lists(st.floats(0.001, 100), min_size=20, max_size=200), st.sampled_from(sorted(METRICS)))
def test_an_interval_has_a_width_that_is_not_negative(values: list[float], metric: str) -> None:
    width = half_width(values, metric)
    assert width is None or width >= 0


@given(st.lists(st.floats(0.001, 100), min_size=20, max_size=200))
def test_a_means_interval_is_that_of_its_standard_error(values: list[float]) -> None:
    width = half_width(values, "mean_e2e_s")
    expected = 1.959964 * statistics.stdev(values) / math.sqrt(len(values)) / statistics.fmean(values)
    assert width == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_a_p95_needs_more_values_than_a_median() -> None:
    values = [1.0 + n / 100 for n in range(40)]
    assert half_width(values, "p50_e2e_s") is not None
    assert half_width(values, "p95_e2e_s") is None


def _ended(stop: Stop | None, latencies: list[float], together: StartLine | None = None, looks: int = 3) -> Ending:
    async def run() -> Ending:
        made = Ending(stop, time.monotonic(), together)
        for each in latencies:
            made.note(0.1 * each, each)
        watching = asyncio.ensure_future(made.watch())
        await asyncio.sleep(looks * ending.LOOK_S)
        watching.cancel()
        made.reached()
        return made

    return asyncio.run(run())


def test_requests_time_and_precision_each_end_a_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "LOOK_S", 0.01)
    exact = [1.0] * 100
    precise = Precision("mean_e2e_s", 0.05)
    assert _ended(None, exact).by == REQUESTS
    assert _ended(Stop(0.001), exact).by == TIME
    assert _ended(Stop(60, precise), exact).by == PRECISION
    assert _ended(Stop(60, precise, least=101), exact).by == REQUESTS
    assert _ended(Stop(60, precise), [0.1, 9.0] * 20).by == REQUESTS


def test_a_level_ends_by_the_metric_that_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "LOOK_S", 0.01)

    def ended_by(metric: str, first_s: list[float], last_s: list[float]) -> str:
        async def run() -> str:
            made = Ending(Stop(60, Precision(metric, 0.05)), time.monotonic(), None)
            for first, last in zip(first_s, last_s, strict=True):
                made.note(first, last)
            watching = asyncio.ensure_future(made.watch())
            await asyncio.sleep(3 * ending.LOOK_S)
            watching.cancel()
            made.reached()
            return made.by

        return asyncio.run(run())

    sure, unsure = [1.0] * 200, [0.1, 9.0] * 100
    for which in ("mean", "p50", "p95"):
        assert ended_by(f"{which}_e2e_s", unsure, sure) == ended_by(f"{which}_ttft_s", sure, unsure) == PRECISION
    for which in ("mean", "p50"):  # 9 is the p95 of the unsure ones, and there is nothing about it that varies
        assert ended_by(f"{which}_e2e_s", sure, unsure) == ended_by(f"{which}_ttft_s", unsure, sure) == REQUESTS


def test_several_processes_end_only_when_all_are_precise(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ending, "LOOK_S", 0.01)
    stop = Stop(60, Precision("mean_e2e_s", 0.05))
    assert _ended(stop, [1.0] * 100, StartLine(str(tmp_path), 2, 0)).by == REQUESTS
    assert _ended(stop, [1.0] * 100, StartLine(str(tmp_path), 2, 1)).by == PRECISION


def test_a_process_whose_interval_has_widened_again_ends_with_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Else it would go on alone, at a part of the level's load, and its figures would be the level's."""
    monkeypatch.setattr(ending, "LOOK_S", 0.01)
    stop = Stop(60, Precision("mean_e2e_s", 0.05))

    async def run() -> list[str]:
        first, second = (Ending(stop, time.monotonic(), StartLine(str(tmp_path), 2, index)) for index in range(2))
        watching = [asyncio.ensure_future(each.watch()) for each in (first, second)]
        for _ in range(100):
            first.note(0.1, 1.0)
        async with asyncio.timeout(5):
            while not os.listdir(tmp_path):  # noqa: ASYNC110, PTH208 - it looks when its turn comes
                await asyncio.sleep(0.001)
        for _ in range(20):
            first.note(0.1, 9.0)
        await asyncio.sleep(5 * ending.LOOK_S)
        assert not first.reached()
        for _ in range(100):
            second.note(0.1, 1.0)
        async with asyncio.timeout(5):
            await asyncio.gather(*watching)
        assert first.reached()
        assert second.reached()
        return [first.by, second.by]

    assert asyncio.run(run()) == [PRECISION, PRECISION]


def test_other_metrics_are_refused() -> None:
    with pytest.raises(ValueError, match="must be one of mean_e2e_s"):
        Precision("tok_s", 0.1)
    with pytest.raises(ValueError, match="above 0"):
        Precision("mean_e2e_s", 0)
