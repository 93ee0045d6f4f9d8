"""Which max_model_len is safe, and latency against throughput, with the envelope between: as far as the rows carry."""

from __future__ import annotations

from collections.abc import Sequence

from analysis.advice.operating_point import latency_level, throughput_level
from analysis.load.knee import KneeVerdict
from analysis.load.knee_sentences import blow_up_tells, knee_tells, of_those_tested
from analysis.load.ladder import sized_pool
from analysis.load.load_curve import LoadCurve, knee_curves, load_curves
from analysis.load.load_tables import cell, workload
from analysis.load.neighbours import neighbour_sentences
from analysis.memory.kv_envelope import HEADROOM, Envelope, card_envelope, envelopes
from analysis.memory.kv_envelope_table import add_envelopes
from analysis.memory.kv_fit import KvResult
from analysis.memory.kv_pages import Pages
from analysis.memory.kv_room import kv_room
from analysis.memory.kv_too_long import too_long
from analysis.rows.groups import BASE, grouped
from analysis.rows.series import Reading, concurrency_figure
from analysis.rows.tables import RunPoint, Tables
from analysis.rows.targets import Targets
from analysis.writing.document import Document, Part, Phrase, phrase
from analysis.writing.figures import count, decimal, gib, percent, plain, quote


def add_headroom(doc: Document, result: KvResult, tables: Tables, targets: Targets) -> None:
    """Write the two sections."""
    add_envelopes(doc, envelopes(result, tables.points, tables.configs), targets)
    doc.heading(3, "Latency-focused or throughput-focused")
    _trade_offs(doc, result, tables)


def add_decision(doc: Document, result: KvResult, tables: Tables, targets: Targets) -> None:
    """Write which length to set: what the rest of the page is read for."""
    doc.heading(3, "Which max_model_len is safe with room for concurrency?")
    _safe(doc, result, card_envelope(result, tables.points, tables.configs), targets)


def longest_safe(result: KvResult, concurrency: int) -> Reading | None:
    """Return the longest measured length of which the pool holds so many full sequences within `HEADROOM`."""
    readings = result.pool.measured if result.pool is not None else ()
    enough = [r for r in readings if HEADROOM * (r.median("engine_max_concurrency") or 0.0) >= concurrency]
    return enough[-1] if enough else None


def _safe(doc: Document, result: KvResult, envelope: Envelope | None, targets: Targets) -> None:
    doc.bullets(too_long(result))
    if result.pool is None:
        doc.say(
            "Not known from this run: no server that took its pool by gpu_memory_utilization was measured, so what the "
            "card can hold is open; `+sweep=kv` with mode utilization measures it."
        )
        return
    readings = [r for r in result.pool.measured if r.median("engine_max_concurrency") is not None]
    if not readings:
        doc.say("Not known from this run: the engine did not give its KV concurrency.")
        return
    doc.say("Full-length sequences by the engine's count: {list}.", list=capacities(readings))
    if targets.concurrency is None:
        doc.say(
            "The run names no target (`target.concurrency`), so no length is picked: choose the row that leaves room."
        )
        return
    safe = longest_safe(result, targets.concurrency)
    pages = envelope.pages if envelope is not None else None
    target = count("target.concurrency", targets.concurrency)
    rule = percent("rule.headroom_pct", HEADROOM, 0)
    if safe is not None:
        doc.say(
            "For {n} full-length sequences at once within {rule} of the pool, **max_model_len {length}** is the "
            "longest safe one of those measured ({room})"
            + (", and the longest that the model takes." if pages is not None and pages.limit == safe.at else "."),
            n=target,
            rule=rule,
            length=plain(f"{safe.name}.max_model_len", safe.at),
            room=room_words(safe, pages),
        )
        if pages is not None and pages.has_windows:
            doc.say(TWO_COUNTS)
    else:
        doc.say(
            "None of the measured lengths leaves room for {n} full-length sequences within {rule} of the pool.",
            n=target,
            rule=rule,
        )
    if envelope is not None:
        _longest(doc, envelope, targets.concurrency, [reading.at for reading in readings])
    if targets.context_tokens is not None:
        _target_sentence(doc, envelope, targets.concurrency, targets.context_tokens)


