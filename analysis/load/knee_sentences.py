"""The knee in words: its rule, its table, answers to the tutorial's two questions. Parts of batching_benchmark.md.

Every sentence has a condition on the data under which it may stand. Where none is met, the line says what is not known
and which sweep would tell.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise

from analysis.load.knee import (
    RESOLUTION,
    STILL_GAINS,
    WITHIN_PEAK,
    BlowUp,
    Gain,
    Knee,
    KneeVerdict,
    marginal_tok_s_per_s,
    read_off,
)
from analysis.load.load_curve import LoadCurve
from analysis.load.load_tables import cell, confidence, interval_words, lengths
from analysis.load.strangers import resting_on
from analysis.rows.series import Reading, concurrency_figure
from analysis.writing.document import Document, Part, Phrase, join, phrase
from analysis.writing.figures import Figure, count, percent, signed_percent, significant, significant_text, times

SEEN = 0.0005
"""A change below it is printed as zero."""
NO_REPEATS = "every level has one repeat, which says nothing about noise"
ENOUGH = 3
"""Repeats of a level: what there is with less asks for so many, what is open with them for more."""
SWEEPS = {
    "near_full_context": ("capacity", "sweep.near_full_context"),
    "batching": ("batching", "sweep"),
    "rate": ("rate", "sweep"),
}
"""What measures a purpose's levels, and the key of its settings; `concurrency` does unless told otherwise."""
SEARCHES = {"knee": ("concurrency", "batching"), "slo": ("concurrency", "batching", "rate")}
"""Sweeps that find a level by themselves, and the purposes whose load they can send."""


def repeats_tell(curve: LoadCurve, search: str = "") -> str:
    """Return which sweep would tell what is noise; `search`, `knee` or `slo`, is named too where it would."""
    sweep, key = _measured_by(curve)
    has = max((level.repeats for level in curve.repeats), default=0)
    words = f"`+sweep={sweep}` with " + (
        f"more `{key}.repeats`" if has >= ENOUGH else f"`{key}.repeats` of three or more"
    )
    return f"{words}, or `+sweep={search}`, tells" if _another(curve, search) else f"{words} tells"


def knee_tells(curve: LoadCurve) -> str:
    """Return which sweep would tell where throughput stops scaling, where that is undecided within noise.

    A higher level first while the last doubling gains more than a knee's band, where a search would go on, too: what
    lies at the rule's border takes more repeats than anybody has to tell it from the border.
    """
    if curve.knee.if_any and curve.knee.doubling is not None and curve.knee.doubling.share > WITHIN_PEAK:
        repeats = f"more `{_measured_by(curve)[1]}.repeats`"
        return f"{levels_tell(curve)} ({repeats} only where they tell the last doubling's gain from the rule's)"
    return repeats_tell(curve) + (_or_higher_levels(curve) if curve.knee.if_any else "")


def of_those_tested(curve: LoadCurve) -> str:
    """Return what stands behind a level that is read off a knee, where more load than was tested may move that up."""
    if not curve.knee.may_rise:
        return ""
    return " (of the levels tested; whether a higher one gives more, " + _more_tells(curve) + ")"


def _more_tells(curve: LoadCurve) -> str:
    """Higher levels first while the last doubling gained more than a knee's band: a search goes on only there."""
    doubling = curve.knee.doubling
    if doubling is not None and doubling.share > WITHIN_PEAK:
        return levels_tell(curve)
    return repeats_tell(curve) + _or_higher_levels(curve)


def _or_higher_levels(curve: LoadCurve) -> str:
    """A search ends at the first doubling that gains no more than a knee's band, whatever its `highest`: past that only
    levels that are named are measured."""
    if curve.series.sample.sweep not in SEARCHES:
        return ", or one with higher levels"
    sweep, key = _grid(curve)
    return f", or `+sweep={sweep}` with higher levels in `{key}.{_axis(curve)}`"


def blow_up_tells(curve: LoadCurve) -> str:
    """Return which sweep would tell where latency blows up, where that is undecided: the last that could be is the
    highest level."""
    return repeats_tell(curve) + ("" if curve.blow_up is None else _or_higher_levels(curve))


