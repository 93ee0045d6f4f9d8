"""concurrency_sweep.csv, and the cells that it shares with the tables of batching_benchmark.md.

A level is the median of its repeats, column by column. A level that failed stays as a row with empty cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from analysis.load.knee import KneeVerdict
from analysis.load.load_curve import P95_JUMP, LoadCurve
from analysis.load.request_notes import request_notes
from analysis.numbers.intervals import CONFIDENCE
from analysis.rows.caveats import lengths_words
from analysis.rows.disturbances import clock_notes, foreign_process_notes
from analysis.rows.series import Reading, concurrency_figure, outcome_figure
from analysis.rows.tables import RunPoint
from analysis.rows.targets import Slo
from analysis.writing.document import Document, Part, Phrase, join, phrase
from analysis.writing.figures import (
    NOTHING,
    Figure,
    count,
    decimal,
    percent,
    plain,
    quote,
    significant,
    significant_text,
    times,
)
from analysis.writing.files import write_csv

SWEEP_COLUMNS = ("concurrency", "mean_e2e_s", "p95_e2e_s", "qps", "tok_s", "gpu_util_pct")
FURTHER_COLUMNS = ("repeats", "tok_s_low", "tok_s_high", "p95_e2e_s_low", "p95_e2e_s_high", "knee")
"""Behind the tutorial's: the bounds of the 95 % intervals, and whether the level could be the knee (`could be`, `no`;
empty where that is not known)."""
NO_REQUESTS = "requests.parquet holds no rows of these requests"
SIMULATED = "simulated"
"""Stands in gpu_util_pct of simulated rows: there is no GPU to observe, and the tutorial's columns leave no other
place."""


def write_concurrency_sweep(run_dir: Path, curves: Sequence[LoadCurve], telling: Sequence[LoadCurve]) -> list[Path]:
    """Write one file per server and workload; the first owns the plain name. `telling`: the curves that knees are read
    from; the column is empty in the others."""
    told = {curve.name for curve in telling}
    return [
        write_csv(
            run_dir / curve.series.group.file("concurrency_sweep", ".csv"),
            (*SWEEP_COLUMNS, *FURTHER_COLUMNS),
            [
                [*_sweep_row(reading), *_further_cells(curve, reading, curve.name in told)]
                for reading in curve.series.readings
            ],
        )
        for curve in curves
    ]


def _sweep_row(reading: Reading) -> list[str]:
    cells = [csv_number(reading.median(column)) for column in SWEEP_COLUMNS[1:5]]
    if (reading.measured or reading.unmeasured)[0].simulated:
        return [str(reading.at), *cells, SIMULATED]
    utilization = reading.median("gpu_util_pct")
    return [str(reading.at), *cells, "" if utilization is None else f"{utilization:.1f}"]


def _further_cells(curve: LoadCurve, reading: Reading, tells: bool) -> list[str]:
    intervals = [curve.interval(reading, column) for column in ("tok_s", "p95_e2e_s")]
    bounds = [bound for i in intervals for bound in ((None, None) if i is None else (i.low, i.high))]
    told = tells and curve.knee.verdict is not KneeVerdict.UNDECIDED and not curve.beside_others
    known = told and bool(reading.measured)
    knee = ("could be" if reading.at in curve.knee.could_be else "no") if known else ""
    return [str(len(reading.measured)), *(csv_number(bound) for bound in bounds), knee]


def csv_number(value: float | None) -> str:
    """Return a cell of a CSV: six significant digits, more where a whole number has them; empty for None."""
    return "" if value is None else f"{value:.6g}" if value < 10**5 else f"{value:.0f}"


def cell(reading: Reading, column: str, digits: int = 3) -> Figure:
    """Return the median of a column as a figure of a table, with a fixed number of significant digits."""
    value = reading.median(column)
    return Figure(f"{reading.name}.{column}", value, NOTHING if value is None else significant_text(value, digits))


def requests_sent(reading: Reading) -> Figure:
    """Return the requests of a level, the median of its repeats."""
    return reading.figure(count, "num_requests")


SIZE = ("num_requests", "duration_s")
"""Columns that say how large a level was, in requests and seconds: what a percentile of it is worth."""


def size_cells(reading: Reading) -> list[Part]:
    """Return a level's cells in the order of `SIZE`."""
    return [requests_sent(reading), cell(reading, "duration_s", 4)]


def goodput_column(slo: Slo) -> list[str]:
    """Return the column of goodput where the run has objectives."""
    return ["goodput_qps"] if slo.percentiles() else []


def say_without_goodput(doc: Document, slo: Slo, readings: Sequence[Reading]) -> None:
    """Write why a column of goodput is empty; nothing where it is not."""
    if slo.percentiles() and any(r.measured for r in readings) and not any(r.values("goodput_qps") for r in readings):
        doc.say("goodput_qps is not known from this run: " + NO_REQUESTS + ".")


def interval_words(curve: LoadCurve, reading: Reading, column: str) -> Part:
    """Return `LOW to HIGH` of `tok_s` or `p95_e2e_s`; a dash where there is no interval."""
    interval = curve.interval(reading, column)
    if interval is None:
        return phrase(NOTHING)
    return phrase(
        "{low} to {high}",
        low=significant(f"{reading.name}.{column}_low", interval.low, 4),
        high=significant(f"{reading.name}.{column}_high", interval.high, 4),
    )


def confidence() -> Figure:
    """Return the confidence of every interval as a figure."""
    return percent("rule.confidence_pct", CONFIDENCE, 0)