def _longest(doc: Document, envelope: Envelope, n: int, measured: Sequence[float]) -> None:
    """Needs the page function, and a length at which so many fit that was not measured itself."""
    longest = envelope.longest(n)
    if not longest or longest in measured:
        return
    parts: dict[str, Part] = {
        "n": count("target.concurrency", n),
        "size": gib(f"{envelope.name}.pool_gib", envelope.size_bytes),
        "longest": plain(f"{envelope.name}.longest_tokens", longest),
    }
    limit = envelope.pages.limit if envelope.pages else None
    doc.say(
        "By arithmetic {n} full-length sequences, as the engine counts them, stay within that share of {size} GiB up "
        "to {longest} tokens"
        + (", the longest that the model takes" if longest == limit else "")
        + "; this length was not measured.",
        **parts,
    )


TWO_COUNTS = (
    "*By the engine's count* the pool is divided by what vLLM would reserve for a full-length sequence, with all "
    "tokens in flight counted for each. *Held at once*: how many of them the pool holds while they run (arithmetic), "
    "the tokens in flight counted once, as they are shared. With sliding windows the two differ."
)


def room_words(reading: Reading, pages: Pages | None) -> Phrase:
    """Return how many full-length sequences a pool has room for: by the engine's count and, with windows, at once."""
    counted = phrase("{n} by the engine's count", n=reading.figure(decimal, "engine_max_concurrency"))
    room = kv_room(reading, int(reading.at), 1, pages) if pages is not None and pages.has_windows else None
    if room is None:
        return counted
    return phrase("{counted}, {n} held at once", counted=counted, n=count(f"{reading.name}.held_at_once", room.holds))


def capacities(readings: Sequence[Reading]) -> Phrase:
    """Return the full-length sequences that the engine counts at each length: `N of LENGTH tokens, …`."""
    parts: dict[str, Part] = {}
    words = []
    for index, reading in enumerate(readings):
        key = "r" + "i" * index
        parts[f"{key}_n"] = reading.figure(decimal, "engine_max_concurrency")
        parts[f"{key}_length"] = plain(f"{reading.name}.max_model_len", reading.at)
        words.append("{" + key + "_n} of {" + key + "_length} tokens")
    return phrase(", ".join(words), **parts)


def _target_sentence(doc: Document, envelope: Envelope | None, n: int, tokens: int) -> None:
    if envelope is None:
        doc.say(
            "Whether the target's contexts fit is not known: no formula for this model or no pool size from the engine."
        )
        return
    limit = envelope.pages.limit if envelope.pages is not None else None
    longer = limit is None or tokens < limit
    if longer:
        advice = (
            "Set max_model_len no lower than {tokens}; a higher one does not take memory from these requests, since "
            "blocks are handed out as tokens come, but it lets a single request take that much more."
        )
    elif tokens == limit:
        advice = "Set max_model_len to {limit}, the longest that the model takes."
    else:
        advice = "But the model takes {limit} tokens at most."
    doc.say(
        "The target, {n} requests at once of {tokens} tokens each, needs {need} GiB of KV, {share} of the pool: **"
        + envelope.fit(tokens, n)
        + "** (arithmetic, against the pool that was measured). "
        + advice,
        n=count("target.concurrency", n),
        tokens=plain("target.context_tokens", tokens),
        need=gib(f"{envelope.name}.target_need_gib", envelope.need_bytes(tokens, n)),
        share=percent(f"{envelope.name}.target_share_pct", envelope.share(tokens, n)),
        **({} if longer else {"limit": plain(f"{envelope.name}.limit_tokens", limit or 0)}),
    )