def levels_tell(curve: LoadCurve, which: str = "higher", search: str = "knee") -> str:
    """Return which sweep would tell what lies beyond the levels, `higher` or `lower`.

    `search` is the one that goes there by itself, where this load can be searched. Where higher levels were tried and
    could not be measured, no sweep goes past them.
    """
    if which == "higher" and curve.levels and curve.series.readings[-1].at > curve.levels[-1].at:
        return "`resume=RUN`, which tries again the higher levels that could not be measured, tells"
    sweep, key = _measured_by(curve)
    axis = _axis(curve)
    if sweep == search:
        return f"`+sweep={sweep}` with a {which} `{key}.{axis}.{'highest' if which == 'higher' else 'lowest'}` tells"
    if sweep in SEARCHES and _another(curve, search):
        return f"`+sweep={search}` tells"
    words = f"`+sweep={sweep}` with {which} levels in `{key}.{axis}`"
    return f"{words}, or `+sweep={search}`, tells" if _another(curve, search) else f"{words} tells"


def _measured_by(curve: LoadCurve) -> tuple[str, str]:
    """The sweep that measures such levels, and the key of its settings: the search that measured these, if one did."""
    sample = curve.series.sample
    if sample.sweep in SEARCHES:
        return sample.sweep, "sweep"
    return _grid(curve)


def _grid(curve: LoadCurve) -> tuple[str, str]:
    """The sweep that measures levels of such load that are named, and the key of its settings."""
    return SWEEPS.get(curve.series.sample.purpose, ("concurrency", "sweep"))


def _axis(curve: LoadCurve) -> str:
    return "request_rate" if curve.series.sample.purpose == "rate" else "concurrency"


def _another(curve: LoadCurve, search: str) -> bool:
    sample = curve.series.sample
    return search != sample.sweep and sample.purpose in SEARCHES.get(search, ())


def add_rule(doc: Document) -> None:
    """Write the rule and its parameters, once for all curves."""
    doc.say(
        "The rules, the same for every curve. tok_s is smoothed to the nearest curve that rises up to some level and "
        "falls from there on. The knee is the lowest level whose smoothed tok_s is within {within} of the highest; "
        "there is none yet where the last doubling of the load still gains more than {gains}. Of all numbers, tested "
        "or not, it lies above the next lower level, unless one gives more than every level tested. Latency blows "
        "up past the level with the lowest p95_e2e_s over tok_s: from there on p95 has grown by a larger factor than "
        "tok_s. "
        "Both are given as all levels that the noise of the repeats allows, at {confidence} confidence (each bound of "
        "the last doubling's gain holds with that); what lies within noise of a rule's border is undecided.",
        within=percent("rule.within_peak_pct", WITHIN_PEAK, 0),
        gains=percent("rule.still_gains_pct", STILL_GAINS, 0),
        confidence=confidence(),
    )


def knee_table(doc: Document, curve: LoadCurve) -> None:
    """Write each level's mean with its interval, its smoothed value, what its p95 bought, and whether it could be the
    knee; nothing for a curve of fewer than two levels."""
    if len(curve.levels) < 2:
        return
    interval = phrase("{confidence} interval", confidence=confidence())
    columns: list[str | Part] = ["concurrency", "repeats", "mean tok_s", interval, "mean p95_e2e_s", interval]
    columns += ["smoothed tok_s", "tok/s per further s of p95", "knee"]
    doc.table(columns, _rows(curve), curve.series.sample.simulated)
    doc.say("{noise}", noise=_noise(curve))


def _rows(curve: LoadCurve) -> list[list[str | Part]]:
    rows: list[list[str | Part]] = []
    bought: dict[float, float | None] = {}
    for lower, upper in pairwise(curve.repeats):
        bought[upper.at] = marginal_tok_s_per_s(lower, upper, curve.p95_noise)
    for reading, level in zip(curve.levels, curve.repeats, strict=True):
        rows.append(
            [
                concurrency_figure(reading),
                count(f"{reading.name}.repeats", level.repeats),
                *_mean_and_interval(curve, reading, "tok_s"),
                *_mean_and_interval(curve, reading, "p95_e2e_s"),
                significant(f"{reading.name}.tok_s_smoothed", curve.smoothed[level.at], 4),
                significant(f"{reading.name}.marginal_tok_s_per_s", bought.get(level.at)),
                _knee_cell(curve, reading),
            ]
        )
    return rows


