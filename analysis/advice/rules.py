"""Rules of thumb that follow from the numbers: each is written only when its condition holds, and names its lengths."""

from __future__ import annotations

from analysis.load.knee import KneeVerdict
from analysis.load.knee_sentences import blow_up_tells, change_words
from analysis.load.ladder import highest
from analysis.load.load_curve import LoadCurve, knee_curves
from analysis.load.load_tables import cell, label_figure, workload
from analysis.load.strangers import marked
from analysis.memory.kv_fit import KvResult, kv_results, pool_bytes
from analysis.memory.kv_pages import Pages, pages_of
from analysis.rows.series import concurrency_figure
from analysis.rows.tables import Tables
from analysis.writing.document import Part, Phrase, join, phrase
from analysis.writing.figures import GIB, count, decimal, mib, percent, plain, quote, times

AT_MOST = 5
CONTEXT_STEP_TOKENS = 1024
LARGE_GAIN = 1.2
"""Concurrency is said to pay from this factor of tok/s over one request at a time."""


def rules_of_thumb(tables: Tables) -> list[Phrase]:
    """Return at most five rules for each curve, or for the KV pool alone where there is no curve."""
    curves = knee_curves(tables.points)
    rules: list[Phrase] = []
    for curve in curves:
        own = [rule for rule in (_sweet_spot(curve), _beyond(curve), _sequential(curve), _unloaded(curve)) if rule]
        own = [join([rule, *marked(curve.levels)], " ") for rule in own]
        if len(curves) > 1:
            label = label_figure(curve)
            own = [phrase("{label}: {rule}", label=label, rule=rule) for rule in own]
        rules += own
    for result in kv_results(tables.points):
        room = max(AT_MOST - len(rules), 1) if len(curves) <= 1 else AT_MOST
        pages = pages_of(result.readings[-1].measured[0], tables.configs) if result.readings else None
        rules += [rule for rule in (_pool(result), per_token(result, pages)) if rule][:room]
    return rules


def _sweet_spot(curve: LoadCurve) -> Phrase | None:
    """Needs three levels, and knee and blow-up each decided: found, or seen not to lie within the levels."""
    if len(curve.levels) < 3:
        return None
    knee, blow_up, last = curve.knee, curve.blow_up, curve.levels[-1]
    if knee.verdict is KneeVerdict.UNDECIDED or blow_up is None or blow_up.seen is None:
        return phrase(
            "The sweet spot ({load}) is not known from this run: the levels and repeats leave open where throughput "
            "stops scaling or where latency blows up; " + blow_up_tells(curve) + ".",
            load=workload(curve),
        )
    bends = [*knee.could_be, *(blow_up.last_before if blow_up.seen else ())]
    if not bends:
        return phrase(
            "No knee up to concurrency {last} ({load}): it still paid there, {tok_s} tok/s at p95 {p95} s. "
            "The sweet spot lies at or above it.",
            last=concurrency_figure(last),
            load=workload(curve),
            tok_s=cell(last, "tok_s"),
            p95=cell(last, "p95_e2e_s"),
        )
    low, high = curve.at(min(bends)), curve.at(max(bends))
    numbers: dict[str, Part] = {
        "load": workload(curve),
        "low": concurrency_figure(low),
        "tok_low": cell(low, "tok_s"),
        "p95_low": cell(low, "p95_e2e_s"),
    }
    if knee.verdict is KneeVerdict.NO_KNEE_YET:
        return phrase(
            "The sweet spot begins at concurrency {low} ({load}): {tok_low} tok/s at p95 {p95_low} s. Its upper end "
            "was not found within the levels tested: throughput was still rising at {last}, {tok_last} tok/s at p95 "
            "{p95_last} s.",
            last=concurrency_figure(last),
            tok_last=cell(last, "tok_s"),
            p95_last=cell(last, "p95_e2e_s"),
            **numbers,
        )
    if low is high:
        return phrase(
            "Of the levels tested concurrency {low} is the sweet spot ({load}): {tok_low} tok/s at p95 {p95_low} s.",
            **numbers,
        )
    return phrase(
        "Of the levels tested concurrency {low} to {high} is the sweet spot ({load}): {tok_low} tok/s at p95 "
        "{p95_low} s for latency, {tok_high} at {p95_high} s for throughput.",
        high=concurrency_figure(high),
        tok_high=cell(high, "tok_s"),
        p95_high=cell(high, "p95_e2e_s"),
        **numbers,
    )


