"""rate_sweep.csv and rate_sweep.md: an open loop's latency against the rate at which requests arrive.

A level is the median of its repeats, column by column.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from analysis.load.load_curve import LoadCurve
from analysis.load.load_tables import (
    SIZE,
    cell,
    csv_number,
    goodput_column,
    say_without_goodput,
    server,
    size_cells,
    unmeasured_notes,
    workload,
)
from analysis.load.objective_sentences import add_border, add_objectives
from analysis.load.rates import keeps_up_sentence, rate_curves, rate_figure
from analysis.load.request_notes import request_notes
from analysis.load.server_table import add_server_table
from analysis.load.strangers import resting_on
from analysis.rows.caveats import add_caveats, add_failures, identity
from analysis.rows.disturbances import foreign_process_notes
from analysis.rows.series import Reading
from analysis.rows.tables import Tables
from analysis.rows.targets import Slo
from analysis.writing.document import Document, Phrase, join
from analysis.writing.figures import quote
from analysis.writing.files import write_csv

FILE = "rate_sweep.md"
COLUMNS = (
    "offered_qps", "sent_qps", "ended_qps", "qps", "tok_s", "mean_e2e_s", "p95_e2e_s", "p50_ttft_s", "p95_ttft_s",
    "p95_tpot_s", "achieved_concurrency", "most_in_flight", "p99_send_delay_s", "p99_connect_s", "goodput_qps",
)  # fmt: skip
SHOWN = (
    "offered_qps", "sent_qps", "ended_qps", "tok_s", "mean_e2e_s", "p95_e2e_s", "p95_ttft_s", "p95_tpot_s",
    "most_in_flight",
)  # fmt: skip


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
    add_objectives(doc, slo, "request_rate")
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
            ["request_rate", *SIZE, *shown, "notes"],
            [
                [rate_figure(r), *size_cells(r), *(cell(r, column, 4) for column in shown), _notes(r)]
                for r in curve.series.readings
            ],
            sample.simulated,
        )
        say_without_goodput(doc, slo, curve.series.readings)
        add_server_table(doc, curve, "request_rate", rate_figure)
        doc.bullets([keeps_up_sentence(curve), *resting_on(curve.levels)])
        add_border(doc, curve, slo, "request_rate")
    add_failures(doc, rows, tables)
    return doc


def _notes(reading: Reading) -> Phrase:
    return join([*request_notes(reading), *foreign_process_notes(reading), *unmeasured_notes(reading)])
