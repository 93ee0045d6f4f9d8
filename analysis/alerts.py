"""The alerts of operating_point.md: vLLM's metric to watch, and the number above which it leaves what was measured.

A number comes from the level that was chosen or from an objective; where neither tells it, the line says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from analysis.document import Document, Part, Phrase, phrase
from analysis.figures import Figure, significant
from analysis.ladder import highest, kv_usage
from analysis.load_curve import LoadCurve
from analysis.load_tables import cell, confidence
from analysis.operating_point import Basis, Choice, OperatingPoint, Standing
from analysis.operating_sentences import objective_figure
from analysis.rates import level_words
from analysis.series import concurrency_figure

HISTOGRAMS = {
    "p95_e2e_s": "`vllm:e2e_request_latency_seconds`, p95",
    "p95_ttft_s": "`vllm:time_to_first_token_seconds`, p95",
    "p95_tpot_s": "`vllm:request_time_per_output_token_seconds`, p95",
}
"""vLLM's own side: what the client waits besides is not in them."""
FIRST_BUCKET_S = 0.3
"""Lowest bound of the e2e histogram's buckets (vllm/v1/metrics/loggers.py, 0.25 to 0.32): nothing below is told."""


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
    made = [_in_flight(choice, point)]
    if point is not None and point.reading.highest("waiting_max") is not None:
        why = phrase("the most seen waiting at {level}", level=level_words(point.reading))
        made.append(Alert("`vllm:num_requests_waiting`", highest(point.reading, "waiting_max"), why))
    columns = dict.fromkeys(("p95_e2e_s", *choice.slo.percentiles()))
    made += [_latency(choice, point, column) for column in columns]
    return [*made, _kv_usage(choice, point), *_preemptions(point)]


def _in_flight(choice: Choice, point: OperatingPoint | None) -> Alert:
    metric = "`vllm:num_requests_running` and `vllm:num_requests_waiting` together"
    if point is None or point.safe_up_to is None:
        return Alert(metric, None, phrase("needs an operating point that holds beyond noise"))
    safe = point.safe_up_to
    above = highest(safe, "most_in_flight") if choice.open_loop else concurrency_figure(safe)
    if above.value is None:
        return Alert(metric, None, phrase("the rows do not hold how many were in flight"))
    if choice.basis is Basis.KNEE:
        return Alert(metric, above, phrase("the highest level that could be the knee"))
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


def _latency(choice: Choice, point: OperatingPoint | None, column: str) -> Alert:
    limit = choice.slo.percentiles().get(column)
    upper = None if point is None else point.curve.interval(point.reading, column)
    if point is not None and upper is not None and (limit is None or upper.high <= limit):
        value, level = upper.high, level_words(point.reading)
        above = significant(f"{point.reading.name}.{column}_high", value, 4)
        why = phrase("upper end of its {confidence} interval at {level}", confidence=confidence(), level=level)
    elif limit is not None:
        value, above, why = limit, objective_figure(column, limit), phrase("the objective itself")
    else:
        return Alert(HISTOGRAMS[column], None, phrase("no objective, and no operating point"))
    if column == "p95_e2e_s" and value < FIRST_BUCKET_S:
        first = significant("rule.first_bucket_s", FIRST_BUCKET_S, 1)
        why = phrase("{why}; the histogram tells nothing below {first} s: watch the client's", why=why, first=first)
    return Alert(HISTOGRAMS[column], above, why)


def _kv_usage(choice: Choice, point: OperatingPoint | None) -> Alert:
    metric = "`vllm:kv_cache_usage_perc`"
    if point is None:
        return Alert(metric, None, _preempted(choice.curves[0]))
    usage = kv_usage(point.reading)
    if usage.value is None:
        return Alert(metric, None, phrase("the server's metrics did not give it"))
    words = "the most seen at {level}: above it requests are longer or more than were measured; {preempted}"
    return Alert(metric, usage, phrase(words, level=level_words(point.reading), preempted=_preempted(point.curve)))


def _preempted(curve: LoadCurve) -> Phrase:
    known = [r for r in curve.series.measured if r.highest("preemptions") is not None]
    if not known:
        return phrase("whether anything was preempted is not known")
    first = next((r for r in known if r.highest("preemptions")), None)
    if first is not None:
        return phrase("preemptions began at {level}, {usage} in use", level=level_words(first), usage=kv_usage(first))
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
