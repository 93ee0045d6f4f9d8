"""The steady part of closed-loop levels as a table: what stands beside the whole-run figures."""

from __future__ import annotations

from analysis.document import Document, join
from analysis.figures import percent
from analysis.load_curve import LoadCurve
from analysis.load_tables import cell
from analysis.request_notes import few_for_p95
from analysis.series import concurrency_figure
from contract.rows import STEADY_SHARE

COLUMNS = (
    "steady_completed", "steady_tok_s", "steady_mean_e2e_s", "steady_p95_e2e_s", "steady_p95_ttft_s",
    "steady_p95_tpot_s", "p99_icl_s", "tokens_per_chunk",
)  # fmt: skip


def add_steady_table(doc: Document, curve: LoadCurve) -> None:
    """Write the table, where any level had a steady part."""
    readings = [r for r in curve.series.readings if r.median("steady_tok_s") is not None]
    if not readings:
        return
    doc.say(
        "The steady part alone, while at least {share} of the level were in flight: ramp and drain are left out, "
        "latencies are those of the requests that ended in it. Inter-chunk latency (icl) is over the whole level; a "
        "chunk may hold several tokens.",
        share=percent("rule.steady_in_flight_pct", STEADY_SHARE, 0),
    )
    doc.table(
        ["concurrency", *COLUMNS, "notes"],
        [
            [
                concurrency_figure(r),
                *(cell(r, column, 4) for column in COLUMNS),
                join(few_for_p95(r, "steady_completed")),
            ]
            for r in readings
        ],
        curve.series.sample.simulated,
    )
