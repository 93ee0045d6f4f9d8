"""Answers to the tutorial's questions about concurrency: all but its first, second and sixth. Pure.

An answer stands only where its data were measured; else it says what is not known, and which sweep would tell.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

from analysis.advice.kv_headroom import BY_OBJECTIVE, why_throughput
from analysis.advice.operating_point import (
    Basis,
    Choice,
    OperatingPoint,
    latency_level,
    most_tok_s,
    throughput_level,
)
from analysis.advice.operating_sentences import gives, objectives, pressed
from analysis.advice.subject import UNKNOWN, Subject
from analysis.advice.under_use import HALF, lowest_level, observed
from analysis.load.checks import Standing
from analysis.load.knee import Gain
from analysis.load.knee_sentences import (
    blow_up_tells,
    change_words,
    knee_sentences,
    levels_tell,
    of_those_tested,
    repeats_tell,
)
from analysis.load.ladder import highest
from analysis.load.load_curve import LoadCurve
from analysis.load.load_tables import cell, interval_words, label_figure, lengths_sent
from analysis.load.rates import level_words
from analysis.load.token_cost import median_of
from analysis.rows.series import Reading, concurrency_figure
from analysis.rows.tables import RunPoint
from analysis.writing.document import Part, Phrase, join, phrase
from analysis.writing.figures import count, gib, plain, significant, times

TUTORIAL_DOUBLING = (8, 16)
"""The two levels of its seventh question."""
DRIFT = "`python -m analysis drift BASELINE RUN`"


def _no_levels() -> Phrase:
    return phrase(UNKNOWN + "fewer than two levels of a closed loop were measured; `+sweep=knee` measures them.")


def rise(subject: Subject) -> Phrase:
    """Needs two levels."""
    curve = subject.curve
    if curve is None or curve.best is None or len(curve.levels) < 2:
        return _no_levels()
    lowest, best = curve.levels[0], curve.best
    if best is lowest:
        head = phrase(
            "In this run it does not rise: the lowest level, concurrency {low}, gives the most.",
            low=concurrency_figure(lowest),
        )
    else:
        head = phrase(
            "From concurrency {low} to {best} tok/s went {tok_s} and p95 {p95}.",
            low=concurrency_figure(lowest),
            best=concurrency_figure(best),
            tok_s=times(f"{best.name}.gain_over_one", curve.ratio(best, lowest, "tok_s")),
            p95=times(f"{best.name}.p95_over_lowest", curve.ratio(best, lowest, "p95_e2e_s")),
        )
    return join([head, *_steps(lowest, best), *knee_sentences(curve)], " ")


def _steps(lowest: Reading, best: Reading) -> list[Phrase]:
    """Needs the engine's steps at both levels, and more tokens from each at the better."""
    before, after = (median_of(reading, _generated_per_step) for reading in (lowest, best))
    if before is None or after is None or after <= before:
        return []
    words = (
        "A step of the engine that gave any request a token gave {before} on average at the lowest level and {after} "
        "at the best: requests share steps."
    )
    return [
        phrase(
            words,
            before=significant(f"{lowest.name}.generated_per_step", before),
            after=significant(f"{best.name}.generated_per_step", after),
        )
    ]


def _generated_per_step(point: RunPoint) -> float | None:
    """Prompt tokens left out, unlike in `server_step_mean_tokens`: tok_s is of those generated."""
    tokens, steps = point.server_generation_tokens, point.server_steps
    return tokens / steps if tokens is not None and steps else None


def safe_point(subject: Subject) -> Phrase:
    """Needs an operating point that holds beyond noise; one that something limits already is not called safe."""
    main = subject.main
    point = main.point if main is not None else None
    if main is None or point is None or point.safe_up_to is None:
        return phrase(UNKNOWN + "the lines at the top of this page say what would tell.")
    parts: dict[str, Part] = {
        "level": level_words(point.reading),
        "gives": phrase("{gives} with {load}", gives=gives(point.reading), load=lengths_sent(point.curve)),
    }
    verdict = pressed(main, point)
    if verdict is not None:
        words = "{level} is the operating point ({gives}), but not a safe one: it is " + str(verdict) + " already."
        return phrase(words, **parts)
    words = "{level} on the server named above: {gives}"
    if point.room is not None and point.room.further_requests >= 0:
        words += ", with at least {left} GiB of KV left"
        parts["left"] = gib(f"{point.reading.name}.room_free_gib", point.room.free_bytes)
    if point.safe_up_to is not point.reading:
        words += "; {safe} is the upper end of the range"
        parts["safe"] = level_words(point.safe_up_to)
    thin = " Its margin is thin: another start of the server may miss an objective." if main.thin else ""
    return join([phrase(words + "." + thin, **parts), *_open_above(main, point)], " ")


