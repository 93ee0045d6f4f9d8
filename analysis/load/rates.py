"""rate_sweep.csv and rate_sweep.md: an open loop's latency against the rate at which requests arrive.

A level is the median of its repeats, column by column.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from analysis.load.checks import keeps_up
from analysis.load.load_curve import LoadCurve, server_key
from analysis.load.load_tables import (
    cell,
    csv_number,
    goodput_column,
    say_without_goodput,
    server,
    unmeasured_notes,
    workload,
)
from analysis.load.objective_sentences import add_objectives
from analysis.load.request_notes import request_notes
from analysis.load.server_table import add_server_table
from analysis.rows.caveats import add_caveats, add_failures, identity
from analysis.rows.groups import LOAD
from analysis.rows.series import Reading, concurrency_figure, make_series
from analysis.rows.tables import RunPoint, Tables
from analysis.rows.targets import Slo
from analysis.writing.document import Document, Phrase, join, phrase
from analysis.writing.figures import Figure, percent, quote
from analysis.writing.files import write_csv
from contract.rows import KEEPS_UP

FILE = "rate_sweep.md"
COLUMNS = (
    "offered_qps", "sent_qps", "ended_qps", "qps", "tok_s", "mean_e2e_s", "p95_e2e_s", "p50_ttft_s", "p95_ttft_s",
    "p95_tpot_s", "achieved_concurrency", "most_in_flight", "p99_send_delay_s", "p99_connect_s", "goodput_qps",
)  # fmt: skip
SHOWN = (
    "offered_qps", "sent_qps", "ended_qps", "tok_s", "mean_e2e_s", "p95_e2e_s", "p95_ttft_s", "p95_tpot_s",
    "most_in_flight",
)  # fmt: skip


def rate_curves(points: Sequence[RunPoint]) -> list[LoadCurve]:
    """Return one curve per server, workload and kind of arrivals."""
    rows = [point for point in points if point.purpose == "rate"]
    made = make_series(rows, (*LOAD, "arrivals"), "request_rate", "rate")
    return [LoadCurve(series, server_key(series.group)) for series in made]


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
        "each other. request_rate is what was asked for, offered_qps what the drawn arrivals came to. sent_qps and "
        "ended_qps are of the same requests, from the first quarter of the level to the last: how many were sent a "
        "second, and how many ended. Latencies run from the send; what a request waited in the client and for a "
        "connection is kept apart (p99_send_delay_s and p99_connect_s in the CSV; older runs have both in the first). "
        "A level is the median of its repeats."
    )
    for curve in rate_curves(rows):
        sample, name = curve.series.sample, curve.name
        doc.heading(2, "{who}", who=identity(sample, name, curve.series.group.label))
        arrivals = quote(f"{name}.arrivals", sample.arrivals or "")
        doc.say(
            "Server: {server}. Load: {load}. Arrivals: {arrivals}.",
            server=server(curve), load=workload(curve), arrivals=arrivals,
        )  # fmt: skip
        shown = [*SHOWN, *goodput_column(slo)]
        doc.table(
            ["request_rate", *shown, "notes"],
            [[rate_figure(r), *(cell(r, column, 4) for column in shown), _notes(r)] for r in curve.series.readings],
            sample.simulated,
        )
        say_without_goodput(doc, slo, curve.series.readings)
        add_server_table(doc, curve, "request_rate", rate_figure)
        doc.bullets([keeps_up_sentence(curve)])
        add_objectives(doc, curve, slo, "request_rate")
    add_failures(doc, rows, tables)
    return doc


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


def _notes(reading: Reading) -> Phrase:
    return join([*request_notes(reading), *unmeasured_notes(reading)])


def rate_figure(reading: Reading) -> Figure:
    """Return the rate of a reading as a figure."""
    return Figure(f"{reading.name}.request_rate", reading.at, f"{reading.at:g}")
