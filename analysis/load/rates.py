"""Levels of an open loop: their curves, up to which rate the server keeps up, and what a level is called. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from analysis.load.checks import keeps_up
from analysis.load.load_curve import LoadCurve, server_key
from analysis.load.load_tables import cell
from analysis.rows.groups import LOAD
from analysis.rows.series import Reading, concurrency_figure, make_series
from analysis.rows.tables import RunPoint
from analysis.writing.document import Phrase, phrase
from analysis.writing.figures import Figure, percent
from contract.rows import KEEPS_UP


def rate_curves(points: Sequence[RunPoint]) -> list[LoadCurve]:
    """Return one curve per server, workload and kind of arrivals."""
    rows = [point for point in points if point.purpose == "rate"]
    made = make_series(rows, (*LOAD, "arrivals"), "request_rate", "rate")
    return [LoadCurve(series, server_key(series.group)) for series in made]


def kept_up(curve: LoadCurve) -> list[Reading]:
    """Return the levels up to the highest that the server is known to keep up with, below the first at which a repeat
    says that it does not: that holds for lower rates, too, which may be too short to tell by themselves."""
    below = list(takewhile(lambda r: all(p.keeps_up is not False for p in r.measured), curve.series.measured))
    known = [number for number, reading in enumerate(below) if keeps_up(reading)]
    return below[: known[-1] + 1] if known else []


def level_figure(reading: Reading) -> Figure:
    """Return the level that a reading is: its concurrency, or its rate in an open loop."""
    return rate_figure(reading) if _open_loop(reading) else concurrency_figure(reading)


def level_words(reading: Reading, first: bool = False) -> Phrase:
    """Return which level a reading is: `concurrency N`, or `N requests/s` of an open loop; `first` in a sentence."""
    closed = "Concurrency {at}" if first else "concurrency {at}"
    return phrase("{at} requests/s" if _open_loop(reading) else closed, at=level_figure(reading))


def _open_loop(reading: Reading) -> bool:
    return (reading.measured or reading.unmeasured)[0].arrivals is not None


def keeps_up_sentence(curve: LoadCurve) -> Phrase:
    """Return up to which rate the server keeps up, and what is known of the next."""
    levels, held = curve.series.measured, kept_up(curve)
    after = levels[len(held)] if len(held) < len(levels) else None
    rule = percent("rule.keeps_up_pct", KEEPS_UP, 0)
    if not levels:
        return phrase("Up to which rate does the server keep up? Not known from this run: no level was measured.")
    if not held:
        return phrase("Up to which rate does the server keep up? {below}", below=_beyond(levels[0], rule))
    last = held[-1]
    what = phrase(
        "Up to which rate does the server keep up (ends at least {rule} of what is sent)? {rate} requests/s, at p95 "
        "{p95} s",
        rule=rule, rate=rate_figure(last), p95=cell(last, "p95_e2e_s", 4),
    )  # fmt: skip
    if after is None:
        return phrase("{what}; no higher rate was tried.", what=what)
    return phrase("{what}. {beyond}", what=what, beyond=_beyond(after, rule))


def _beyond(level: Reading, rule: Figure) -> Phrase:
    """What is known of the lowest level that is not known to keep up."""
    if keeps_up(level) is None:
        return phrase(
            "At {rate} that is not known from this run: too few requests were sent, their latencies were too uneven, "
            "or repeats did not agree. A longer level (sweep.seconds) would tell.",
            rate=rate_figure(level),
        )
    return phrase(
        "At {rate} it did not: {ended} ended a second, less than {rule} of the {sent} that were sent, and up to {most} "
        "were in flight.",
        rate=rate_figure(level), ended=cell(level, "ended_qps", 4), rule=rule, sent=cell(level, "sent_qps", 4),
        most=cell(level, "most_in_flight", 4),
    )  # fmt: skip


def rate_figure(reading: Reading) -> Figure:
    """Return the rate of a reading as a figure."""
    return Figure(f"{reading.name}.request_rate", reading.at, f"{reading.at:g}")
