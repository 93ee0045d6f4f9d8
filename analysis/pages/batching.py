"""batching_benchmark.md: sequential against concurrent, the table of levels, the sweep, the ladder, rules of thumb."""

from __future__ import annotations

from collections.abc import Sequence

from analysis.advice.limits import add_limits
from analysis.advice.rules import rules_of_thumb
from analysis.advice.under_use import add_under_use
from analysis.load.anchors import add_anchors
from analysis.load.knee_sentences import add_rule, knee_sentences, knee_table, twin_sentences
from analysis.load.ladder import add_ladder
from analysis.load.load_curve import LoadCurve, closed_loops, knee_curves, load_curves
from analysis.load.load_tables import (
    SIZE,
    SWEEP_COLUMNS,
    cell,
    goodput_column,
    level_notes,
    say_without_goodput,
    server,
    size_cells,
    sweep_cells,
    workload,
)
from analysis.load.neighbours import add_neighbours
from analysis.load.objective_sentences import add_border, add_objectives
from analysis.load.request_notes import P99_NEEDS, few_for_p99
from analysis.load.server_table import add_server_table
from analysis.load.steady_table import add_steady_table
from analysis.pages.without_rows import no_closed_loop, page_without_rows
from analysis.rows.caveats import add_caveats, add_failures, identity
from analysis.rows.series import Reading, concurrency_figure
from analysis.rows.tables import Tables
from analysis.rows.targets import NO_OBJECTIVES, Slo
from analysis.writing.document import Document, Part, phrase
from analysis.writing.figures import NOTHING, Figure, count, times

FILE = "batching_benchmark.md"
TITLE = "Micro-batching under load"
NO_ROWS = (
    "so no concurrency_sweep.csv, and neither what concurrency buys over one request at a time nor where throughput "
    "stops scaling; `+sweep=capacity` measures both, `+sweep=knee` the second."
)
PURPOSES = ("comparison", "batching", "concurrency", "near_full_context", "anchor", "control")
MORE_COLUMNS = ("tok_s", "total_tok_s", "p50_ttft_s", "p95_ttft_s", "p50_tpot_s", "p99_e2e_s")
PAIR_ROWS = (
    ("s, all requests", "duration_s"),
    ("qps", "qps"),
    ("tok_s", "tok_s"),
    ("total_tok_s", "total_tok_s"),
    ("mean_e2e_s", "mean_e2e_s"),
    ("p95_e2e_s", "p95_e2e_s"),
)


def batching_page(tables: Tables, slo: Slo = NO_OBJECTIVES) -> Document:
    """Return the page; of a run without a row of load in a closed loop one that says so."""
    rows = [point for point in tables.points if point.purpose in PURPOSES]
    if not rows:
        return page_without_rows(FILE, TITLE, tables, f"it holds {no_closed_loop(tables.points)}, {NO_ROWS}")
    doc = Document(FILE)
    doc.heading(1, TITLE)
    add_caveats(doc, rows, tables)
    doc.say(
        "Closed loop: that many requests are in flight all the time. tok_s counts completion tokens of successful "
        "requests over the whole window, ramp and drain included; total_tok_s counts their prompts, too. "
        "A level is the median of its repeats, column by column."
    )
    _comparison_section(doc, load_curves(rows, "comparison"))
    _levels_section(doc, load_curves(rows, "batching"), slo)
    _sweep_section(doc, load_curves(rows, "concurrency"), knee_curves(rows), slo)
    _objectives_section(doc, closed_loops(rows), slo)
    add_ladder(doc, load_curves(rows, "near_full_context"))
    add_limits(doc, closed_loops(rows), tables.configs)
    add_anchors(doc, rows)
    add_neighbours(doc, tables)
    add_under_use(doc, rows)
    doc.heading(2, "Rules of thumb")
    rules = rules_of_thumb(tables)
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
                [[concurrency_figure(r), cell(r, "tok_s"), level_notes(curve, r)] for r in curve.series.readings],
                curve.series.sample.simulated,
            )
            continue
        one, many = levels[0], levels[-1]
        at = concurrency_figure(many)
        first = "sequential" if one.at == 1 else "concurrency {n}"
        head = phrase(first) if one.at == 1 else phrase(first, n=concurrency_figure(one))
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
            phrase("concurrency {n}: {notes}", n=concurrency_figure(r), notes=notes)
            for r in curve.series.readings
            if (notes := level_notes(curve, r)).text
        )


