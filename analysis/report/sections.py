"""What stands in report.html, from the answer to where it comes from. A section whose data are missing says which sweep
would tell.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from analysis.advice.limits import verdict_on_the_run
from analysis.load.knee_sentences import knee_sentences
from analysis.load.load_curve import LoadCurve, knee_curves, load_curves
from analysis.load.load_tables import lengths, unmeasured_notes
from analysis.load.neighbours import add_neighbours
from analysis.load.rates import keeps_up_sentence, level_words, rate_curves
from analysis.load.request_notes import request_notes
from analysis.load.strangers import resting_on
from analysis.memory.envelope_grid import envelope_grids
from analysis.memory.kv_fit import kv_results
from analysis.pages.answer import findings, losses
from analysis.pages.envelope_sweep import summary
from analysis.pages.timeline import bars_of
from analysis.pages.without_rows import no_closed_loop
from analysis.report.envelope_chart import envelope_chart
from analysis.report.load_charts import comparable, concurrency_charts, pareto_chart, rate_charts
from analysis.report.memory_chart import memory_chart
from analysis.report.page import Page
from analysis.report.samples import Bands, Clock, clock_of, server_samples, telemetry
from analysis.report.startup_chart import waterfall
from analysis.report.time_charts import TimeAxis, axis_for, band_chart, gantt
from analysis.report.vega import Chart
from analysis.rows.caveats import add_caveats, add_failures, identity
from analysis.rows.manifest import read_manifest
from analysis.rows.series import outcome, outcome_figure
from analysis.rows.tables import RunPoint, Tables
from analysis.rows.targets import Slo, Targets, read_slo, read_targets
from analysis.writing.document import Part, Phrase, join, phrase
from analysis.writing.figures import GIB, NOTHING, Figure, clean, count, quote, significant
from contract.rows import MEASURED, SessionRow

FILE = "report.html"
CARDS = (
    ("utilization_pct", "utilisation (%)", 1.0, 100.0),
    ("power_w", "power (W)", 1.0, None),
    ("memory_used_bytes", "memory (GiB)", float(GIB), None),
)
"""Columns of telemetry.parquet: title, what they are divided by, end of the axis."""
MOST_LOGS = 8
LOG_END = 4_000
"""Characters of a failure's log."""


def report_page(run_dir: Path, tables: Tables) -> Page:
    """Return the page of a run, whatever it holds."""
    doc = Page(FILE)
    doc.heading(1, "What this run found")
    _run(doc, tables)
    add_caveats(doc, tables.points, tables)
    _answer(doc, tables, read_slo(run_dir), read_targets(run_dir))
    _load(doc, tables)
    _rates(doc, tables)
    _trade(doc, tables)
    add_neighbours(doc, tables)
    _memory(doc, tables)
    _envelope(doc, tables)
    _time(doc, run_dir, tables)
    add_failures(doc, tables.points, tables)
    _logs(doc, tables.points)
    _provenance(doc, read_manifest(run_dir), tables)
    return doc


def title(tables: Tables) -> str:
    """Return what a browser's tab says."""
    return f"{_run_id(tables)}: what this run found"


def _run_id(tables: Tables) -> str:
    ids = [*(point.run_id for point in tables.points), *(session.run_id for session in tables.sessions)]
    return next((clean(run_id) for run_id in ids), "a run")


def _run(doc: Page, tables: Tables) -> None:
    points, measured = len(tables.points), sum(point.status == MEASURED for point in tables.points)
    words = "Run {run}: {measured} of {points} points measured."
    parts: dict[str, Part] = {"run": quote("run.id", _run_id(tables)), "measured": count("run.measured", measured)}
    if tables.unfinished is None:
        doc.say(words, points=count("run.points", points), **parts)
    else:
        doc.say(words + " It is not whole.", points=count("run.known", points + tables.planned_without_row), **parts)


