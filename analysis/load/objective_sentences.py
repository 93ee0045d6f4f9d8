"""Between which levels the service level objectives begin to be missed: a part of the pages of load."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from analysis.load.checks import Standing, standing_at
from analysis.load.knee_sentences import SEARCHES, levels_tell
from analysis.load.load_curve import LoadCurve
from analysis.load.objectives import Border, border, states
from analysis.load.strangers import resting_on
from analysis.rows.series import Reading, outcome_figure
from analysis.rows.targets import Slo
from analysis.writing.document import Document, Part, Phrase, join, phrase
from analysis.writing.figures import Figure, percent, quote, significant, times
from contract.rows import KEEPS_UP


def add_objectives(doc: Document, slo: Slo, axis: str) -> None:
    """Write the objectives and what holding them means, once for all curves along an axis (`concurrency`,
    `request_rate`); nothing where there is no objective."""
    if not slo.percentiles():
        return
    limits = [phrase(name + " up to {s} s", s=significant(f"slo.{name}", s)) for name, s in slo.percentiles().items()]
    keeps_up = phrase("")
    if axis == "request_rate":
        share = percent("rule.keeps_up_pct", KEEPS_UP, 0)
        keeps_up = phrase(", and the server ends {share} of what is sent as far as counting can tell", share=share)
    doc.say(
        "Objectives, repeat by repeat ({limits}{keeps_up}): a level *held* where every repeat meets them all, *broke* "
        "where none does, and else its repeats disagree; a search goes by that until its levels have repeats, and then "
        "counts noise, too.",
        limits=join(limits, ", "),
        keeps_up=keeps_up,
    )


def add_border(doc: Document, curve: LoadCurve, slo: Slo, axis: str) -> None:
    """Write the border along a curve's axis; nothing where there is no objective."""
    if not slo.percentiles():
        return
    doc.say("The border along " + axis + ": {border}", border=border_words(curve, slo))
    for sentence in resting_on(curve.levels):
        doc.say("{sentence}", sentence=sentence)


def border_words(curve: LoadCurve, slo: Slo) -> Phrase:
    """Return between which levels the objectives begin to be missed: repeat by repeat, and with noise counted."""
    words = _by_repeats(curve, slo)
    return join([words, _counting_noise(curve, slo)], " ") if curve.levels else words


def _by_repeats(curve: LoadCurve, slo: Slo) -> Phrase:
    known = _states(curve, slo)
    found = border(known)
    parts: dict[str, Part] = {}
    if found.held is not None:
        parts["held"] = _level(curve, "held", found.held)
    if found.broke is not None:
        parts["broke"] = _level(curve, "broke", found.broke)
    words = ""
    if found.undecided:
        parts["undecided"] = _levels(curve, "slo_undecided", found.undecided)
        words = "; the repeats disagree at {undecided}"
    lost = _lost(curve, known, found)
    if lost:
        parts["lost"] = _levels(curve, "slo_not_measured", tuple(reading.at for reading in lost))
        parts["why"] = _why(lost)
        words += "; {lost} could not be measured ({why})"
    if found.held is not None and found.broke is not None:
        parts["ratio"] = times(f"{curve.name}.slo_ratio", found.broke / found.held)
        return phrase("{held} held, {broke} ({ratio}) broke" + words + ".", **parts)
    if found.held is not None:
        tells = " " + levels_tell(curve, search="slo") + " where they break."
        return phrase("{held} held, and no level broke" + words + "." + tells, **parts)
    if found.broke is not None:
        return phrase("no level held: {broke} broke" + words + ".", **parts)
    if found.undecided:
        return phrase("no level clearly held or broke" + words + ".", **parts)
    if lost:
        return phrase("not known from this run" + words + "; `resume=RUN` tries again.", **parts)
    search = "slo" if curve.series.sample.purpose in SEARCHES["slo"] else "capacity"
    return phrase("not known from this run: no level was measured; `+sweep=" + search + "` tells.")


def _lost(curve: LoadCurve, known: Mapping[float, bool | None], found: Border) -> list[Reading]:
    """The levels of which no repeat tells, and any of which the border may lie at."""
    low, high = found.held or 0, math.inf if found.broke is None else found.broke
    return [reading for reading in curve.series.readings if reading.at not in known and low < reading.at < high]


def _why(lost: Sequence[Reading]) -> Phrase:
    figures = [outcome_figure(point) for reading in lost for point in reading.unmeasured]
    return join({figure.text: figure for figure in figures}.values(), ", ")


def _states(curve: LoadCurve, slo: Slo) -> dict[float, bool | None]:
    return states({r.at: (*r.measured, *r.unmeasured) for r in curve.series.readings}, slo)


def _counting_noise(curve: LoadCurve, slo: Slo) -> Phrase:
    """What operating_point.md goes by, and a search once levels have repeats; needs noise that is known."""
    if curve.tok_s_noise is None:
        return phrase("Every level has one repeat, so how far noise moves this is not known.")
    found: dict[Standing, list[float]] = {}
    for reading in curve.levels:
        found.setdefault(standing_at(curve, reading, slo), []).append(reading.at)
    each = (
        phrase(word + ": {at}", at=_levels(curve, f"noise_{word}", tuple(found[word])))
        for word in (Standing.MEETS, Standing.UNDECIDED, Standing.MISSES)
        if word in found
    )
    return phrase("With noise counted, as in operating_point.md, of these levels, {each}.", each=join(each))


def _level(curve: LoadCurve, what: str, at: float) -> Figure:
    return Figure(f"{curve.name}.slo_{what}", at, f"{at:g}")


def _levels(curve: LoadCurve, what: str, levels: tuple[float, ...]) -> Figure:
    return quote(f"{curve.name}.{what}", ", ".join(f"{at:g}" for at in levels))
