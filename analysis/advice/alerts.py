"""The alerts of operating_point.md: vLLM's metric to watch, and the number above which it leaves what was measured.

A number comes from the level that was chosen or from an objective; where neither tells it, the line says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from analysis.advice.operating_point import Basis, Choice, OperatingPoint, requests_in_flight
from analysis.advice.operating_sentences import objective_figure
from analysis.load import latency_buckets
from analysis.load.checks import Standing
from analysis.load.ladder import highest
from analysis.load.latency_buckets import bucket_of
from analysis.load.load_curve import LoadCurve
from analysis.load.load_tables import cell, confidence
from analysis.load.rates import level_figure, level_words
from analysis.memory.kv_envelope import HEADROOM
from analysis.rows.series import Reading, concurrency_figure
from analysis.writing.document import Document, Part, Phrase, join, phrase
from analysis.writing.figures import Figure, decimal, significant

HISTOGRAMS = {
    "p95_e2e_s": ("`vllm:e2e_request_latency_seconds`, p95", latency_buckets.E2EL_S),
    "p95_ttft_s": ("`vllm:time_to_first_token_seconds`, p95", latency_buckets.TTFT_S),
    "p95_tpot_s": ("`vllm:request_time_per_output_token_seconds`, p95", latency_buckets.TPOT_S),
}
"""vLLM's own side, and the bounds of its buckets: what the client waits besides is not in them."""


@dataclass(frozen=True, slots=True)
class Alert:
    """One line: what to watch, above what, and where the number comes from."""

    metric: str
    above: Figure | None
    """None: not known from this run."""
    why: Phrase


def add_alerts(doc: Document, choice: Choice) -> None:
    """Write the alerts of a choice as a table."""
    unknown = phrase("not known from this run")
    rows: list[Sequence[str | Part]] = [
        (alert.metric, unknown if alert.above is None else alert.above, alert.why) for alert in alerts(choice)
    ]
    doc.table(["what", "alert above", "notes"], rows, choice.sample.simulated)


def alerts(choice: Choice) -> list[Alert]:
    """Return the alerts for a choice; without an operating point only objectives give numbers."""
    point = choice.point
    in_flight = _in_flight(choice, point)
    columns = dict.fromkeys(("p95_e2e_s", *choice.slo.percentiles()))
    latencies = [_latency(choice, point, column, in_flight) for column in columns]
    return [in_flight, *latencies, _kv_usage(choice, point), *_preemptions(point)]


def _in_flight(choice: Choice, point: OperatingPoint | None) -> Alert:
    metric = "`vllm:num_requests_running` and `vllm:num_requests_waiting` together"
    if point is None or point.safe_up_to is None:
        return Alert(metric, None, phrase("needs an operating point that holds beyond noise"))
    safe = point.safe_up_to
    above = highest(safe, "most_in_flight") if choice.open_loop else concurrency_figure(safe)
    if above.value is None:
        return Alert(metric, None, phrase("the rows do not hold how many were in flight"))
    if choice.basis is Basis.KNEE:
        return Alert(metric, above, _at_the_knee(point.curve))
    below = [c for c in choice.candidates if c.curve is point.curve and c.measured and c.reading.at <= safe.at]
    hold = all(candidate.standing is Standing.MEETS for candidate in below)
    what = "most in flight at {level}: " if choice.open_loop else "{level}: "
    what += (
        "up to it every measured level meets the objectives" if hold else "not every lower level meets the objectives"
    )
    why = phrase(what, level=level_words(safe))
    if safe is point.curve.series.readings[-1]:
        why = phrase("{why}; no higher one was tried", why=why)
    return Alert(metric, above, why)


def _at_the_knee(curve: LoadCurve) -> Phrase:
    lowest, *higher = curve.knee.could_be
    why = phrase("{level}, of the levels tested the lowest that could be the knee", level=level_words(curve.at(lowest)))
    if not higher:
        return why
    last = level_words(curve.at(higher[-1]))
    return phrase("{why}; whether more pays, up to {last}, noise leaves open", why=why, last=last)


def _latency(choice: Choice, point: OperatingPoint | None, column: str, in_flight: Alert) -> Alert:
    """What one window of the chosen level may reach by chance, or the objective where that is lower."""
    metric, bounds = HISTOGRAMS[column]
    limit = choice.slo.percentiles().get(column)
    next_one = None if point is None else point.curve.prediction(point.reading, column)
    if point is not None and next_one is not None and (limit is None or next_one.high <= limit):
        value, level = next_one.high, level_words(point.reading)
        reached = significant(f"{point.reading.name}.{column}_next", value, 4)
        words = "the {confidence} interval of one more window at {level} ends at {reached}"
        why = phrase(words, level=level, reached=reached, confidence=confidence())
    elif limit is not None:
        value, why = limit, phrase("the objective itself is {limit}", limit=objective_figure(column, limit))
    elif point is None:
        return Alert(metric, None, phrase("no objective, and no operating point"))
    else:
        return Alert(metric, None, phrase("no objective, and one repeat does not tell what the next may reach"))
    alert = _at_a_bound(metric, value, bounds, why)
    return replace(alert, why=join([alert.why, *_unseen(choice, column, alert, in_flight)]))