def _mean_and_interval(curve: LoadCurve, reading: Reading, column: str) -> list[Part]:
    mean = significant(f"{reading.name}.{column}_mean", curve.mean(reading, column), 4)
    return [mean, interval_words(curve, reading, column)]


def _knee_cell(curve: LoadCurve, reading: Reading) -> str:
    if curve.knee.verdict is KneeVerdict.UNDECIDED or curve.beside_others:
        return "not known"
    return "could be" if reading.at in curve.knee.could_be else "no"


def _noise(curve: LoadCurve) -> Phrase:
    tok_s, p95 = curve.tok_s_noise, curve.p95_noise
    if tok_s is None or p95 is None:
        return phrase("Means are geometric. No interval: " + NO_REPEATS + "; " + repeats_tell(curve) + ".")
    where = (
        "the same server's repeats of the same load in another table, none of these levels having any"
        if curve.noise_from_twins
        else "the repeats of this server under this load"
    )
    beyond = ""
    parts: dict[str, Part] = {}
    highest = curve.repeated_up_to
    if highest is not None and highest < curve.levels[-1].at:
        beyond = "; no level above {highest} was repeated, and its noise is taken for the same"
        parts["highest"] = Figure(f"{curve.name}.repeated_up_to", highest, f"{highest:g}")
    return phrase(
        "Means are geometric, intervals pooled t: one repeat scatters by {tok_s} in tok_s and by {p95} in p95 "
        "(standard deviation; {df} degrees of freedom), known from "
        + where
        + beyond
        + ". "
        + _assumption(curve)
        + " What differs from one start of a server to the next is not in it.",
        tok_s=percent(f"{curve.name}.tok_s_noise_pct", tok_s.sd),
        p95=percent(f"{curve.name}.p95_noise_pct", p95.sd),
        df=count(f"{curve.name}.noise_df", tok_s.df),
        **parts,
    )


def _assumption(curve: LoadCurve) -> str:
    """What is taken for granted of the noise, and where it does not hold."""
    names = {"tok_s": "tok_s", "p95_e2e_s": "p95"}
    uneven = [name for column, name in names.items() if not curve.scatters_alike(column)]
    if not uneven:
        return "It is taken for the same at every level."
    return (
        "Knee and blow-up take it for the same at every level. In " + " and ".join(uneven) + " levels may not scatter "
        "alike (Bartlett's test), so one that scatters more has the interval of its own repeats, with one degree of "
        "freedom lent by the others."
    )


def twin_sentences(curve: LoadCurve) -> list[Phrase]:
    """Return how the levels that the other table has, too, differ from it; needs such levels, and noise."""
    pairs = [(twin, reading) for twin in curve.twins for reading in curve.levels if twin.at == reading.at]
    changes = [(t, r, c) for t, r in pairs if (c := curve.change(t, r, "p95_e2e_s")) is not None and c.low is not None]
    if not changes:
        return []
    twin, reading, change = max(changes, key=lambda found: abs(found[2].share))
    return [
        phrase(
            "Of this load {n} levels stand in the other table, too, measured in windows of their own. The two differ "
            "most at concurrency {at}: p95 {there} s there and {here} s here (medians); the means differ by {change}.",
            n=count(f"{curve.name}.levels_in_both", len(changes)),
            at=concurrency_figure(reading),
            there=cell(twin, "p95_e2e_s", 4),
            here=cell(reading, "p95_e2e_s", 4),
            change=_change(f"{reading.name}.from_other_table.p95_e2e_s", change),
        )
    ]


def knee_sentences(curve: LoadCurve) -> list[Phrase]:
    """Return the answers to the tutorial's two questions for one curve, and whether others were on its card."""
    if len(curve.levels) < 2:
        return [
            phrase(
                "Where throughput stops scaling and latency blows up is not known from this run: fewer than two levels "
                "were measured; " + _more_levels(curve) + "."
            )
        ]
    return [
        phrase("Where does throughput stop scaling? {answer}", answer=_throughput(curve)),
        phrase("Where does latency blow up? {answer}", answer=_latency(curve)),
        *resting_on(curve.levels),
    ]