def _answer(doc: Page, tables: Tables, slo: Slo, targets: Targets) -> None:
    doc.heading(2, "Answer")
    for finding in findings(tables, slo, targets):
        doc.say("**{about}**", about=finding.about)
        doc.bullets(finding.lines)
    doc.bullets(losses(tables))


def _plotted(tables: Tables) -> list[LoadCurve]:
    """The curves that the knee is read from, and the near-full ladder; without a concurrency there is no place."""
    curves = [*knee_curves(tables.points), *load_curves(tables.points, "near_full_context")]
    return [curve for curve in curves if any(reading.at > 0 for reading in curve.series.readings)]


def _load(doc: Page, tables: Tables) -> None:
    doc.heading(2, "Throughput and latency against concurrency")
    curves = _plotted(tables)
    if not curves:
        doc.say(
            f"Not known from this run: it holds {no_closed_loop(tables.points)}; `+sweep=concurrency` measures them."
        )
        return
    doc.say("A closed loop: so many requests are in flight all the time. Curves share axes where their lengths agree.")

    def sentences(curve: LoadCurve) -> list[Phrase]:
        return [*knee_sentences(curve), verdict_on_the_run(curve, tables.configs)]

    _curves(doc, curves, concurrency_charts, sentences)


def _curves(
    doc: Page,
    curves: list[LoadCurve],
    charts_of: Callable[[Sequence[LoadCurve]], list[Chart]],
    sentences: Callable[[LoadCurve], list[Phrase]],
) -> None:
    """Curves whose lengths agree in the same charts, and what is to be said of each."""
    for same in comparable(curves):
        doc.heading(3, "{lengths}", lengths=lengths(same[0]))
        charts = charts_of(same)
        if not charts:
            doc.say("None of these levels was measured, so there is nothing to draw.")
        doc.charts(charts)
        for curve in same:
            if len(same) > 1:
                doc.say("{who}:", who=identity(curve.series.sample, curve.name, curve.series.group.label))
            doc.bullets(sentences(curve))


def _trade(doc: Page, tables: Tables) -> None:
    doc.heading(2, "Throughput of a GPU against the speed a user sees")
    drawn = [(same, chart) for same in comparable(_plotted(tables)) if (chart := pareto_chart(same)) is not None]
    if not drawn:
        doc.say(
            "Not known from this run: no measured level of a closed loop has both tok_s and a TPOT, which answers of "
            "two tokens or more have; `+sweep=concurrency` measures them."
        )
        return
    doc.say(
        "*tok/s per user* is what one stream gets once its first token is there: one over the median TPOT, medians of "
        "repeats; TTFT is not in it. *tok/s per GPU* is the level's output tok/s over the GPUs of its server (of "
        "the whole server where it has none). Up and to the right is better. A level that failed has no place in this "
        "chart."
    )
    for same, chart in drawn:
        doc.heading(3, "{lengths}", lengths=lengths(same[0]))
        doc.charts([chart])


def _memory(doc: Page, tables: Tables) -> None:
    doc.heading(2, "Memory against max_model_len")
    drawn = [(result, chart) for result in kv_results(tables.points) if (chart := memory_chart(result)) is not None]
    if not drawn:
        doc.say("Not known from this run: no reading of memory at any length was measured; `+sweep=kv` measures them.")
        return
    doc.say("Of all cards of a server together. What the numbers say is in kv_cache_scaling_notes.md.")
    for result, chart in drawn:
        doc.heading(3, "{who}", who=identity(result.sample, result.name, result.group.label))
        doc.charts([chart])


def _rates(doc: Page, tables: Tables) -> None:
    """Nothing where no level has an arrival rate: the closed loop above is what most runs have."""
    curves = rate_curves(tables.points)
    if not curves:
        return
    doc.heading(2, "Latency against arrival rate")
    doc.say(
        "An open loop: requests are sent when they are due, however many are in flight. Curves share axes where their "
        "lengths agree; their numbers are in rate_sweep.md."
    )
    _curves(
        doc,
        curves,
        rate_charts,
        lambda curve: [keeps_up_sentence(curve), *_rate_notes(curve), *resting_on(curve.levels)],
    )


