"""Which max_model_len is safe, the headroom envelope, latency against throughput: as far as the rows carry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from analysis.document import Document, Part, Phrase, phrase
from analysis.figures import count, decimal, gib, percent, plain, quote, significant
from analysis.knee import KneeVerdict
from analysis.knee_sentences import repeats_tell
from analysis.kv_fit import KvResult, pool_bytes
from analysis.load_curve import LoadCurve
from analysis.load_tables import cell, workload
from analysis.operating_point import latency_level, throughput_level
from analysis.rules import knee_curves
from analysis.series import Reading, concurrency_figure
from analysis.statistics import interpolate
from analysis.tables import RunPoint
from analysis.targets import Targets

HEADROOM = 0.9
"""A need is said to fit up to this share of the pool; the rest is for what moves (fragmentation, longer answers)."""
ENVELOPE_LEVELS = (1, 4, 16, 64, 256)


@dataclass(frozen=True, slots=True)
class Pool:
    """The pool that needs are held against."""

    reading: Reading
    size_bytes: float

    @property
    def whole_card(self) -> bool:
        """Whether it is the pool vLLM took at a utilization (else: the largest one this run committed)."""
        return self.reading.measured[0].mode == "utilization"


def measured_pool(result: KvResult) -> Pool | None:
    """Return the smallest pool of the highest utilization over its lengths, else the largest committed pool."""
    if result.pool is not None:
        known = [Pool(r, size) for r in result.pool.measured if (size := pool_bytes(r)) is not None]
        if known:
            return min(known, key=lambda pool: pool.size_bytes)
    committed = [
        Pool(r, size) for c in result.committed for r in c.series.measured if (size := pool_bytes(r)) is not None
    ]
    return max(committed, key=lambda pool: pool.size_bytes, default=None)


def sequence_bytes(result: KvResult, length: int) -> float | None:
    """Return the KV bytes of one sequence of `length` tokens by the formula.

    Exact at lengths that were measured; between them on straight lines, past the longest at its marginal cost.
    """
    known = result.per_sequence()
    if not known or result.formula_marginal is None:
        return None
    return interpolate(list(known.items()), length, result.formula_marginal)


def add_headroom(doc: Document, result: KvResult, points: Sequence[RunPoint], targets: Targets) -> None:
    """Write the three sections."""
    pool = measured_pool(result)
    doc.heading(3, "Which max_model_len is safe with room for concurrency?")
    _safe(doc, result, pool, targets)
    doc.heading(3, "Headroom envelope")
    _envelope(doc, result, pool, targets)
    doc.heading(3, "Latency-focused or throughput-focused")
    _trade_offs(doc, result, points)


def longest_safe(result: KvResult, concurrency: int) -> Reading | None:
    """Return the longest measured length of which the pool holds so many full sequences within `HEADROOM`."""
    readings = result.pool.measured if result.pool is not None else ()
    enough = [r for r in readings if HEADROOM * (r.median("engine_max_concurrency") or 0.0) >= concurrency]
    return enough[-1] if enough else None


def _safe(doc: Document, result: KvResult, pool: Pool | None, targets: Targets) -> None:
    if result.pool is None:
        doc.say(
            "Not known from this run: no server took its pool by gpu_memory_utilization, so what the card can hold was "
            "not measured; `+sweep=kv` with mode utilization measures it."
        )
        return
    readings = [r for r in result.pool.measured if r.median("engine_max_concurrency") is not None]
    if not readings:
        doc.say("Not known from this run: the engine did not give its KV concurrency.")
        return
    doc.say("Full-length sequences that the pool holds, by the engine: {list}.", list=capacities(readings))
    if targets.concurrency is None:
        doc.say(
            "The run names no target (`target.concurrency`), so no length is picked: choose the row that leaves room."
        )
        return
    safe = longest_safe(result, targets.concurrency)
    target = count("target.concurrency", targets.concurrency)
    rule = percent("rule.headroom_pct", HEADROOM, 0)
    if safe is not None:
        doc.say(
            "For {n} full-length sequences at once within {rule} of the pool, **max_model_len {length}** is the "
            "longest safe one of those measured ({room} fit).",
            n=target,
            rule=rule,
            length=plain(f"{safe.name}.max_model_len", safe.at),
            room=safe.figure(decimal, "engine_max_concurrency"),
        )
    else:
        doc.say(
            "None of the measured lengths leaves room for {n} full-length sequences within {rule} of the pool.",
            n=target,
            rule=rule,
        )
    if targets.context_tokens is not None:
        _target_sentence(doc, result, pool, targets.concurrency, targets.context_tokens)


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


def _target_sentence(doc: Document, result: KvResult, pool: Pool | None, n: int, tokens: int) -> None:
    one = sequence_bytes(result, tokens)
    if one is None or pool is None:
        doc.say(
            "Whether the target's contexts fit is not known: no formula for this model or no pool size from the engine."
        )
        return
    need, share = n * one, n * one / pool.size_bytes
    doc.say(
        "The target, {n} requests at once of {tokens} tokens each, needs {need} GiB of KV, {share} of the pool: **"
        + _verdict(share)
        + "**. Set max_model_len no lower than {tokens}; a higher one does not take memory from these requests, since "
        "blocks are handed out as tokens come, but it lets a single request take that much more.",
        n=count("target.concurrency", n),
        tokens=plain("target.context_tokens", tokens),
        need=gib(f"{result.name}.target_need_gib", need),
        share=percent(f"{result.name}.target_share_pct", share),
    )


def _verdict(share: float) -> str:
    if share <= HEADROOM:
        return "fits"
    return "tight" if share <= 1 else "does not fit"


def _envelope(doc: Document, result: KvResult, pool: Pool | None, targets: Targets) -> None:
    lengths = sorted({*result.per_sequence(), *([targets.context_tokens] if targets.context_tokens else [])})
    levels = sorted({*ENVELOPE_LEVELS, *([targets.concurrency] if targets.concurrency else [])})
    if pool is None or result.formula_marginal is None or not lengths:
        doc.say("Not known from this run: the engine gave no pool size or the model's KV formula is unknown.")
        return
    which = (
        "the pool that vLLM took at gpu_memory_utilization {share}"
        if pool.whole_card
        else "the largest pool this run committed, which is not all that the device can hold"
    )
    point = pool.reading.measured[0]
    parts: dict[str, Part] = {"size": gib(f"{result.name}.envelope_pool_gib", pool.size_bytes)}
    if pool.whole_card:
        parts["share"] = quote(f"{result.name}.envelope_utilization", f"{point.gpu_memory_utilization or 0:g}")
    doc.say(
        "GiB of KV for context length (rows, tokens really held) and concurrency (columns), against {size} GiB: "
        + which
        + ". *fits*: up to {rule} of it; *tight*: up to all of it.",
        rule=percent("rule.headroom_pct", HEADROOM, 0),
        **parts,
    )
    rows = []
    for length in lengths:
        one = sequence_bytes(result, length)
        row: list[str | Part] = [plain(f"envelope.len{length}", length)]
        row += [_envelope_cell(result, pool, length, level, one) for level in levels]
        rows.append(row)
    doc.table(["tokens", *(plain(f"envelope.c{level}", level) for level in levels)], rows, point.simulated)
    if targets.context_tokens and targets.context_tokens not in result.per_sequence():
        doc.say(
            "{tokens} tokens were not measured: that row lies on the formula between or beyond the measured lengths.",
            tokens=plain("target.context_tokens", targets.context_tokens),
        )


def _envelope_cell(result: KvResult, pool: Pool, length: int, level: int, one: float | None) -> Part:
    if one is None:
        return phrase("–")
    need = level * one
    size = significant(f"{result.name}.envelope.len{length}.c{level}_gib", need / 2**30, 3)
    return phrase("{size} " + _verdict(need / pool.size_bytes), size=size)


def _trade_offs(doc: Document, result: KvResult, points: Sequence[RunPoint]) -> None:
    ids = {id(point) for point in result.group.points}
    own = {(p.simulated, p.model, p.device_name, p.engine) for p in points if id(p) in ids}
    curves = [c for c in knee_curves(points) if _who(c.series.sample) in own and len(c.levels) > 1]
    if not curves:
        doc.say(
            "Not known from this run: it holds no levels of load for this model; `+sweep=concurrency` measures them."
        )
        return
    for curve in curves:
        items = [for_latency(curve), for_throughput(curve)]
        doc.say("From the levels measured in this run ({load}):", load=workload(curve))
        doc.bullets(items)
    doc.say(
        "These hold for those lengths. Longer contexts meet the pool first: take the lower of these levels and what "
        "the envelope lets fit."
    )


def for_latency(curve: LoadCurve) -> Phrase:
    """Return what a latency-focused service chooses. Needs the blow-up found, or seen not to lie within the levels."""
    blow_up, quiet = curve.blow_up, latency_level(curve)
    if blow_up is None or quiet is None:
        return phrase(
            "Latency-focused: where latency blows up is not known from this run; " + repeats_tell(curve) + "."
        )
    if not blow_up.seen:
        why = "the highest level tested; latency never grew for good faster than throughput"
    elif len(blow_up.last_before) == 1:
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
            "Throughput-focused: where throughput stops scaling is not known from this run; "
            + repeats_tell(curve)
            + "."
        )
    why = "the highest level tested, still rising"
    if curve.knee.verdict is KneeVerdict.KNEE:
        several = len(curve.knee.could_be) > 1
        why = ("the highest that the noise allows to be " if several else "") + "where throughput stops scaling"
    return phrase(
        "Throughput-focused: concurrency {at}, " + why + ": {tok_s} tok/s, p95 {p95} s.",
        at=concurrency_figure(full),
        p95=cell(full, "p95_e2e_s"),
        tok_s=cell(full, "tok_s"),
    )


def _who(point: RunPoint) -> tuple[bool, str, str | None, str]:
    return point.simulated, point.model, point.device_name, point.engine
