"""The near-full-context ladder: prompts that almost fill max_model_len, against the engine's own KV concurrency."""

from __future__ import annotations

from collections.abc import Sequence

from analysis.load.load_curve import LoadCurve
from analysis.load.load_tables import cell, level_notes, server, workload
from analysis.rows.caveats import identity
from analysis.rows.series import Reading, concurrency_figure
from analysis.writing.document import Document, Part, Phrase, phrase
from analysis.writing.figures import NOTHING, Figure, count, decimal, percent, plain

COLUMNS = (
    "concurrency",
    "engine_max_concurrency",
    "running_max",
    "waiting_max",
    "kv_usage_max",
    "preemptions",
    "mean_e2e_s",
    "p95_e2e_s",
    "qps",
    "tok_s",
    "total_tok_s",
    "notes",
)


def predicted(curve: LoadCurve) -> float | None:
    """Return the engine's KV concurrency: full-length sequences that fit its pool."""
    return next(
        (value for r in curve.series.measured if (value := r.median("engine_max_concurrency")) is not None), None
    )


def sized_pool(curve: LoadCurve) -> Phrase:
    """Return for how many full-length sequences the sweep sized a curve's pool; no words where it did not."""
    sequences = curve.series.sample.sequences
    if sequences is None:
        return phrase("")
    n = count(f"{curve.name}.sequences", sequences)
    return phrase(", on a pool that was sized for {n} full-length sequences", n=n)


def add_ladder(doc: Document, curves: Sequence[LoadCurve]) -> None:
    """Write the section, saying so where the run holds no such level."""
    doc.heading(2, "Near-full context")
    if not curves:
        doc.say("How many full contexts run at once is not known from this run; `+sweep=capacity` measures it.")
        return
    doc.say(
        "Prompts and answers together almost fill max_model_len, so each request takes about as much of the KV pool as "
        "one can. Whether the pool, the queue or the computing limits these levels is said below, under *What limits "
        "each level*. running_max, waiting_max and kv_usage_max are the highest values sampled from the server's "
        "metrics, preemptions its counter; over repeats the highest counts."
    )
    for curve in curves:
        doc.heading(3, "{who}", who=identity(curve.series.sample, curve.name, curve.series.group.label))
        doc.say("Server: {server}. Load: {load}.", server=server(curve), load=workload(curve))
        doc.table(COLUMNS, [_row(curve, reading) for reading in curve.series.readings], curve.series.sample.simulated)
        doc.bullets(_sentences(curve))


def _row(curve: LoadCurve, reading: Reading) -> list[str | Part]:
    engine = decimal(f"{reading.name}.engine_max_concurrency", reading.median("engine_max_concurrency"), 2)
    return [
        concurrency_figure(reading),
        engine,
        *(highest(reading, column) for column in ("running_max", "waiting_max")),
        kv_usage(reading),
        highest(reading, "preemptions"),
        *(cell(reading, column, 4) for column in ("mean_e2e_s", "p95_e2e_s", "qps", "tok_s", "total_tok_s")),
        level_notes(curve, reading),
    ]


def highest(reading: Reading, column: str) -> Figure:
    """Return the largest value over the repeats as a figure: of requests or preemptions."""
    value = reading.highest(column)
    return Figure(f"{reading.name}.{column}_highest", value, NOTHING if value is None else f"{value:,.0f}")


def kv_usage(reading: Reading) -> Figure:
    """Return the highest share of the KV pool in use."""
    return percent(f"{reading.name}.kv_usage_max_pct", reading.highest("kv_usage_max"))


def _sentences(curve: LoadCurve) -> list[Phrase]:
    limit = predicted(curve)
    measured = curve.series.measured
    if limit is None or not measured:
        return [phrase("The engine's KV concurrency is not known, so there is nothing to hold the ladder against.")]
    said = decimal(f"{curve.name}.predicted_kv_concurrency", limit, 2)
    length = plain(f"{curve.name}.max_model_len", curve.series.sample.max_model_len)
    sentences = [
        phrase(
            "By the engine's count there is room for {limit} sequences of {length} tokens.", limit=said, length=length
        )
    ]
    most = max(measured, key=lambda r: r.highest("running_max") or 0)
    if most.highest("running_max") is not None:
        if (most.highest("running_max") or 0) > limit:
            why = (
                ": more than the engine's count, which takes every sequence at its largest. They are held at once with "
                "less; kv_usage_max says how full the pool was."
            )
        elif max(measured, key=lambda r: r.at).at > limit:
            why = ": the ladder went past the limit, and this is what the pool really held."
        else:
            why = "; no level went past the limit, so the limit itself was not tried."
        sentences.append(
            phrase(
                "The most requests seen running at once were {running}, at concurrency {at}" + why,
                running=highest(most, "running_max"),
                at=concurrency_figure(most),
            )
        )
    sentences.append(
        _first_level(
            measured,
            "waiting_max",
            "Requests were first seen waiting at concurrency {at} (up to {n})",
            "No level showed a waiting request.",
        )
    )
    sentences.append(
        _first_level(
            measured,
            "preemptions",
            "The first preemptions came at concurrency {at} ({n})",
            "No request was preempted at any level.",
        )
    )
    return sentences


def _first_level(measured: Sequence[Reading], column: str, words: str, never: str) -> Phrase:
    if all(reading.highest(column) is None for reading in measured):
        return phrase("The server's metrics did not give " + column + ".")
    first = next((reading for reading in measured if reading.highest(column)), None)
    if first is None:
        return phrase(never)
    reason = (
        ". Waiting has two causes, a full pool and a full step: read it beside kv_usage_max."
        if column == "waiting_max"
        else "."
    )
    return phrase(words + reason, at=concurrency_figure(first), n=highest(first, column))
