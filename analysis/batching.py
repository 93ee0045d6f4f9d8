"""batching_benchmark.md: sequential against concurrent, the table of levels, the sweep, the ladder, rules of thumb."""

from __future__ import annotations

from collections.abc import Sequence

from analysis.caveats import add_caveats, add_failures, identity
from analysis.document import Document, Phrase, phrase
from analysis.figures import Figure, count, percent, plain, times
from analysis.ladder import add_ladder
from analysis.load_curve import PLATEAU_WITHIN, LoadCurve, load_curves
from analysis.load_tables import SWEEP_COLUMNS, cell, goodput_column, level_notes, server, sweep_cells, workload
from analysis.rules import rules_of_thumb
from analysis.series import Reading
from analysis.steady_table import add_steady_table
from analysis.tables import Tables
from analysis.under_use import add_under_use

FILE = "batching_benchmark.md"
PURPOSES = ("comparison", "batching", "concurrency", "near_full_context")
MORE_COLUMNS = ("tok_s", "total_tok_s", "p50_ttft_s", "p95_ttft_s", "p50_tpot_s", "p99_e2e_s")
PAIR_ROWS = (
    ("s, all requests", "duration_s"),
    ("qps", "qps"),
    ("tok_s", "tok_s"),
    ("total_tok_s", "total_tok_s"),
    ("mean_e2e_s", "mean_e2e_s"),
    ("p95_e2e_s", "p95_e2e_s"),
)


def batching_page(tables: Tables) -> Document | None:
    """Return the page, or None for a run without a single load row."""
    rows = [point for point in tables.points if point.purpose in PURPOSES]
    if not rows:
        return None
    doc = Document(FILE)
    doc.heading(1, "Micro-batching under load")
    add_caveats(doc, rows, tables)
    doc.say(
        "Closed loop: that many requests are in flight all the time. tok_s counts completion tokens of successful "
        "requests over the whole window, ramp and drain included; total_tok_s counts their prompts, too. "
        "A level is the median of its repeats, column by column."
    )
    _comparison_section(doc, load_curves(rows, "comparison"))
    _levels_section(doc, load_curves(rows, "batching"))
    _sweep_section(doc, load_curves(rows, "concurrency"))
    add_ladder(doc, load_curves(rows, "near_full_context"))
    add_under_use(doc, rows)
    doc.heading(2, "Rules of thumb")
    rules = rules_of_thumb(tables.points)
    if rules:
        doc.say("Each holds for the lengths it names, on this device and server, and for nothing else.")
        doc.bullets(rules)
    else:
        doc.say("None: too few levels were measured for a rule to follow from them.")
    add_failures(doc, rows, tables)
    return doc


def _absent(doc: Document, what: str, sweep: str) -> None:
    doc.say(what + " is not known from this run; `+sweep=" + sweep + "` measures it.")


def _curve_heading(doc: Document, curve: LoadCurve) -> None:
    doc.heading(3, "{who}", who=identity(curve.series.sample, curve.name, curve.series.group.label))
    doc.say("Server: {server}. Load: {load}.", server=server(curve), load=workload(curve))


def _comparison_section(doc: Document, curves: Sequence[LoadCurve]) -> None:
    doc.heading(2, "Sequential against concurrent")
    if not curves:
        _absent(doc, "What concurrency buys over one request at a time", "batching")
    for curve in curves:
        _curve_heading(doc, curve)
        levels = curve.series.measured
        if len(levels) < 2:
            doc.say("Fewer than two levels were measured, so there is nothing to compare.")
            doc.table(
                ["concurrency", "tok_s", "notes"],
                [
                    [plain(f"{r.name}.concurrency", r.at), cell(r, "tok_s"), level_notes(curve, r)]
                    for r in curve.series.readings
                ],
                curve.series.sample.simulated,
            )
            continue
        one, many = levels[0], levels[-1]
        at = plain(f"{many.name}.concurrency", many.at)
        first = "sequential" if one.at == 1 else "concurrency {n}"
        head = phrase(first) if one.at == 1 else phrase(first, n=plain(f"{one.name}.concurrency", one.at))
        doc.table(
            ["what", head, phrase("concurrent ({n})", n=at), "ratio"],
            [
                [label, cell(one, column, 4), cell(many, column, 4), _ratio(curve, one, many, column)]
                for label, column in PAIR_ROWS
            ],
            curve.series.sample.simulated,
        )
        doc.say(
            "The same {requests} requests took {one_s} s one by one and {many_s} s with {n} in flight: "
            "{speedup} the output throughput, and each request took {latency} as long on average."
            if one.at == 1
            else "The same {requests} requests took {one_s} s and {many_s} s with {n} in flight: "
            "{speedup} the output throughput, and each request took {latency} as long on average.",
            requests=count(f"{one.name}.num_requests", one.median("num_requests")),
            one_s=cell(one, "duration_s", 4),
            many_s=cell(many, "duration_s", 4),
            n=at,
            speedup=times(f"{many.name}.speedup_tok_s", curve.ratio(many, one, "tok_s")),
            latency=times(f"{many.name}.slowdown_mean_e2e", curve.ratio(many, one, "mean_e2e_s")),
        )
        doc.bullets(
            phrase("concurrency {n}: {notes}", n=plain(f"{r.name}.concurrency", r.at), notes=notes)
            for r in curve.series.readings
            if (notes := level_notes(curve, r)).text
        )