def _more_levels(curve: LoadCurve) -> str:
    if len(curve.series.readings) > 1:
        return "`resume=RUN` tries the others again"
    return "`+sweep=capacity` tells" if curve.series.sample.purpose == "near_full_context" else "`+sweep=knee` tells"


def _throughput(curve: LoadCurve) -> Phrase:
    knee, last = curve.knee, curve.levels[-1]
    if knee.doubling is None:
        return phrase("Not known from this run: the levels do not span one doubling; " + levels_tell(curve) + ".")
    if curve.tok_s_noise is None:
        return phrase(
            "Not known from this run: " + NO_REPEATS + "; " + repeats_tell(curve) + ". As it stands, {seen}.",
            seen=_as_it_stands(curve, knee.doubling.share),
        )
    gained = phrase(
        "{gain} (one-sided bounds {low} and {high})",
        gain=doubling_gain(curve),
        low=doubling_gain(curve, "low"),
        high=doubling_gain(curve, "high"),
    )
    rule = percent("rule.still_gains_pct", STILL_GAINS, 0)
    if knee.verdict is KneeVerdict.NO_KNEE_YET:
        return phrase(
            "Not within the levels tested: up to concurrency {last} ({tok_s} tok/s) the last doubling still gained "
            "{gained}, more than {rule}; " + levels_tell(curve) + ".",
            last=concurrency_figure(last),
            tok_s=cell(last, "tok_s"),
            gained=gained,
            rule=rule,
        )
    if knee.verdict is KneeVerdict.UNDECIDED:
        return phrase(
            "Undecided: the last doubling, up to concurrency {last}, gained {gained}, which is {rule} within noise. "
            "{either}; " + knee_tells(curve) + ".",
            last=concurrency_figure(last),
            gained=gained,
            rule=rule,
            either=_either(curve),
        )
    first, best = curve.at(knee.could_be[0]), curve.best
    assert best is not None
    lowest = knee.above is None and first.at > 1
    below = " No lower level was measured, so it may begin below that." if lowest else ""
    return phrase(
        "{where}: {tok_s} tok/s" + _at_the_lowest(knee.could_be) + ", the highest of all levels being {best_tok_s} at "
        "{best}; the last doubling changed tok_s by {gained}." + below + _narrower(curve) + "{higher}",
        where=_where(curve),
        higher=join((phrase(" {one}", one=one) for one in may_lie_higher(curve)), ""),
        tok_s=cell(first, "tok_s"),
        best=concurrency_figure(best),
        best_tok_s=cell(best, "tok_s"),
        gained=gained,
    )


def may_lie_higher(curve: LoadCurve) -> list[Phrase]:
    """Return that more load than was tested may move the knee up, and what would tell; nothing where it may not."""
    doubling = curve.knee.doubling
    if not curve.knee.may_rise or doubling is None or doubling.low is None:
        return []
    gained = "still gained" if doubling.low > WITHIN_PEAK else "may have gained"
    return [
        phrase(
            "Above concurrency {last} nothing was measured, and the last doubling " + gained + " more than {within}: a "
            "higher level may give more, and the knee lie higher; " + _more_tells(curve) + ".",
            last=concurrency_figure(curve.levels[-1]),
            within=percent("rule.within_peak_pct", WITHIN_PEAK, 0),
        )
    ]


def _either(curve: LoadCurve) -> Phrase:
    """What is known where noise leaves open whether there is a knee."""
    if_any, last = curve.knee.if_any, concurrency_figure(curve.levels[-1])
    top, below = concurrency_figure(curve.at(if_any[-1])), curve.previous(curve.at(if_any[0]))
    if below is None:
        return phrase("Either there is no knee up to {last}, or it lies at {top} or below", last=last, top=top)
    return phrase(
        "Either there is no knee up to {last}, or it lies above {below} and up to {top}",
        last=last,
        below=concurrency_figure(below),
        top=top,
    )


def _where(curve: LoadCurve) -> Phrase:
    """The knee's range, what of it was not tested, and which of the levels tested it could be."""
    gaps = curve.knee.untested(level.at for level in curve.repeats)
    range_ = knee_range(curve)
    words = "{range}" + _apart(curve.knee.could_be)
    parts: dict[str, Part] = {"range": replace(range_, text=range_.text[0].upper() + range_.text[1:])}
    if gaps:
        words = "{range} (not tested: {gaps}), of the levels tested {levels}" + _apart(curve.knee.could_be)
        parts["levels"] = _levels(curve, "knee_levels", curve.knee.could_be)
        listed = ", ".join(f"{low} to {high}" if high > low else f"{low}" for low, high in gaps)
        parts["gaps"] = Figure(f"{curve.name}.knee_untested", listed, listed)
    return phrase(words, **parts)


