"""The steady part of closed-loop levels as a table, and how far it is from the whole run that verdicts rest on."""

from __future__ import annotations

from analysis.load.knee import KneeVerdict
from analysis.load.knee_sentences import range_words
from analysis.load.load_curve import STEADY, LoadCurve
from analysis.load.load_tables import cell
from analysis.load.request_notes import few_for_p95
from analysis.rows.series import Reading, concurrency_figure
from analysis.writing.document import Document, Part, join, phrase
from analysis.writing.figures import Figure, percent, signed_percent
from contract.rows import STEADY_SHARE

COLUMNS = (
    "steady_completed", "steady_tok_s", "steady_mean_e2e_s", "steady_p95_e2e_s", "steady_p95_ttft_s",
    "steady_p95_tpot_s", "p99_icl_s", "tokens_per_chunk",
)  # fmt: skip
SETTLED = "steady_settled_s"
"""Empty in rows of before schema version 9: the opening burst is in their latencies."""
WITHOUT_BURST = (
    "Latencies are those of the requests that ended in it once all had that were sent before any answer had ended: in "
    "such an opening burst prompts wait for each other."
)
WITH_BURST = (
    "Latencies are those of the requests that ended in it; those of the opening burst, in which prompts wait for each "
    "other, are among them."
)
COMPARED = ("tok_s", "p95_e2e_s")
"""What verdicts are about."""


def add_steady_table(doc: Document, curve: LoadCurve) -> None:
    """Write the table, where any level had a steady part."""
    readings = [r for r in curve.series.readings if r.median("steady_tok_s") is not None]
    if not readings:
        return
    settled = any(r.values(SETTLED) for r in readings)
    doc.say(
        "The steady part alone, while at least {share} of the level were in flight: ramp and drain are left out. "
        + (WITHOUT_BURST if settled else WITH_BURST)
        + " Inter-chunk latency (icl) is over the whole level; a chunk may hold several tokens.",
        share=percent("rule.steady_in_flight_pct", STEADY_SHARE, 0),
    )
    doc.table(
        ["concurrency", *COLUMNS, *(f"{column} off whole run" for column in COMPARED), "notes"],
        [
            [
                concurrency_figure(r),
                *(cell(r, column, 4) for column in COLUMNS),
                *(_off(r, column) for column in COMPARED),
                join([*(_latency_notes(r) if settled else []), *few_for_p95(r, "steady_completed")]),
            ]
            for r in readings
        ],
        curve.series.sample.simulated,
    )
    _say_verdict(doc, curve)


def _latency_notes(reading: Reading) -> list[Part]:
    """Say where a repeat has no latencies, or others than the table says."""
    parts = len(reading.values("steady_tok_s"))
    if len(reading.values(SETTLED)) < parts:
        return [phrase("rows of an older version: the opening burst is in the latencies")]
    if len(reading.values("steady_p95_e2e_s")) < parts:
        return [phrase("too short for latencies once the opening burst is left out")]
    return []


def _off(reading: Reading, column: str) -> Figure:
    steady, whole = reading.median(STEADY + column), reading.median(column)
    share = steady / whole - 1 if steady and whole else None
    return signed_percent(f"{reading.name}.{STEADY}{column}_off_pct", share)


def _say_verdict(doc: Document, curve: LoadCurve) -> None:
    """Name the window of the verdicts, and what the other one would give."""
    rests = "Knee, blow-up, intervals and objectives rest on the whole run. "
    levels: dict[str, Part] = {}
    knee = curve.steady_knee
    if knee is None:
        other = "Not every level has a steady part, so there is no other knee to hold against it."
    elif knee.verdict is KneeVerdict.KNEE:
        other = "By the steady parts alone the knee would be {range}."
        words = range_words(knee, [level.at for level in curve.repeats])
        levels["range"] = Figure(f"{curve.name}.steady_knee_range", words, words)
    else:
        other = f"By the steady parts alone the answer to where throughput stops scaling would be: {knee.verdict}."
    doc.say(rests + other, **levels)