def _unseen(choice: Choice, column: str, alert: Alert, in_flight: Alert) -> Iterator[Phrase]:
    """Needs levels that miss the objective and whose every repeat has a p95 up to where the alert begins to fire."""
    if alert.above is None:
        return
    missed = [c for c in choice.candidates if c.curve is choice.curve and c.misses(column)]
    unseen = [c.reading for c in missed if (c.reading.highest(column) or math.inf) <= float(alert.above.value or 0.0)]
    if not unseen:
        return
    most = None if in_flight.above is None else float(in_flight.above.value or 0.0)
    guarded = most is not None and all(requests_in_flight(reading) > most for reading in unseen)
    yield phrase(
        "it fires at no repeat of "
        + ("{levels} requests/s" if choice.open_loop else "concurrency {levels}")
        + ", which missed the objective: "
        + ("there the alert on requests in flight guards it" if guarded else "there watch the client's"),
        levels=join(map(level_figure, unseen), ", "),
    )


def _at_a_bound(metric: str, value_s: float, bounds: tuple[float, ...], why: Phrase) -> Alert:
    """A histogram tells a value from its bucket's bounds alone: a threshold within the bucket would always fire."""
    bucket = bucket_of(value_s, bounds)
    if bucket is None:
        return Alert(metric, None, phrase("{why}; the histogram ends below that", why=why))
    below, bound = (Figure(f"rule.bucket_{at:g}", at, f"{at:g}") for at in bucket)
    if bound.value == value_s:
        return Alert(metric, bound, why)
    words = "{why}; the histogram tells nothing between {below} and {bound}: closer, watch the client's"
    return Alert(metric, bound, phrase(words, why=why, below=below, bound=bound))


def _kv_usage(choice: Choice, point: OperatingPoint | None) -> Alert:
    """Where the pool has no room to spare: the rule's share, or less where preemptions were seen with less in use."""
    metric = "`vllm:kv_cache_usage_perc` (a share)"
    curve = choice.curve or choice.curves[0]
    rule, first = Figure("rule.headroom", HEADROOM, f"{HEADROOM:g}"), _first_preempted(curve)
    began = None if first is None else first.highest("kv_usage_max")
    above = rule if first is None or began is None or began >= HEADROOM else _share(first)
    why = phrase(("a rule; " if above is rule else "") + "{preempted}", preempted=_preempted(curve, first))
    used = None if point is None else point.reading.highest("kv_usage_max")
    if point is None or used is None:
        return Alert(metric, above, why)
    most, level = _share(point.reading), level_words(point.reading)
    if used >= float(above.value or 0.0):
        words = "{level} itself had {most} in use, so there is no room to warn of; {why}"
        return Alert(metric, most, phrase(words, level=level, most=most, why=why))
    return Alert(metric, above, phrase("{why}; the most seen at {level}: {most}", why=why, level=level, most=most))


def _share(reading: Reading) -> Figure:
    return decimal(f"{reading.name}.kv_usage_max", reading.highest("kv_usage_max"), 3)


def _first_preempted(curve: LoadCurve) -> Reading | None:
    return next((reading for reading in curve.series.measured if reading.highest("preemptions")), None)


def _preempted(curve: LoadCurve, first: Reading | None) -> Phrase:
    if first is not None:
        return phrase("preemptions began at {level}, {usage} in use", level=level_words(first), usage=_share(first))
    known = [r for r in curve.series.measured if r.highest("preemptions") is not None]
    if not known:
        return phrase("whether anything was preempted is not known")
    return phrase("no level saw a preemption, up to {level}", level=level_words(known[-1]))


def _preemptions(point: OperatingPoint | None) -> Iterator[Alert]:
    seen = None if point is None else point.reading.highest("preemptions")
    if point is None or seen is None:
        return
    above = highest(point.reading, "preemptions")
    why = "growth in a window of {s} s: the most seen at {level}" if seen else "any growth: none was seen at {level}"
    parts: dict[str, Part] = {"level": level_words(point.reading)}
    if seen:
        parts["s"] = cell(point.reading, "duration_s")
    yield Alert("`vllm:num_preemptions_total`", above, phrase(why, **parts))