def _narrower(curve: LoadCurve) -> str:
    """What would narrow the knee's range; needs one that a search would not take for narrow enough."""
    knee, levels = curve.knee, [level.at for level in curve.repeats]
    if knee.above is None or not knee.untested(levels) or knee.could_be[-1] <= RESOLUTION * knee.above:
        return ""
    sweep, key = _measured_by(curve)
    if sweep == "knee":
        return f" `+sweep={sweep}` with more `{key}.repeats` narrows this."
    if _another(curve, "knee"):
        return " `+sweep=knee` narrows this as far as noise allows."
    return f" `+sweep={sweep}` with levels between these in `{key}.concurrency` narrows this."


def _apart(levels: Sequence[float]) -> str:
    return ", which the noise does not tell apart" if len(levels) > 1 else ""


def _at_the_lowest(levels: Sequence[float]) -> str:
    return " at the lowest of these" if len(levels) > 1 else ""


def _as_it_stands(curve: LoadCurve, doubling: float) -> Phrase:
    """What was measured, noise left out; no level where it was still rising."""
    if doubling > STILL_GAINS:
        return phrase("the last doubling raised tok_s by {gain}", gain=doubling_gain(curve))
    at = read_off(curve.repeats)
    assert at is not None
    return phrase(
        "the last doubling changed tok_s by {gain}, and the lowest level within {within} of the highest is {at} "
        "({tok_s} tok/s)",
        gain=doubling_gain(curve),
        within=percent("rule.within_peak_pct", WITHIN_PEAK, 0),
        at=Figure(f"{curve.name}.read_off", at, str(at)),
        tok_s=cell(curve.at(at), "tok_s"),
    )


def knee_range(curve: LoadCurve) -> Figure:
    """Return where the knee lies, as one figure; needs a knee."""
    levels = [level.at for level in curve.repeats]
    return Figure(f"{curve.name}.knee_range", words := range_words(curve.knee, levels), words)


def range_words(knee: Knee, levels: Sequence[float]) -> str:
    """Return where a knee lies among the levels tested: `above concurrency 8 and up to 32`; the levels that it could be
    only where no other number could: `at concurrency 8`, `at concurrency 8 or 9`."""
    top = f"{knee.could_be[-1]:g}"
    if not knee.untested(levels):
        return f"at concurrency {_listed(knee.could_be, levels)}"
    return f"up to concurrency {top}" if knee.above is None else f"above concurrency {knee.above:g} and up to {top}"


def blow_up_levels(curve: LoadCurve, blow_up: BlowUp) -> Figure:
    """Return the levels that could be the last before the blow-up."""
    return _levels(curve, "blow_up_levels", blow_up.last_before)


def _levels(curve: LoadCurve, what: str, levels: Sequence[float]) -> Figure:
    """Three neighbouring levels or more are a range."""
    listed = _listed(levels, [level.at for level in curve.repeats])
    return Figure(f"{curve.name}.{what}", listed, listed)


def _listed(levels: Sequence[float], tested: Iterable[float]) -> str:
    words = [str(level) for level in levels]
    between = [at for at in tested if levels[0] <= at <= levels[-1]]
    if len(words) > 2 and between == list(levels):
        return f"{words[0]} to {words[-1]}"
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def doubling_gain(curve: LoadCurve, which: str = "share") -> Figure:
    """Return what the last doubling of the load gained, or a bound of its interval (`low`, `high`)."""
    doubling = curve.knee.doubling
    value = None if doubling is None else getattr(doubling, which)
    return percent(f"{curve.name}.doubling_{which}_pct", value)