def _beyond(curve: LoadCurve) -> Phrase | None:
    """Needs a level past every level that could be the knee, and there a p95 that rose beyond noise."""
    if curve.knee.verdict is not KneeVerdict.KNEE:
        return None
    flat, last = curve.at(curve.knee.could_be[-1]), curve.levels[-1]
    tok, p95 = curve.change(flat, last, "tok_s"), curve.change(flat, last, "p95_e2e_s")
    if flat is last or tok is None or p95 is None or (p95.low or 0.0) <= 0:
        return None
    parts: dict[str, Part] = {
        "flat": concurrency_figure(flat),
        "last": concurrency_figure(last),
        "load": workload(curve),
        "p95": change_words(flat, last, "p95_e2e_s", p95),
        "tok": change_words(flat, last, "tok_s", tok),
    }
    waited = ""
    if last.highest("waiting_max"):
        waited = ", and up to {n} waited in the server"
        parts["n"] = highest(last, "waiting_max")
    tested = ", of the levels tested" if curve.knee.may_rise else ""
    return phrase(
        "Beyond concurrency {flat} more requests mostly cost latency" + tested + " ({load}): at {last} p95 changes by "
        "{p95}, tok/s by {tok}" + waited + ".",
        **parts,
    )


def _sequential(curve: LoadCurve) -> Phrase | None:
    """Needs level one and a best level well above it."""
    best = curve.best
    if best is None or curve.levels[0].at != 1:
        return None
    one = curve.levels[0]
    gain = curve.ratio(best, one, "tok_s")
    if gain is None or gain < LARGE_GAIN:
        return None
    return phrase(
        "One request at a time reaches {share} of the best throughput ({load}): concurrency {best} gives {gain} its "
        "tok/s, p95 going from {p95_one} to {p95_best} s.",
        share=percent(f"{best.name}.sequential_share_pct", 1 / gain),
        load=workload(curve),
        best=concurrency_figure(best),
        gain=times(f"{best.name}.gain_over_one", gain),
        p95_one=cell(one, "p95_e2e_s"),
        p95_best=cell(best, "p95_e2e_s"),
    )


def _unloaded(curve: LoadCurve) -> Phrase | None:
    """Needs level one with its latencies; that higher levels are not quicker, a run whose others are all slower."""
    if not curve.levels or curve.levels[0].at != 1:
        return None
    one = curve.levels[0]
    if one.median("p50_ttft_s") is None or one.median("p50_tpot_s") is None:
        return None
    means = [mean for level in curve.levels if (mean := level.median("mean_e2e_s")) is not None]
    floor = len(means) > 1 and means[0] == min(means)
    return phrase(
        "One request at a time takes {mean} s ({load}): {ttft} s to the first token, {tpot} s for each further one."
        + (" No other level measured was quicker." if floor else ""),
        mean=cell(one, "mean_e2e_s"),
        load=workload(curve),
        ttft=cell(one, "p50_ttft_s"),
        tpot=cell(one, "p50_tpot_s"),
    )


def _pool(result: KvResult) -> Phrase | None:
    """Needs a utilization row with the engine's capacity."""
    pool = result.pool
    if pool is None:
        return None
    longest = pool.measured[-1]
    concurrency, size = longest.median("engine_max_concurrency"), pool_bytes(longest)
    if concurrency is None or size is None:
        return None
    return phrase(
        "{model}: by the engine's count the pool at gpu_memory_utilization {share} ({size} GiB) holds {n} full "
        "sequences of {length} tokens, whatever max_num_seqs says.",
        model=quote(f"{result.name}.label", result.group.label),
        share=quote(f"{longest.name}.gpu_memory_utilization", f"{pool.sample.gpu_memory_utilization or 0:g}"),
        size=decimal(f"{longest.name}.pool_gib", size / GIB, 2),
        n=decimal(f"{longest.name}.engine_max_concurrency", concurrency, 2),
        length=plain(f"{longest.name}.max_model_len", longest.at),
    )


def per_token(result: KvResult, pages: Pages | None) -> Phrase | None:
    """Return what further tokens of context cost each sequence; needs the page function, as a full window ends it."""
    if pages is None:
        return None
    windows, block = pages.outgrown, pages.layout.block_size
    parts: dict[str, Part] = {
        "model": quote(f"{result.name}.label", result.group.label),
        "step": count("rule.context_step_tokens", CONTEXT_STEP_TOKENS),
        "size": mib(f"{result.name}.context_step_mib", pages.growth_bytes(block) * CONTEXT_STEP_TOKENS, 1),
    }
    if not windows:
        words = "{model}: every {step} further tokens of context cost {size} MiB of KV for each sequence that uses them"
        return phrase(words + " (formula).", **parts)
    past = pages.growth_bytes(windows[-1] + 2 * block)
    return phrase(
        "{model}: up to {window} tokens of context every {step} further ones cost {size} MiB of KV for each sequence "
        "that uses them, past "
        + ("that" if len(windows) == 1 else "{last}")
        + " {past} MiB while it decodes (formula): a sliding window is full there. The engine's count grows on past "
        "it, for it takes the tokens in flight of every sequence, too.",
        window=count(f"{result.name}.narrowest_window_tokens", windows[0]),
        past=mib(f"{result.name}.context_step_past_mib", past * CONTEXT_STEP_TOKENS, 1),
        **({"last": count(f"{result.name}.widest_window_tokens", windows[-1])} if len(windows) > 1 else {}),
        **parts,
    )
