"""rate_sweep.csv and rate_sweep.md: an open loop's latency against the rate at which requests arrive.

A level is the median of its repeats, column by column.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from analysis.caveats import add_caveats, add_failures, identity
from analysis.document import Document, Part, Phrase, join, phrase
from analysis.figures import Figure, percent, quote, significant
from analysis.files import write_csv
from analysis.groups import LOAD
from analysis.load_curve import LoadCurve
from analysis.load_tables import cell, csv_number, goodput_column, request_notes, server, unmeasured_notes, workload
from analysis.objective_sentences import add_objectives
from analysis.objectives import KEEPS_UP
from analysis.series import Reading, concurrency_figure, make_series
from analysis.statistics import median
from analysis.tables import RunPoint, Tables
from analysis.targets import Slo

FILE = "rate_sweep.md"
COLUMNS = (
    "offered_qps", "qps", "tok_s", "mean_e2e_s", "p95_e2e_s", "p50_ttft_s", "p95_ttft_s", "p95_tpot_s",
    "achieved_concurrency", "most_in_flight", "p99_send_delay_s", "goodput_qps",
)  # fmt: skip
SHOWN = ("offered_qps", "steady_qps", "tok_s", "mean_e2e_s", "p95_e2e_s", "p95_ttft_s", "p95_tpot_s", "most_in_flight")


def rate_curves(points: Sequence[RunPoint]) -> list[LoadCurve]:
    """Return one curve per server, workload and kind of arrivals."""
    rows = [point for point in points if point.purpose == "rate"]
    return [LoadCurve(series) for series in make_series(rows, (*LOAD, "arrivals"), "request_rate", "rate")]


def write_rate_sweep(run_dir: Path, curves: Sequence[LoadCurve]) -> list[Path]:
    """Write one file per curve; the first owns the plain name."""
    return [
        write_csv(
            run_dir / curve.series.group.file("rate_sweep", ".csv"),
            ("request_rate", *COLUMNS),
            [[f"{r.at:g}", *(csv_number(r.median(column)) for column in COLUMNS)] for r in curve.series.readings],
        )
        for curve in curves
    ]


def rate_page(tables: Tables, slo: Slo) -> Document | None:
    """Return the page, or None for a run without a row of an open loop."""
    rows = [point for point in tables.points if point.purpose == "rate"]
    if not rows:
        return None
    doc = Document(FILE)
    doc.heading(1, "Latency against arrival rate")
    add_caveats(doc, rows, tables)
    doc.say(
        "Open loop: requests are sent when they are due, however many are in flight, as users do who know nothing of "
        "each other. request_rate is what was asked for, offered_qps what the drawn arrivals came to, steady_qps the "
        "successes a second from the first answer to the last send. Latencies run from the send; what a request waited "
        "in the client is kept apart (p99_send_delay_s in the CSV). A level is the median of its repeats."
    )
    for curve in rate_curves(rows):
        sample, name = curve.series.sample, curve.name
        doc.heading(2, "{who}", who=identity(sample, name, curve.series.group.label))
        arrivals = quote(f"{name}.arrivals", sample.arrivals or "")
        doc.say(
            "Server: {server}. Load: {load}. Arrivals: {arrivals}.",
            server=server(curve), load=workload(curve), arrivals=arrivals,
        )  # fmt: skip
        shown = [*SHOWN, *goodput_column(curve.series.readings)]
        doc.table(
            ["request_rate", *shown, "notes"],
            [[rate_figure(r), *(_cell(r, column) for column in shown), _notes(r)] for r in curve.series.readings],
            sample.simulated,
        )
        doc.bullets([_keeps_up(curve)])
        add_objectives(doc, curve, slo, "request_rate")
    add_failures(doc, rows, tables)
    return doc


def steady_qps(reading: Reading) -> float | None:
    """Return the median of successes a second in the steady part."""
    rates = [rate for point in reading.measured if (rate := _steady_qps(point)) is not None]
    return median(rates) if rates else None


def keeps_up(reading: Reading) -> bool | None:
    """Return whether the server ended as many as were sent; None where no steady part was long enough to say."""
    ended, sent = steady_qps(reading), reading.median("offered_qps")
    return None if ended is None or sent is None else ended >= KEEPS_UP * sent


def level_figure(reading: Reading) -> Figure:
    """Return the level that a reading is: its concurrency, or its rate in an open loop."""
    return rate_figure(reading) if _open_loop(reading) else concurrency_figure(reading)


def level_words(reading: Reading, first: bool = False) -> Phrase:
    """Return which level a reading is: `concurrency N`, or `N requests/s` of an open loop; `first` in a sentence."""
    closed = "Concurrency {at}" if first else "concurrency {at}"
    return phrase("{at} requests/s" if _open_loop(reading) else closed, at=level_figure(reading))


def _open_loop(reading: Reading) -> bool:
    return (reading.measured or reading.unmeasured)[0].arrivals is not None


def _keeps_up(curve: LoadCurve) -> Phrase:
    levels = curve.series.measured
    known = [level for level in levels if keeps_up(level) is not None]
    if not known or len(known) < len(levels):
        return phrase(
            "Up to which rate does the server keep up? Not known from this run: a level was too short for a steady "
            "part. A longer one (sweep.seconds) would tell."
        )
    held = list(takewhile(keeps_up, known))
    rule = percent("rule.keeps_up_pct", KEEPS_UP, 0)
    if not held:
        first = known[0]
        return phrase(
            "Up to which rate does the server keep up? It did not at the lowest, {rate} requests/s: {ended} ended a "
            "second, less than {rule} of those sent.",
            rate=rate_figure(first), ended=_cell(first, "steady_qps"), rule=rule,
        )  # fmt: skip
    last = held[-1]
    what = phrase(
        "Up to which rate does the server keep up (ends at least {rule} of what is sent)? {rate} requests/s, at p95 "
        "{p95} s",
        rule=rule, rate=rate_figure(last), p95=_cell(last, "p95_e2e_s"),
    )  # fmt: skip
    if last is known[-1]:
        return phrase("{what}; no higher rate was tried.", what=what)
    after = known[len(held)]
    return phrase(
        "{what}. At {rate} it did not: {ended} ended a second, and up to {most} were in flight.",
        what=what, rate=rate_figure(after), ended=_cell(after, "steady_qps"), most=_cell(after, "most_in_flight"),
    )  # fmt: skip


def _notes(reading: Reading) -> Phrase:
    return join([*request_notes(reading), *unmeasured_notes(reading)])


def rate_figure(reading: Reading) -> Figure:
    """Return the rate of a reading as a figure."""
    return Figure(f"{reading.name}.request_rate", reading.at, f"{reading.at:g}")


def _cell(reading: Reading, column: str) -> Part:
    if column == "steady_qps":
        return significant(f"{reading.name}.steady_qps", steady_qps(reading), 4)
    return cell(reading, column, 4)


def _steady_qps(point: RunPoint) -> float | None:
    from_s, to_s, completed = point.steady_from_s, point.steady_to_s, point.steady_completed
    return None if from_s is None or to_s is None or completed is None else completed / (to_s - from_s)