def _ratio(curve: LoadCurve, one: Reading, many: Reading, column: str) -> Figure:
    return times(f"{many.name}.ratio.{column}", curve.ratio(many, one, column))


def _levels_section(doc: Document, curves: Sequence[LoadCurve], slo: Slo) -> None:
    doc.heading(2, "A few levels on one server")
    if not curves:
        _absent(doc, "The tutorial's table of levels", "batching")
    for curve in curves:
        _curve_heading(doc, curve)
        level_tables(doc, curve, slo)


def level_tables(doc: Document, curve: LoadCurve, slo: Slo) -> None:
    """Write the tutorial's table, and a second one with what stands beside tok_s."""
    readings, simulated = curve.series.readings, curve.series.sample.simulated
    doc.table([*SWEEP_COLUMNS, "notes"], [[*sweep_cells(r), level_notes(curve, r)] for r in readings], simulated)
    columns = [*MORE_COLUMNS, *goodput_column(slo)]
    doc.table(
        ["concurrency", *SIZE, *columns],
        [[concurrency_figure(r), *size_cells(r), *(_more_cell(r, column) for column in columns)] for r in readings],
        simulated,
    )
    say_without_goodput(doc, slo, readings)
    if any(map(few_for_p99, readings)):
        doc.say(
            "A p99 of fewer than {n} requests lies between the two highest, and is left out.",
            n=count("rule.p99_needs", P99_NEEDS),
        )
    add_steady_table(doc, curve)
    add_server_table(doc, curve, "concurrency", concurrency_figure)


def _more_cell(reading: Reading, column: str) -> Part:
    return phrase(NOTHING) if column == "p99_e2e_s" and few_for_p99(reading) else cell(reading, column, 4)


def _sweep_section(doc: Document, sweeps: Sequence[LoadCurve], telling: Sequence[LoadCurve], slo: Slo) -> None:
    """Write the sweep and its knee; of a server without a sweep that tells it, the knee as far as the few levels of the
    other table tell it. `telling`: the curve of each server that its knee is read from."""
    doc.heading(2, "Concurrency sweep: the knee")
    if not sweeps:
        _absent(doc, "The shape of the curve from low to too high concurrency (concurrency_sweep.csv)", "concurrency")
    if not telling:
        return
    add_rule(doc)
    told = {curve.name for curve in telling}
    for curve in sweeps:
        _curve_heading(doc, curve)
        level_tables(doc, curve, slo)
        if curve.name in told:
            knee_table(doc, curve)
            doc.bullets([*knee_sentences(curve), *twin_sentences(curve)])
        else:
            higher, few = "The levels of the other table go higher", "Too few of these levels were measured"
            doc.say((higher if len(curve.levels) > 1 else few) + ", so the knee is read from that table, below.")
    for curve in telling:
        if curve.series.sample.purpose == "batching":
            _curve_heading(doc, curve)
            doc.say("As far as the few levels above tell it:")
            knee_table(doc, curve)
            doc.bullets(knee_sentences(curve))


def _objectives_section(doc: Document, curves: Sequence[LoadCurve], slo: Slo) -> None:
    """Nothing where the run has no objective."""
    if not slo.percentiles():
        return
    doc.heading(2, "Which concurrency holds the objectives?")
    if not curves:
        _absent(doc, "Which concurrency holds them", "slo")
        return
    add_objectives(doc, slo, "concurrency")
    for curve in curves:
        _curve_heading(doc, curve)
        add_border(doc, curve, slo, "concurrency")