def _rate_notes(curve: LoadCurve) -> list[Phrase]:
    """What a reader must know of a level's p95 before trusting its place in the chart."""
    return [
        phrase("{level}: {notes}", level=level_words(reading), notes=join(notes))
        for reading in curve.series.readings
        if (notes := [*request_notes(reading), *unmeasured_notes(reading)])
    ]


def _envelope(doc: Page, tables: Tables) -> None:
    """Nothing where the run has no cell."""
    grids = envelope_grids(tables)
    if not grids:
        return
    doc.heading(2, "Which contexts fit at once")
    doc.say(
        "Each field is what KV arithmetic expects of so many requests at once that grow to a context; a mark is what a "
        "cell that was measured showed. The words are those of envelope_sweep.md."
    )
    for grid in grids:
        doc.heading(3, "{who}", who=identity(grid.sample, grid.name, grid.group.label))
        doc.charts([envelope_chart(grid)])
        doc.bullets([summary(grid)])


def _time(doc: Page, run_dir: Path, tables: Tables) -> None:
    clock = clock_of(tables)
    cards = telemetry(run_dir, clock, [column for column, *_ in CARDS])
    pools = server_samples(run_dir, clock, ["kv_usage"])
    time = axis_for(_span_s(tables, [*cards.values(), *pools.values()]))
    _cards(doc, cards, time)
    _pools(doc, pools, time)
    _servers(doc, tables, clock, time)
    _starts(doc, tables)


def _span_s(tables: Tables, sampled: Sequence[Bands]) -> float:
    ends = [bar.end_s for bar in bars_of(tables)[1]]
    ends += [line[-1].start_s for bands in sampled for band in bands.bands for line in band.segments]
    return max(ends, default=0.0)


def _cards(doc: Page, cards: Mapping[str, Bands], time: TimeAxis) -> None:
    doc.heading(2, "Cards over time")
    if not cards:
        doc.say(
            "Not known from this run: it holds no samples of its cards, which are taken while a point is measured; any "
            "sweep takes them, `+sweep=concurrency` at most points."
        )
        return
    _binned(doc, "telemetry", next(iter(cards.values())).bin_s)
    doc.charts(band_chart(cards[name], what, by, time, top) for name, what, by, top in CARDS if name in cards)


def _pools(doc: Page, pools: Mapping[str, Bands], time: TimeAxis) -> None:
    doc.heading(2, "KV usage over time")
    if not pools:
        doc.say(
            "Not known from this run: it holds no samples of its servers' KV pools, which are taken while a level of "
            "load is measured; `+sweep=concurrency` takes them."
        )
        return
    _binned(doc, "server_samples", pools["kv_usage"].bin_s)
    doc.charts([band_chart(pools["kv_usage"], "KV blocks in use (%)", 0.01, time, 100.0)])


def _binned(doc: Page, table: str, bin_s: float) -> None:
    doc.say(
        "Samples are taken while a point is measured. They are shown in bins of {bin} s: the band is from the lowest "
        "to the highest sample of a bin, the line is their mean. Every sample is in " + table + ".parquet.",
        bin=significant(f"report.{table}.bin_s", bin_s, 2),
    )


def _servers(doc: Page, tables: Tables, clock: Clock, time: TimeAxis) -> None:
    doc.heading(2, "Servers on their cards")
    made = gantt(tables, time)
    if made is None:
        doc.say(
            "Not known from this run: no server has both a start and an end in sessions.parquet; any sweep that runs "
            "to its end writes them."
        )
        return
    doc.say("One bar a server. Between nodes the places are as true as the nodes' clocks.")
    if made.left_out:
        doc.say("The {n} servers that lived shortest are left out.", n=count("report.servers_left_out", made.left_out))
    doc.charts([made.chart])


