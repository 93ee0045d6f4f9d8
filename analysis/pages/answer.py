"""What a run found, in a few lines: printed in the terminal when it ends, and the first section of report.html."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from analysis.advice.kv_headroom import longest_safe, room_words
from analysis.advice.limits import limit_in_short
from analysis.advice.operating_point import Basis, Choice
from analysis.advice.operating_sentences import gives
from analysis.advice.subject import subject_of, subjects
from analysis.advice.target_load import target_under_load
from analysis.load.checks import Standing
from analysis.load.knee_sentences import both_answers
from analysis.load.load_curve import LoadCurve, closed_loops
from analysis.load.load_tables import cell, lengths
from analysis.load.objective_sentences import border_words
from analysis.load.rates import keeps_up_sentence, level_words, rate_curves
from analysis.load.strangers import resting_on
from analysis.memory.envelope_grid import envelope_grids
from analysis.memory.kv_envelope import card_envelope
from analysis.memory.kv_estimates import estimates
from analysis.memory.kv_fit import KvResult, kv_results
from analysis.memory.kv_pages import Configs
from analysis.memory.kv_too_long import too_long
from analysis.pages.envelope_sweep import summary
from analysis.rows.caveats import forked_words, missing_words, next_steps, not_whole, silent_sessions, title
from analysis.rows.series import Reading, concurrency_figure, outcome, outcome_figure, point_name
from analysis.rows.tables import RunPoint, Tables, read_tables
from analysis.rows.targets import Slo, Targets, read_slo, read_targets
from analysis.writing.document import Phrase, join, phrase
from analysis.writing.figures import count, decimal, percent, plain, quote
from contract.rows import MEASURED, PRUNED


@dataclass(frozen=True, slots=True)
class Finding:
    """What the run says about one model on one kind of card, or one server under one load."""

    about: Phrase
    lines: tuple[Phrase, ...]


def answer(run_dir: Path) -> str:
    """Return the main results of a reduced run: bytes per token, capacity, throughput, failures, where files are."""
    tables = read_tables(run_dir)
    lines: list[str] = []
    for finding in findings(tables, read_slo(run_dir), read_targets(run_dir)):
        lines += [finding.about.plain, *(f"  {line.plain}" for line in finding.lines)]
    lines += [f"forked servers: {line.plain}" for line in forked_words(tables.points, tables)]
    lines += [f"not whole: {line.plain}" for line in not_whole(tables)]
    lines += [line.plain for line in (*losses(tables), *missing_words(tables))]
    return "\n".join([*lines, f"Files: {run_dir}"])


def findings(tables: Tables, slo: Slo, targets: Targets) -> list[Finding]:
    """Return what the run says about each model on each kind of card: what was decided first, what is open last.

    Without an objective an open loop has no operating point.
    """
    found, results = subjects(tables, slo, targets, None), kv_results(tables.points)
    memory = [Finding(_title(result.sample, result.name, result.group.label),
                      (*_target_lines(result, tables, targets), *target_under_load(subject_of(result, found)),
                       *_kv_lines(result)))
              for result in results]  # fmt: skip
    memory += [Finding(_whose(subject.main), tuple(target_under_load(subject)))
               for subject in found if subject.kv is None and subject.main is not None]  # fmt: skip
    load = [Finding(_about(curve), (*_load_lines(curve, tables.configs), *_objective(curve, slo, "concurrency"),
                                    *resting_on(curve.levels)))
            for curve in closed_loops(tables.points)]  # fmt: skip
    rates = [Finding(_about(curve), (_keeps_up(curve), *_objective(curve, slo, "requests/s"),
                                     *resting_on(curve.levels)))
             for curve in rate_curves(tables.points)]  # fmt: skip
    borders = [Finding(_title(envelope.sample, envelope.name, envelope.group.label), (summary(envelope),))
               for envelope in envelope_grids(tables)]  # fmt: skip
    made = [choice for subject in found for choice in subject.choices]
    asked = [choice for choice in made if slo.percentiles() or not choice.open_loop]
    chosen = [_operating(choice) for choice in asked if choice.point is not None]
    undecided = [_operating(choice) for choice in asked if choice.point is None]
    blocks: dict[str, list[Finding]] = {}
    for finding in [*chosen, *memory, *load, *rates, *borders, *undecided]:
        blocks.setdefault(finding.about.text, []).append(finding)
    return [
        Finding(some[0].about, tuple(dict.fromkeys(line for each in some for line in each.lines)))
        for some in blocks.values()
    ]


def losses(tables: Tables) -> list[Phrase]:
    """Return what was not measured; nothing where all was."""
    lines = []
    lost: dict[str, list[RunPoint]] = {}
    for point in tables.points:
        if point.status not in (MEASURED, PRUNED):
            lost.setdefault(outcome(point), []).append(point)
    if lost:
        lines.append(
            phrase(
                "Not measured: {n} of {all} points ({classes})",
                n=count("lost.points", sum(map(len, lost.values()))),
                all=count("run.points", len(tables.points)),
                classes=join((_lost(lost[words]) for words in sorted(lost)), ", "),
            )
        )
        lines += next_steps([point for points in lost.values() for point in points])
    if silent := silent_sessions(tables):
        lines.append(
            phrase("Sessions that failed before any of their points had a row: {n}", n=count("lost.sessions", silent))
        )
    if not tables.points:
        lines.append(phrase("No point was measured."))
    return lines


def _lost(points: Sequence[RunPoint]) -> Phrase:
    first = points[0]
    return phrase("{why} x{n}", why=outcome_figure(first), n=count(f"{point_name(first)}.alike", len(points)))


def _title(sample: RunPoint, name: str, label: str) -> Phrase:
    return phrase("{who}", who=quote(f"{name}.title", title(sample, label)))


def _about(curve: LoadCurve) -> Phrase:
    return _title(curve.series.sample, curve.name, curve.series.group.label)


def _kv_lines(result: KvResult) -> Iterator[Phrase]:
    found = [
        phrase(estimate.short + " {n}", n=count(estimate.name, estimate.bytes_per_token))
        for estimate in estimates(result)
    ]
    if found:
        yield phrase("bytes per KV token: {found}", found=join(found, ", "))
    if not result.readings:
        yield phrase("no reading of memory was measured")
    for series in result.capacity:
        fits = [_capacity(reading) for reading in series.measured if reading.values("engine_max_concurrency")]
        if fits:
            share = f"{series.sample.gpu_memory_utilization or 0:g}"
            yield phrase(
                "full-length sequences by the engine's count at gpu_memory_utilization {share}: {fits} tokens",
                share=quote(f"{series.name}.gpu_memory_utilization", share),
                fits=join(fits, ", "),
            )
    yield from too_long(result)


def _target_lines(result: KvResult, tables: Tables, targets: Targets) -> Iterator[Phrase]:
    """Which length is safe for the target's requests at once, and whether its contexts fit the card's pool."""
    n, tokens = targets.concurrency, targets.context_tokens
    envelope = card_envelope(result, tables.points, tables.configs)
    if n is None:
        return
    asked = count("target.concurrency", n)
    safe = longest_safe(result, n)
    if safe is not None:
        yield phrase(
            "longest safe max_model_len for {n} at once: {length} ({room})",
            n=asked,
            length=plain(f"{safe.name}.max_model_len", safe.at),
            room=room_words(safe, envelope.pages if envelope else None),
        )
    elif result.pool is not None:
        yield phrase("longest safe max_model_len for {n} at once: none of those measured", n=asked)
    if envelope is not None and tokens is not None:
        yield phrase(
            "{n} requests at once of {tokens} tokens: " + envelope.fit(tokens, n) + ", {share} of "
            + ("the pool" if envelope.whole_card else "the largest pool committed") + " (arithmetic)",
            n=asked,
            tokens=plain("target.context_tokens", tokens),
            share=percent(f"{envelope.name}.target_share_pct", envelope.share(tokens, n)),
        )  # fmt: skip


def _operating(choice: Choice) -> Finding:
    return Finding(_whose(choice), (_operating_line(choice), *resting_on(c.reading for c in choice.candidates)))


def _whose(choice: Choice) -> Phrase:
    """The server of the operating point; where none was chosen of several, the model and load that they share."""
    if choice.point is not None or len({curve.label for curve in choice.curves}) == 1:
        return _about(choice.curve or choice.curves[0])
    return _title(choice.sample, f"choice.{choice.group.slug}", choice.group.label)


def _operating_line(choice: Choice) -> Phrase:
    """The operating point of one load, or that it is not known; what its verdict is about stands on the page."""
    load = lengths(choice.curves[0])
    kind = "operating point ({load}" + (", by arrival rate" if choice.open_loop else "") + "): "
    if choice.point is None:
        measured = [candidate.standing for candidate in choice.candidates if candidate.measured]
        none = measured and all(standing is Standing.MISSES for standing in measured)
        return phrase(
            kind + ("no measured level meets the objectives" if none else "not known from this run"), load=load
        )
    certain = "beyond noise not known from this run; as it stands " if choice.basis is Basis.AS_MEASURED else ""
    why = ", of the levels tested the lowest that could be the knee" if choice.basis is Basis.KNEE else ""
    why += ", by a thin margin" if choice.thin else ""
    reading = choice.point.reading
    return phrase(
        kind + certain + "{level}, {gives}" + why, load=load, level=level_words(reading), gives=gives(reading)
    )


def _capacity(reading: Reading) -> Phrase:
    return phrase(
        "{n} x {length}",
        n=reading.figure(decimal, "engine_max_concurrency"),
        length=plain(f"{reading.name}.max_model_len", reading.at),
    )


def _load_lines(curve: LoadCurve, configs: Configs) -> Iterator[Phrase]:
    best, load = curve.best, lengths(curve)
    if best is None:
        yield phrase("no level of load ({load}) was measured", load=load)
        return
    yield phrase(
        "best throughput: {tok_s} tok/s at concurrency {at}, p95 {p95} s ({lengths})",
        tok_s=cell(best, "tok_s"),
        at=concurrency_figure(best),
        p95=cell(best, "p95_e2e_s"),
        lengths=load,
    )
    if len(curve.levels) > 1:
        yield phrase("{answers}; verdict: {limit}", answers=both_answers(curve), limit=limit_in_short(curve, configs))


def _keeps_up(curve: LoadCurve) -> Phrase:
    return phrase("open loop ({load}): {kept}", load=lengths(curve), kept=keeps_up_sentence(curve))


def _objective(curve: LoadCurve, slo: Slo, unit: str) -> Iterator[Phrase]:
    if slo.percentiles():
        yield phrase(unit + " ({load}): {border}", load=lengths(curve), border=border_words(curve, slo))