def _open_above(choice: Choice, point: OperatingPoint) -> list[Phrase]:
    """Needs a knee that noise allows to lie higher than the chosen level, which is the lowest that could be it."""
    could_be = point.curve.knee.could_be
    if choice.basis is not Basis.KNEE or len(could_be) < 2:
        return []
    last = level_words(point.curve.at(could_be[-1]))
    words = (
        "Whether more than that is safe is not known from this run, for the knee of the levels tested could be as high "
        "as {last}; "
    )
    return [phrase(words + repeats_tell(point.curve) + ".", last=last)]


def not_free(subject: Subject) -> Phrase:
    """Needs a level above the operating point, else above the lowest."""
    curve = subject.curve
    if curve is None or len(curve.levels) < 2:
        return _no_levels()
    start, last = _where_it_ends(subject, curve), curve.levels[-1]
    if start is last:
        return phrase(
            "This run does not show it: no level above {level} was measured; " + levels_tell(curve) + ".",
            level=level_words(last),
        )
    tok_s, p95 = curve.change(start, last, "tok_s"), curve.change(start, last, "p95_e2e_s")
    assert tok_s is not None and p95 is not None
    changes = phrase(
        "From concurrency {start} to {last} tok/s changes by {tok_s} and p95 by {p95}.",
        start=concurrency_figure(start),
        last=concurrency_figure(last),
        tok_s=change_words(start, last, "tok_s", tok_s),
        p95=change_words(start, last, "p95_e2e_s", p95),
    )
    return join([changes, *_bought(tok_s, p95), *_waited(last)], " ")


def _where_it_ends(subject: Subject, curve: LoadCurve) -> Reading:
    """The knee or the operating point, whichever is lower; without both the lowest level."""
    point = subject.main.point if subject.main else None
    ends = [point.reading] if point is not None else []
    if curve.knee.could_be:
        ends.append(curve.at(curve.knee.could_be[-1]))
    return min(ends, key=lambda reading: reading.at, default=curve.levels[0])


def _bought(tok_s: Gain, p95: Gain) -> list[Phrase]:
    """Needs intervals of both that lie apart."""
    if tok_s.low is None or tok_s.high is None or p95.low is None or p95.high is None:
        return []
    if tok_s.low > p95.high:
        return [phrase("tok/s grew by the larger factor over this range.")]
    if p95.low > tok_s.high:
        return [phrase("p95 grew by the larger factor.")]
    return []


def _waited(reading: Reading) -> list[Phrase]:
    if not reading.highest("waiting_max"):
        return []
    words = "Up to {n} waited in the server at {level}."
    return [phrase(words, n=highest(reading, "waiting_max"), level=level_words(reading))]


def doubling(subject: Subject) -> Phrase:
    """Needs two measured levels, one twice the other."""
    main = subject.main
    about = subject.curve
    pairs = [] if main is None or main.open_loop else [p for curve in main.curves for p in _doublings(curve)]
    if main is None or about is None or not pairs:
        return phrase(UNKNOWN + "no two levels were measured of which one is twice the other; `+sweep=batching` does.")
    own = [pair for pair in pairs if pair[0].server == about.server]
    curve, lower, upper = min(own or pairs, key=_how_near)
    tok_s, p95 = curve.change(lower, upper, "tok_s"), curve.change(lower, upper, "p95_e2e_s")
    assert tok_s is not None and p95 is not None
    low, high = TUTORIAL_DOUBLING
    head = ""
    parts: dict[str, Part] = {}
    if lower.at != low:
        head = "{asked_low} → {asked_high} was not measured; the nearest doubling is. "
        parts = {
            "asked_low": plain("rule.tutorial_doubling_low", low),
            "asked_high": plain("rule.tutorial_doubling_high", high),
        }
    change = phrase(
        head + "{lower} → {upper} with {load}: tok/s {tok_s}, p95 {p95}.",
        load=lengths_sent(curve),
        lower=concurrency_figure(lower),
        upper=concurrency_figure(upper),
        tok_s=change_words(lower, upper, "tok_s", tok_s),
        p95=change_words(lower, upper, "p95_e2e_s", p95),
        **parts,
    )
    whose = [] if own else [phrase("Of {label}:", label=label_figure(curve))]
    return join([*whose, change, _acceptable(main, curve, upper)], " ")


