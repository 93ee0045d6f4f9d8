"""Levels that were measured with processes of others on their cards, and what that leaves of all that rests on them.

Such a process takes computing, bandwidth and power by an amount that no row tells, and may come and go between levels.
So what a level gave beside one is not known of its server alone, nor what follows from holding it against others.
"""

from __future__ import annotations

from collections.abc import Iterable

from analysis.load.load_curve import LoadCurve, load_curves
from analysis.load.load_tables import label_figure, lengths_sent
from analysis.load.rates import level_words, rate_curves
from analysis.rows.disturbances import foreign_process_notes, one_for_each, process_words, with_others
from analysis.rows.series import Reading
from analysis.rows.tables import RunPoint, Tables
from analysis.writing.document import Phrase, join, phrase
from analysis.writing.figures import count, quote
from contract.rows import MEASURED, SessionRow

TELLS = "the same sweep with the cards to itself tells"


def disturbed(readings: Iterable[Reading]) -> list[Reading]:
    """Return the readings of which a measured repeat had company on its card."""
    return [reading for reading in readings if with_others(reading.measured)]


def marked(readings: Iterable[Reading]) -> list[Phrase]:
    """Return at which of these levels others were on the card, in short; nothing where they never were."""
    levels = {words.text: words for words in map(level_words, disturbed(readings))}
    if not levels:
        return []
    return [phrase("Other processes were on the card at {levels}.", levels=join(levels.values(), ", "))]


def resting_on(readings: Iterable[Reading]) -> list[Phrase]:
    """Return the same as a sentence with what follows for all that is said of these levels."""
    return [
        phrase("{mark} What rests on that is not known of this server alone; " + TELLS + ".", mark=mark)
        for mark in marked(readings)
    ]


def stranger_sentences(tables: Tables, points: Iterable[RunPoint]) -> list[Phrase]:
    """Return who was on the cards beside levels of load of `points`, curve by curve, and whom only a look before or
    after the points of one of their servers saw. `tables` of the whole run: names of figures are the run's."""
    own = {id(point) for point in points}
    curves = [curve for curve in _curves(tables.points) if id(curve.series.group.points[0]) in own]
    of_levels = [_of_levels(curve, found) for curve in curves if (found := disturbed(curve.series.measured))]
    return [*of_levels, *_of_sessions(tables, own)]


def _curves(points: Iterable[RunPoint]) -> list[LoadCurve]:
    load = [point for point in points if point.kind == "load"]
    made = []
    for purpose in dict.fromkeys(point.purpose for point in load):
        made += rate_curves(load) if purpose == "rate" else load_curves(load, purpose)
    return made


def _of_levels(curve: LoadCurve, found: list[Reading]) -> Phrase:
    purpose = curve.series.sample.purpose
    return phrase(
        f"Others on the card: {{label}}, {{load}} ({purpose}): {{levels}}. What rests on that is not known of this "
        f"server alone; {TELLS}.",
        label=label_figure(curve),
        load=lengths_sent(curve),
        levels=join(map(_level, found)),
    )


def _level(reading: Reading) -> Phrase:
    return phrase(
        "at {level} in {n} of {repeats} repeats {who}",
        level=level_words(reading),
        n=count(f"{reading.name}.repeats_with_others", len(with_others(reading.measured))),
        repeats=count(f"{reading.name}.repeats", len(reading.measured)),
        who=join(foreign_process_notes(reading)),
    )


def _of_sessions(tables: Tables, own: set[int]) -> list[Phrase]:
    said = []
    for session in tables.sessions:
        points = [point for point in tables.points if point.session_id == session.session_id]
        if points and not any(id(point) in own for point in points):
            continue
        at_points = one_for_each(w for p in points if p.status == MEASURED for w in p.foreign_processes or ())
        looks = one_for_each(session.foreign_processes or ())
        seen = [words for who, words in looks.items() if who not in at_points]
        if seen:
            said.append(_of_session(session, seen))
    return said


def _of_session(session: SessionRow, seen: list[str]) -> Phrase:
    name = f"session.{session.session_id}.{session.attempt}"
    return phrase(
        "Others on the card while session {session} lived, and at none of its measured points: {who}.",
        session=quote(f"{name}.id", session.session_id),
        who=process_words(name, seen),
    )