def utilization_cell(reading: Reading) -> Part:
    """Return gpu_util_pct for a Markdown table: a number only where a real GPU was observed."""
    if (reading.measured or reading.unmeasured)[0].simulated:
        return phrase(SIMULATED)
    value = reading.median("gpu_util_pct")
    return phrase("") if value is None else decimal(f"{reading.name}.gpu_util_pct", value, 1)


def sweep_cells(reading: Reading) -> list[Part]:
    """Return a level's cells in the order of `SWEEP_COLUMNS`."""
    at = concurrency_figure(reading)
    return [at, *(cell(reading, column, 4) for column in SWEEP_COLUMNS[1:5]), utilization_cell(reading)]


def level_notes(curve: LoadCurve, reading: Reading) -> Phrase:
    """Return what was odd about a level: jumps, failures, spread, cache hits, tokens that the server counted otherwise,
    preemptions, a client that lagged, processes of others on the card, a clock held down."""
    notes: list[Part] = []
    name = reading.name
    previous = curve.previous(reading)
    jump = curve.ratio(reading, previous, "p95_e2e_s") if previous else None
    if jump is not None and jump >= P95_JUMP:
        notes.append(phrase("p95 {ratio} the previous level", ratio=times(f"{name}.p95_ratio", jump)))
    if len(reading.measured) > 1:
        notes.append(
            phrase(
                "median of {n}, tok/s spread {spread}, mean {interval} at {confidence}",
                n=count(f"{name}.repeats", len(reading.measured)),
                spread=percent(f"{name}.tok_s_spread_pct", reading.spread("tok_s")),
                interval=interval_words(curve, reading, "tok_s"),
                confidence=confidence(),
            )
        )
    elif reading.measured:
        notes.append(phrase("one repeat"))
    notes += [*request_notes(reading), *foreign_process_notes(reading), *clock_notes(reading)]
    return join([*notes, *unmeasured_notes(reading)])


def unmeasured_notes(reading: Reading) -> list[Part]:
    """Return what became of the repeats that are no measurement."""
    outcomes: dict[str, Figure] = {}
    for point in reading.unmeasured:
        outcomes.setdefault(outcome_figure(point).text, outcome_figure(point))
    if not outcomes:
        return []
    lost = count(f"{reading.name}.unmeasured", len(reading.unmeasured))
    return [phrase("{n} not measured ({why})", n=lost, why=join(outcomes.values(), ", "))]


def workload(curve: LoadCurve) -> Phrase:
    """Return the lengths that every sentence about a curve must name."""
    point, name = curve.series.sample, curve.name
    shared = [quote(f"{name}.shared_prefix", point.shared_prefix)] if point.shared_prefix else []
    length = phrase("max_model_len {length}", length=plain(f"{name}.max_model_len", point.max_model_len))
    return join([lengths_sent(curve), length, *shared], ", ")


def lengths_sent(curve: LoadCurve) -> Phrase:
    """Return what requests of a curve ask for: `prompts of N tokens, answers of N`."""
    point, name = curve.series.sample, curve.name
    return phrase(
        ("chat prompts of about" if point.api == "chat" else "prompts of") + " {prompt}, answers of {output}",
        prompt=_length(name, "prompt", point, " tokens"),
        output=_length(name, "output", point, ""),
    )


def lengths(curve: LoadCurve) -> Figure:
    """Return a load's lengths as a figure, in short: `12 + 64 tokens`."""
    return quote(f"{curve.name}.lengths", lengths_words(curve.series.sample))


def _length(name: str, of: str, point: RunPoint, unit: str) -> Phrase:
    mean = count(f"{name}.{of}_tokens", getattr(point, f"{of}_tokens"))
    drawn = getattr(point, f"{of}_lengths")
    if drawn is None:
        return phrase("{n}" + unit, n=mean)
    return phrase("{n}" + unit + " on average, {drawn}", n=mean, drawn=quote(f"{name}.{of}_lengths", drawn))


def label_figure(curve: LoadCurve) -> Figure:
    """Return what tells a curve's server and load from others, as a figure."""
    return quote(f"{curve.name}.label", curve.label)


def server(curve: LoadCurve) -> Phrase:
    """Return the server's configuration in words: what was fixed while concurrency varied."""
    point, name = curve.series.sample, curve.name
    parts: list[Part] = [phrase("max_model_len {n}", n=plain(f"{name}.max_model_len", point.max_model_len))]
    if point.kv_cache_memory_bytes is not None:
        parts.append(
            phrase("kv_cache_memory_bytes {n}", n=plain(f"{name}.kv_cache_memory_bytes", point.kv_cache_memory_bytes))
        )
    elif point.gpu_memory_utilization is not None:
        share = quote(f"{name}.gpu_memory_utilization", f"{point.gpu_memory_utilization:g}")
        parts.append(phrase("gpu_memory_utilization {share}", share=share))
    for column in ("max_num_seqs", "max_num_batched_tokens"):
        value = getattr(point, column)
        parts.append(
            phrase(column + " left to vLLM")
            if value is None
            else phrase(column + " {n}", n=plain(f"{name}.{column}", value))
        )
    parts.append(
        phrase("tensor_parallel_size {n}", n=plain(f"{name}.tensor_parallel_size", point.tensor_parallel_size))
    )
    parts.append(phrase("dtype {words}", words=quote(f"{name}.dtype", point.dtype)))
    parts.append(phrase("kv_cache_dtype {words}", words=quote(f"{name}.kv_cache_dtype", point.kv_cache_dtype)))
    if point.quantization:
        parts.append(phrase("quantization {words}", words=quote(f"{name}.quantization", point.quantization)))
    if point.enforce_eager:
        parts.append(phrase("enforce_eager"))
    elif point.device == "cuda":
        parts.append(phrase("CUDA graphs on"))
    return join(parts, ", ")