def _trade_offs(doc: Document, result: KvResult, tables: Tables) -> None:
    points = tables.points
    served_alike = _served_alike(result, points)
    ids = {id(point) for point in served_alike}
    curves = [c for c in knee_curves(points) if id(c.series.group.points[0]) in ids and len(c.levels) > 1]
    nearly_full = [
        c for c in load_curves(points, "near_full_context") if id(c.series.group.points[0]) in ids and c.levels
    ]
    if not curves and not nearly_full:
        doc.say(
            "Not known from this run: fewer than two levels of load were measured of this model served alike (cards, "
            "parallelism, dtype, quantization); `+sweep=knee` measures them."
        )
        return
    _by_levels(doc, curves)
    _by_levels(doc, nearly_full)
    doc.bullets(neighbour_sentences(tables, served_alike))
    doc.say("Each holds for the lengths that it names.")
    if not nearly_full:
        doc.say(
            "Latency with longer contexts is not known from this run; `+sweep=capacity` measures contexts that nearly "
            "fill max_model_len."
        )


def _by_levels(doc: Document, curves: Sequence[LoadCurve]) -> None:
    """Write what either service chooses by each of these curves, which differ in their servers."""
    for curve in curves:
        whose: dict[str, Part] = {}
        if len(curves) > 1:
            whose["label"] = quote(f"{curve.name}.label", curve.series.group.label)
        doc.say(
            "From the levels measured in this run" + (" on {label}" if whose else "") + " ({load}{pool}):",
            load=workload(curve),
            pool=sized_pool(curve),
            **whose,
        )
        doc.bullets([for_latency(curve), for_throughput(curve)])


def _served_alike(result: KvResult, points: Sequence[RunPoint]) -> tuple[RunPoint, ...]:
    """All points of the run, of load too, that agree with those of the result in `BASE`."""
    known = result.group.points[0]  # grouped() puts those first that learned most of their server
    return next(group.points for group in grouped(points, BASE) if any(point is known for point in group.points))


BY_OBJECTIVE = "choose by an objective (`slo.p95_e2e_s`, `slo.p95_ttft_s`, `slo.p95_tpot_s`)"


def for_latency(curve: LoadCurve) -> Phrase:
    """Return what a latency-focused service chooses. Needs the blow-up found, or seen not to lie within the levels."""
    blow_up, quiet = curve.blow_up, latency_level(curve)
    if blow_up is None or quiet is None:
        return phrase(
            "Latency-focused: where latency blows up is not known from this run; " + blow_up_tells(curve) + "."
        )
    if not blow_up.seen:
        return phrase(
            "Latency-focused: no limit found up to concurrency {at}, the highest level tested, as latency never grew "
            "for good faster than throughput: " + BY_OBJECTIVE + ". p95 is {p95_low} s at {low} and {p95} s at {at}.",
            at=concurrency_figure(quiet),
            p95=cell(quiet, "p95_e2e_s"),
            low=concurrency_figure(curve.levels[0]),
            p95_low=cell(curve.levels[0], "p95_e2e_s"),
        )
    if len(blow_up.last_before) == 1:
        why = "the last level before latency grows for good, and faster than throughput"
    else:
        why = (
            "the lowest that the noise allows to be the last before latency grows for good, and faster than throughput"
        )
    return phrase(
        "Latency-focused: concurrency up to {at}, " + why + ": p95 {p95} s, {tok_s} tok/s.",
        at=concurrency_figure(quiet),
        p95=cell(quiet, "p95_e2e_s"),
        tok_s=cell(quiet, "tok_s"),
    )


def for_throughput(curve: LoadCurve) -> Phrase:
    """Return what a throughput-focused service chooses. Needs a knee, or a throughput seen to rise up to the last
    level."""
    full = throughput_level(curve)
    if full is None:
        return phrase(
            "Throughput-focused: where throughput stops scaling is not known from this run; " + knee_tells(curve) + "."
        )
    return phrase(
        "Throughput-focused: concurrency {at}, " + why_throughput(curve) + ": {tok_s} tok/s, p95 {p95} s.",
        at=concurrency_figure(full),
        p95=cell(full, "p95_e2e_s"),
        tok_s=cell(full, "tok_s"),
    )


def why_throughput(curve: LoadCurve) -> str:
    """Return what the level of a throughput-focused service is; needs one."""
    knee = curve.knee
    if knee.verdict is not KneeVerdict.KNEE:
        return "the highest level tested, still rising"
    if len(knee.could_be) > 1:
        return "the highest level that the noise allows to be where throughput stops scaling" + of_those_tested(curve)
    return "where throughput has stopped scaling" + of_those_tested(curve)