def _ratio(curve: LoadCurve, one: Reading, many: Reading, column: str) -> Figure:
    return times(f"{many.name}.ratio.{column}", curve.ratio(many, one, column))


def _levels_section(doc: Document, curves: Sequence[LoadCurve]) -> None:
    doc.heading(2, "A few levels on one server")
    if not curves:
        _absent(doc, "The tutorial's table of levels", "batching")
    for curve in curves:
        _curve_heading(doc, curve)
        level_tables(doc, curve)


def level_tables(doc: Document, curve: LoadCurve) -> None:
    """Write the tutorial's table, and a second one with what stands beside tok_s."""
    readings, simulated = curve.series.readings, curve.series.sample.simulated
    doc.table([*SWEEP_COLUMNS, "notes"], [[*sweep_cells(r), level_notes(curve, r)] for r in readings], simulated)
    columns = [*MORE_COLUMNS, *goodput_column(readings)]
    doc.table(
        ["concurrency", *columns],
        [[plain(f"{r.name}.concurrency", r.at), *(cell(r, column, 4) for column in columns)] for r in readings],
        simulated,
    )
    add_steady_table(doc, curve)


def _sweep_section(doc: Document, curves: Sequence[LoadCurve]) -> None:
    doc.heading(2, "Concurrency sweep: the knee")
    if not curves:
        _absent(doc, "The shape of the curve from low to too high concurrency", "concurrency")
        return
    doc.say(
        "Two rules, the same for every curve. Throughput stops scaling at the lowest level whose tok_s is within "
        "{within} of the highest. Latency blows up at the first level where p95_e2e_s grew by a larger factor over the "
        "previous level than tok_s did and stayed there, a level's p95 counting as the lowest of its own and of all "
        "higher levels, so that one which rises and falls again is noise: from there on more load buys more waiting "
        "than work.",
        within=percent("rule.plateau_within_pct", PLATEAU_WITHIN, 0),
    )
    for curve in curves:
        _curve_heading(doc, curve)
        level_tables(doc, curve)
        doc.bullets(knee_sentences(curve))


def knee_sentences(curve: LoadCurve) -> list[Phrase]:
    """Return the answers to the tutorial's two questions for one curve."""
    levels = curve.levels
    if len(levels) < 2:
        return [
            phrase(
                "Where throughput stops scaling and latency blows up is not known: fewer than two levels were measured."
            )
        ]
    best, flat = curve.best, curve.plateau
    assert best is not None
    assert flat is not None
    last = levels[-1]
    if curve.still_rising:
        first = phrase(
            "Where does throughput stop scaling? Not within the levels tested: tok_s was still rising at concurrency "
            "{last} ({tok_s} tok/s).",
            last=_at(last),
            tok_s=cell(last, "tok_s"),
        )
    else:
        first = phrase(
            "Where does throughput stop scaling? At concurrency {flat}: {tok_s} tok/s, the highest of all levels being "
            "{best_tok_s} at {best}.",
            flat=_at(flat),
            tok_s=cell(flat, "tok_s"),
            best_tok_s=cell(best, "tok_s"),
            best=_at(best),
        )
    return [first, _blow_up(curve)]


def _blow_up(curve: LoadCurve) -> Phrase:
    bend, before = curve.overtake, curve.before_overtake
    if bend is None or before is None:
        last = curve.levels[-1]
        return phrase(
            "Where does latency blow up? Not within the levels tested: up to concurrency {last} p95 never grew for "
            "good by a larger factor than tok_s; p95 there is {p95} s.",
            last=_at(last),
            p95=cell(last, "p95_e2e_s"),
        )
    unconfirmed = " No higher level was measured that could confirm it." if bend is curve.levels[-1] else ""
    return phrase(
        "Where does latency blow up? From concurrency {before} to {bend}: p95 went from {p95_before} to {p95} s "
        "({p95_ratio}) while tok_s went {tok_ratio}." + unconfirmed,
        before=_at(before),
        bend=_at(bend),
        p95_before=cell(before, "p95_e2e_s"),
        p95=cell(bend, "p95_e2e_s"),
        p95_ratio=times(f"{bend.name}.bend_p95_ratio", curve.ratio(bend, before, "p95_e2e_s")),
        tok_ratio=times(f"{bend.name}.bend_tok_s_ratio", curve.ratio(bend, before, "tok_s")),
    )


def _at(reading: Reading) -> Figure:
    return plain(f"{reading.name}.concurrency", reading.at)