def _doublings(curve: LoadCurve) -> list[tuple[LoadCurve, Reading, Reading]]:
    return [(curve, a, b) for a, b in combinations(curve.levels, 2) if b.at == 2 * a.at]


def _how_near(pair: tuple[LoadCurve, Reading, Reading]) -> tuple[float, int]:
    """The tutorial's levels first, then what has most repeats."""
    _, lower, upper = pair
    return abs(math.log2(lower.at / TUTORIAL_DOUBLING[0])), -min(len(lower.measured), len(upper.measured))


def _acceptable(choice: Choice, curve: LoadCurve, upper: Reading) -> Phrase:
    limits = choice.slo.percentiles()
    if not limits:
        return phrase("Whether that is acceptable is not known: no objective is given (`slo.p95_e2e_s`).")
    candidate = next(c for c in choice.candidates if c.reading is upper)
    named = phrase(
        "{level} against {limits}: ",
        level=level_words(upper),
        limits=objectives(limits),
    )
    if candidate.standing is Standing.MEETS:
        thin = ", by a thin margin" if candidate.thin else ""
        return phrase("{named}meets every objective" + thin + ", so they allow it.", named=named)
    if candidate.standing is Standing.MISSES:
        return phrase("{named}misses, so it is for work that nobody waits for.", named=named)
    return phrase("{named}undecided within noise; " + repeats_tell(curve) + ".", named=named)


def under_fed(subject: Subject) -> Phrase:
    """Needs power and utilization of a card at the lowest of two levels."""
    curve = subject.curve
    if curve is None or len(curve.levels) < 2:
        return _no_levels()
    words = lowest_level(curve) if all(observed(point) for point in curve.levels[0].measured) else None
    if words is None:
        return phrase(UNKNOWN + "power and utilization of a GPU were not observed; `+sweep=concurrency` on GPUs does.")
    share = curve.ratio(curve.levels[0], curve.best, "tok_s") if curve.best else None
    if share is None or share >= HALF:
        return words
    tell = phrase(
        "To an SRE: the same server gives more with more requests at once, so this is under-use and no fault. The best "
        "level is the best of this run, not a vendor's figure."
    )
    return join([words, tell], " ")


def creeping(subject: Subject) -> Phrase:
    """Needs an operating point; without one the levels as they are."""
    main, curve = subject.main, subject.curve
    if main is None or curve is None or not curve.levels:
        return _no_levels()
    reading = main.point.reading if main.point is not None else curve.levels[-1]
    parts: dict[str, Part] = {
        "level": level_words(reading),
        "p95": cell(reading, "p95_e2e_s", 4),
        "prompt": count(f"{reading.name}.prompt_tokens_sent", _prompt_tokens(curve, reading)),
    }
    what = "the highest level measured"
    if main.point is not None:
        what = "as it stands" if main.basis is Basis.AS_MEASURED else "the operating point"
    band = "" if curve.interval(reading, "p95_e2e_s") is None else " ({band})"
    if band:
        parts["band"] = interval_words(curve, reading, "p95_e2e_s")
    sentences = [
        phrase(
            "The baseline, " + what + ": at {level} p95 was {p95} s" + band + " with prompts of {prompt} tokens on "
            "average. Every other level stands in batching_benchmark.md.",
            **parts,
        )
    ]
    if main.point is not None and main.point.safe_up_to is not None:
        sentences.append(
            phrase("More in flight than {safe}: the load has left the range.", safe=level_words(main.point.safe_up_to))
        )
    sentences.append(
        phrase(
            "Longer prompts than these: the baseline does not hold for them. With load and prompts as they were: "
            "measure this sweep again, and " + DRIFT + " names what changed beyond noise."
        )
    )
    return join(sentences, " ")


def _prompt_tokens(curve: LoadCurve, reading: Reading) -> float:
    sent = reading.median("mean_prompt_tokens")
    return sent if sent is not None else float(curve.series.sample.prompt_tokens or 0)