def _latency(curve: LoadCurve) -> Phrase:
    blow_up, last = curve.blow_up, curve.levels[-1]
    if blow_up is None:
        lowest = min(curve.levels, key=lambda r: (r.median("p95_e2e_s") or 0) / (r.median("tok_s") or 1))
        return phrase(
            "Not known from this run: " + NO_REPEATS + "; " + repeats_tell(curve) + ". As it stands, p95 over tok_s is "
            "lowest at concurrency {at}.",
            at=Figure(f"{curve.name}.read_off_blow_up", lowest.at, str(lowest.at)),
        )
    if blow_up.seen is False:
        return phrase(
            "Not within the levels tested: up to concurrency {last} p95 never grew for good by a larger factor than "
            "tok_s; p95 there is {p95} s.",
            last=concurrency_figure(last),
            p95=cell(last, "p95_e2e_s"),
        )
    levels = blow_up_levels(curve, blow_up)
    if blow_up.seen is None:
        return phrase(
            "Undecided: p95 over tok_s is lowest at concurrency {levels}" + _apart(blow_up.last_before) + ", and the "
            "last of these is the highest level; " + blow_up_tells(curve) + ".",
            levels=levels,
        )
    before = curve.at(blow_up.last_before[0])
    bend = curve.following(curve.at(blow_up.last_before[-1]))
    assert bend is not None
    unconfirmed = " No higher level was measured that could confirm it." if bend is last else ""
    return phrase(
        "Past concurrency {levels}" + _apart(blow_up.last_before) + ": from {before} to {bend} p95 went from "
        "{p95_before} to {p95} s ({p95_ratio}) while tok_s went {tok_ratio}." + unconfirmed,
        levels=levels,
        before=concurrency_figure(before),
        bend=concurrency_figure(bend),
        p95_before=cell(before, "p95_e2e_s"),
        p95=cell(bend, "p95_e2e_s"),
        p95_ratio=times(f"{curve.name}.bend_p95_ratio", curve.ratio(bend, before, "p95_e2e_s")),
        tok_ratio=times(f"{curve.name}.bend_tok_s_ratio", curve.ratio(bend, before, "tok_s")),
    )


def change_words(lower: Reading, upper: Reading, column: str, change: Gain) -> Phrase:
    """Return by what share a column changes from one level to another, with its interval and what that says."""
    return _change(f"{upper.name}.change_from_{lower.at:g}.{column}", change)


def _change(name: str, change: Gain) -> Phrase:
    share = signed_percent(f"{name}_pct", change.share)
    if change.low is None or change.high is None:
        return phrase("{share} (noise not known: one repeat a level)", share=share)
    beyond = change.low > SEEN or change.high < -SEEN
    return phrase(
        "{share} ({low} to {high}: " + ("more than noise" if beyond else "within noise") + ")",
        share=share,
        low=signed_percent(f"{name}_low_pct", change.low),
        high=signed_percent(f"{name}_high_pct", change.high),
    )


def both_answers(curve: LoadCurve) -> Phrase:
    """Return both answers in one line, with the lengths that they hold for."""
    return phrase(
        "throughput ({load}) {stops}; p95 latency: {blows}",
        load=lengths(curve),
        stops=_stops(curve),
        blows=_blows(curve),
    )


def _stops(curve: LoadCurve) -> Phrase:
    knee = curve.knee
    if knee.doubling is None:
        return phrase("stops scaling at a level not known from this run")
    share = 100 * knee.doubling.share
    gain = Figure(f"{curve.name}.doubling_share_pct", share, f"{significant_text(share, 2)} %")
    if knee.may_rise:
        return phrase(
            "stops scaling {range}, of levels up to {last} (the last doubling gained {gain}, so higher ones may give "
            "more)",
            range=knee_range(curve),
            last=concurrency_figure(curve.levels[-1]),
            gain=gain,
        )
    if knee.verdict is KneeVerdict.KNEE:
        return phrase("stops scaling {range}", range=knee_range(curve))
    if knee.verdict is KneeVerdict.NO_KNEE_YET:
        return phrase("was still rising at the last level (by {gain} in the last doubling)", gain=gain)
    return phrase("stops scaling at a level not known from this run (the last doubling gained {gain})", gain=gain)


def _blows(curve: LoadCurve) -> Phrase:
    blow_up = curve.blow_up
    if blow_up is None or blow_up.seen is None:
        return phrase("where it outgrows throughput is not known from this run")
    if not blow_up.seen:
        return phrase("nowhere outgrows it")
    return phrase("outgrows it after {levels}", levels=blow_up_levels(curve, blow_up))
