"""The few lines a user reads in the terminal when a run ends; the same numbers as on the pages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from analysis.caveats import lengths_words, silent_sessions, title
from analysis.envelope_sweep import envelopes, summary
from analysis.figures import clean, significant_text
from analysis.knee_sentences import terminal_words
from analysis.kv_estimates import estimates
from analysis.kv_fit import KvResult, kv_results
from analysis.load_curve import LoadCurve
from analysis.objective_sentences import border_words
from analysis.operating_point import Basis, Choice, Standing, choices
from analysis.rates import level_words, rate_curves
from analysis.rules import knee_curves
from analysis.series import outcome
from analysis.tables import read_tables
from analysis.targets import Slo, read_slo
from contract.rows import MEASURED, PRUNED


def answer(run_dir: Path) -> str:
    """Return the main results of a reduced run: bytes per token, capacity, throughput, failures, where files are."""
    tables, slo = read_tables(run_dir), read_slo(run_dir)
    lines: list[str] = []
    for result in kv_results(tables.points):
        lines += _kv_lines(result)
    for curve in knee_curves(tables.points):
        lines += _load_lines(curve)
        lines += _objective_lines(curve, slo, "concurrency")
    for curve in rate_curves(tables.points):
        lines += _objective_lines(curve, slo, "requests/s")
    if slo.percentiles():
        lines += [_operating_line(choice) for choice in choices(tables.points, slo, None)]
    for envelope in envelopes(tables):
        lines += [title(envelope.sample, envelope.group.label), f"  {summary(envelope).text}"]
    lost = Counter(outcome(point) for point in tables.points if point.status not in (MEASURED, PRUNED))
    if lost:
        classes = ", ".join(f"{words} x{number}" for words, number in sorted(lost.items()))
        lines.append(f"Not measured: {sum(lost.values())} of {len(tables.points)} points ({classes})")
    if silent := silent_sessions(tables):
        lines.append(f"Sessions that failed before any of their points had a row: {silent}")
    if not tables.points:
        lines.append("No point was measured.")
    lines.append(f"Files: {run_dir}")
    return "\n".join([*map(_one_line, lines[:-1]), lines[-1]])


def _one_line(words: str) -> str:
    """Rows may come from elsewhere: nothing in them may move the cursor of a terminal."""
    return " " * (len(words) - len(words.lstrip(" "))) + clean(words)


def _kv_lines(result: KvResult) -> Iterator[str]:
    sample = result.readings[0].measured[0] if result.readings else result.group.points[0]
    yield title(sample, result.group.label)
    found = [f"{estimate.short} {estimate.bytes_per_token:,.0f}" for estimate in estimates(result)]
    if found:
        yield f"  bytes per KV token: {', '.join(found)}"
    for series in result.capacity:
        fits = [
            f"{concurrency:,.2f} x {reading.at}"
            for reading in series.measured
            if (concurrency := reading.median("engine_max_concurrency")) is not None
        ]
        if fits:
            share = series.sample.gpu_memory_utilization or 0
            yield f"  full-length sequences at gpu_memory_utilization {share:g}: {', '.join(fits)} tokens"


def _operating_line(choice: Choice) -> str:
    """The operating point of one load, or that it is not known; what its verdict is about stands on the page."""
    kind = ", by arrival rate" if choice.open_loop else ""
    head = f"  operating point ({lengths_words(choice.sample)}{kind}): "
    if choice.point is None:
        measured = [candidate.standing for candidate in choice.candidates if candidate.measured]
        none = measured and all(standing is Standing.MISSES for standing in measured)
        return head + ("no measured level meets the objectives" if none else "not known from this run")
    certain = "" if choice.basis is Basis.OBJECTIVES else "beyond noise not known from this run; as it stands "
    level = level_words(choice.point.reading).plain
    tok_s, p95 = significant_text(choice.point.tok_s), significant_text(choice.point.p95_e2e_s)
    return f"{head}{certain}{level}, {tok_s} tok/s at p95 {p95} s"


def _load_lines(curve: LoadCurve) -> Iterator[str]:
    best, sample = curve.best, curve.series.sample
    yield title(sample, curve.series.group.label)
    if best is None:
        yield "  no level of load was measured"
        return
    yield (
        f"  best throughput: {significant_text(best.median('tok_s') or 0)} tok/s at concurrency {best.at}, "
        f"p95 {significant_text(best.median('p95_e2e_s') or 0)} s "
        f"({lengths_words(sample)})"
    )
    if len(curve.levels) > 1:
        yield f"  {terminal_words(curve)}"


def _objective_lines(curve: LoadCurve, slo: Slo, unit: str) -> Iterator[str]:
    if slo.percentiles():
        yield f"  {unit}: {border_words(curve, slo).text}"