def two_services(subject: Subject) -> Phrase:
    """Needs two levels; chat takes the operating point of the objectives, else the last before latency blows up."""
    main, curve = subject.main, subject.curve
    if main is None or curve is None or len(curve.levels) < 2:
        return _no_levels()
    chat, why_chat = _for_chat(main, curve)
    fastest = _fastest(main, curve)
    batch, why_batch = _for_batch(fastest, chat if fastest is curve else None)
    if chat is not None:
        interactive = phrase("Interactive: {service}, " + why_chat + ".", service=_service(main, curve, chat))
    elif curve.blow_up is not None and curve.blow_up.seen is False:
        interactive = phrase(
            "Interactive: no limit found up to {level}, the highest measured ({gives}); " + BY_OBJECTIVE + ".",
            level=level_words(curve.levels[-1]),
            gives=gives(curve.levels[-1]),
        )
    else:
        interactive = phrase(
            "Interactive: not known from this run, where latency blows up is open; " + blow_up_tells(curve) + "."
        )
    sentences = [
        phrase("For {load}.", load=lengths_sent(curve)),
        interactive,
        phrase("Batch: {service}, {why}.", service=_service(main, fastest, batch), why=why_batch),
        *_near_full(main, subject.choices, chat or batch),
    ]
    if chat is batch:
        sentences.append(phrase("These rows do not set the two apart."))
    lengths = sorted({c.series.sample.max_model_len for c in main.curves if c.levels})
    if len(lengths) == 1:
        length = plain(f"{curve.name}.max_model_len", lengths[0])
        sentences.append(phrase("Under this load only max_model_len {length} was measured.", length=length))
    return join(sentences, " ")


def _for_chat(choice: Choice, curve: LoadCurve) -> tuple[Reading | None, str]:
    point, blow_up = choice.point, curve.blow_up
    if point is not None and choice.basis is Basis.OBJECTIVES:
        return point.reading, "the operating point"
    if blow_up is not None and blow_up.seen is False:
        return None, ""
    several = blow_up is not None and len(blow_up.last_before) > 1
    what = ("the lowest that could be " if several else "") + "the last level before latency outgrows throughput"
    return latency_level(curve), what


def _near_full(main: Choice, choices: Sequence[Choice], reading: Reading) -> list[Phrase]:
    """What the same concurrency gave with contexts that are nearly full; needs that level of another load."""
    for choice in choices:
        for curve in choice.curves:
            full = next((level for level in curve.levels if level.at == reading.at), None)
            if choice is not main and curve.series.sample.purpose == "near_full_context" and full is not None:
                return [
                    phrase(
                        "With {load}, {level} gave {gives}.",
                        load=lengths_sent(curve),
                        level=level_words(full),
                        gives=gives(full),
                    )
                ]
    return []


def _fastest(choice: Choice, curve: LoadCurve) -> LoadCurve:
    """The curve of the server for work that nobody waits for: another's only where that gives more tok/s."""
    most = max(choice.servers, key=most_tok_s)
    assert most.best is not None and curve.best is not None
    return most if most.server != curve.server and curve.beaten(curve.best, most, most.best) else curve


def _for_batch(curve: LoadCurve, chat: Reading | None) -> tuple[Reading, Phrase]:
    """The level of a throughput-focused service, or that of the chat where it gives no less."""
    full, best = throughput_level(curve), curve.best
    assert best is not None
    if full is None:
        return best, phrase("the highest tok/s measured; whether more load gives more is open")
    same = chat is not None and (chat.median("tok_s") or 0.0) >= (full.median("tok_s") or 0.0)
    level = chat if chat is not None and same else full
    why = "the same" + of_those_tested(curve) if same else why_throughput(curve)
    if not curve.knee.could_be:
        return level, phrase(why)
    return level, phrase(why + ("" if same else ", whatever its p95") + "; {most}", most=_most(curve, level, best))


def _most(curve: LoadCurve, level: Reading, best: Reading) -> Phrase:
    """What the level with the highest tok/s has over another, as measured."""
    if level is best:
        return phrase("no level measured gives more")
    change = curve.change(level, best, "tok_s")
    assert change is not None
    return phrase(
        "of the levels measured {best} gives most, {gives}: tok/s {change}",
        best=level_words(best),
        gives=gives(best),
        change=change_words(level, best, "tok_s", change),
    )


def _service(choice: Choice, curve: LoadCurve, reading: Reading) -> Phrase:
    several = len(choice.servers) > 1
    return phrase(
        "{whose}max_model_len {length}, {level} ({gives}, TTFT p95 {ttft} s)",
        whose=phrase("{label}: ", label=label_figure(curve)) if several else phrase(""),
        length=plain(f"{curve.name}.max_model_len", curve.series.sample.max_model_len),
        level=level_words(reading),
        gives=gives(reading),
        ttft=cell(reading, "p95_ttft_s", 4),
    )