def _starts(doc: Page, tables: Tables) -> None:
    doc.heading(2, "Where the start of each server went")
    made = waterfall(tables)
    if made is None:
        doc.say("Not known from this run: no row of a server holds the phases of its start, which vLLM's log tells.")
        return
    if made.left_out:
        doc.say("The {n} shortest starts are left out.", n=count("report.starts_left_out", made.left_out))
    doc.charts([made.chart])


def _logs(doc: Page, points: Sequence[RunPoint]) -> None:
    """The first failure of each kind with its words and the end of its log."""
    first: dict[str, RunPoint] = {}
    for point in points:
        if point.status != MEASURED and (point.failure_message or point.log_tail):
            first.setdefault(outcome(point), point)
    for point in list(first.values())[:MOST_LOGS]:
        words = "\n".join(filter(None, [point.failure_message, (point.log_tail or "")[-LOG_END:]]))
        doc.code(words, phrase("{why}: words and log of the first such point", why=outcome_figure(point)))


def _provenance(doc: Page, manifest: dict[str, Any], tables: Tables) -> None:
    doc.heading(2, "Where it comes from")
    if not manifest:
        doc.say("This run holds no readable manifest.json: its command line and versions are not known from it.")
    else:
        argv = manifest.get("argv")
        if isinstance(argv, list) and argv:
            doc.code(shlex.join(map(str, argv)))
        doc.table(["what", "value"], _facts(manifest))
    rows = _servers_of(tables.sessions)
    if rows:
        doc.table(["device", "cards", "vLLM", "torch", "driver", "python", "servers"], rows)
    seeds = sorted({point.seed for point in tables.points if point.seed is not None})
    if seeds:
        doc.say("Seeds of the points: {seeds}.", seeds=quote("run.seeds", ", ".join(map(str, seeds))))
    cards = sorted({(s.node or "", device) for s in tables.sessions for device in s.device_ids or ()})
    if cards:
        doc.say("Cards, by node and device id:")
        doc.code("\n".join(clean(f"{node}  {device}") for node, device in cards))
    configuration = manifest.get("experiments")
    if configuration:
        doc.code(json.dumps(configuration, indent=1), phrase("Configuration of the experiments, from manifest.json"))


def _facts(manifest: dict[str, Any]) -> list[list[str | Part]]:
    """Names and values that are plain words or numbers; plan and configuration are elsewhere."""
    rows: list[list[str | Part]] = []
    for name in ("created_at", "status", "schema_version", "workload_version", "python", "platform"):
        if isinstance(manifest.get(name), str | int):
            rows.append([name, quote(f"manifest.{name}", str(manifest[name]))])
    versions = manifest.get("versions")
    for number, (package, version) in enumerate(versions.items() if isinstance(versions, dict) else ()):
        name = f"manifest.versions.{number}"
        rows.append([quote(f"{name}.package", str(package)), quote(f"{name}.version", str(version))])
    return rows


def _servers_of(sessions: Sequence[SessionRow]) -> list[list[str | Part]]:
    """One row for all servers of one kind of card and the same versions."""
    alike: dict[tuple[str, ...], list[SessionRow]] = {}
    for session in sessions:
        versions = (session.vllm_version, session.torch_version, session.driver_version, session.python_version)
        alike.setdefault(tuple(word or "" for word in (session.device_name, *versions)), []).append(session)
    rows: list[list[str | Part]] = []
    for kind in sorted(alike):
        some = alike[kind]
        name = f"server.{some[0].session_id}"
        columns = ("device_name", "vllm_version", "torch_version", "driver_version", "python_version")
        words: list[Figure] = [
            quote(f"{name}.{column}", word) if word else Figure(f"{name}.{column}", None, NOTHING)
            for column, word in zip(columns, kind, strict=True)
        ]
        held = count(f"{name}.cards", len({(s.node, device) for s in some for device in s.device_ids or ()}))
        rows.append([words[0], held, *words[1:], count(f"{name}.servers", len(some))])
    return rows
