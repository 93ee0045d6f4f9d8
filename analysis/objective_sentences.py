"""Which levels hold the service level objectives, in words and as a table: parts of the pages of load."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

from analysis.document import Document, Part, Phrase, join, phrase
from analysis.figures import Figure, percent, quote, significant, times
from analysis.load_curve import LoadCurve
from analysis.load_tables import cell, unmeasured_notes
from analysis.objectives import KEEPS_UP, border, states
from analysis.series import Reading
from analysis.targets import NO_OBJECTIVES, Slo


def add_objectives(doc: Document, curve: LoadCurve, slo: Slo, axis: str, level: Callable[[Reading], Figure]) -> None:
    """Write which levels of a curve hold the objectives; nothing where there is none."""
    if slo == NO_OBJECTIVES:
        return
    names = [objective.name for objective in fields(Slo) if getattr(slo, objective.name) is not None]
    limits = join([phrase(n + " up to {s} s", s=significant(f"slo.{n}", getattr(slo, n))) for n in names], ", ")
    keeps_up = phrase("")
    if axis == "request_rate":
        share = percent("rule.keeps_up_pct", KEEPS_UP, 0)
        keeps_up = phrase(
            ", and the server ends at least {share} of what is sent as far as counting can tell", share=share
        )
    doc.say(
        "Objectives: {limits}. A level *held* where every repeat meets them all{keeps_up}; it *broke* where none does; "
        "else its repeats disagree.",
        limits=limits,
        keeps_up=keeps_up,
    )
    states_by_level = _states(curve, slo)
    rows: list[list[str | Part]] = [
        [
            level(r),
            *(cell(r, name, 4) for name in names),
            cell(r, "tok_s", 4),
            _word(r, states_by_level),
            join(unmeasured_notes(r)),
        ]
        for r in curve.series.readings
    ]
    doc.table([axis, *names, "tok_s", "verdict", "notes"], rows, curve.series.sample.simulated)
    doc.bullets([phrase("The border along " + axis + ": {words}", words=border_words(curve, slo))])


def border_words(curve: LoadCurve, slo: Slo) -> Phrase:
    """Return between which levels the objectives begin to be missed."""
    found = border(_states(curve, slo))
    parts: dict[str, Part] = {}
    if found.held is not None:
        parts["held"] = _level(curve, "held", found.held)
    if found.broke is not None:
        parts["broke"] = _level(curve, "broke", found.broke)
    words = ""
    if found.undecided:
        parts["undecided"] = _levels(curve, "undecided", found.undecided)
        words = "; the repeats disagree at {undecided}"
    if found.held is not None and found.broke is not None:
        parts["ratio"] = times(f"{curve.name}.slo_ratio", found.broke / found.held)
        return phrase("{held} held, {broke} ({ratio}) broke" + words + "." + _alone(curve), **parts)
    tells = " `+sweep=slo` with a wider range tells where they break."
    if found.held is not None:
        return phrase("{held} held, and no level broke" + words + "." + tells + _alone(curve), **parts)
    if found.broke is not None:
        return phrase("no level held: {broke} broke" + words + "." + _alone(curve), **parts)
    if found.undecided:
        return phrase("no level clearly held or broke" + words + ".", **parts)
    return phrase("not known from this run: no level was measured; `+sweep=slo` tells.")


def _states(curve: LoadCurve, slo: Slo) -> dict[float, bool | None]:
    return states({r.at: (*r.measured, *r.unmeasured) for r in curve.series.readings}, slo)


def _word(reading: Reading, known: dict[float, bool | None]) -> str:
    if reading.at not in known:
        return "not measured"
    return {True: "held", False: "broke", None: "repeats disagree"}[known[reading.at]]


def _alone(curve: LoadCurve) -> str:
    single = all(len(r.measured) < 2 for r in curve.series.readings)
    return " Every level has one repeat, so how far noise moves this is not known." if single else ""


def _level(curve: LoadCurve, what: str, at: float) -> Figure:
    return Figure(f"{curve.name}.slo_{what}", at, f"{at:g}")


def _levels(curve: LoadCurve, what: str, levels: tuple[float, ...]) -> Figure:
    return quote(f"{curve.name}.slo_{what}", ", ".join(f"{at:g}" for at in levels))
