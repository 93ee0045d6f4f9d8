"""What neighbours cost: one level of a session, alone on its host and beside other sessions of the run.

The readings are the session's anchors and its control; which of them had company, each row says.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from analysis.load.knee import Gain
from analysis.load.load_tables import confidence
from analysis.load.strangers import stranger_sentences
from analysis.numbers.intervals import CONFIDENCE, mean_log, pooled_noise
from analysis.rows.caveats import title
from analysis.rows.tables import RunPoint, Tables
from analysis.writing.document import Document, Part, Phrase, phrase
from analysis.writing.figures import Figure, count, plain, quote, signed_percent, significant
from contract.rows import MEASURED

PURPOSES = ("anchor", "control")
COLUMNS = ("tok_s", "p95_e2e_s")


@dataclass(frozen=True, slots=True)
class Neighbours:
    """Both kinds of readings of one session, at least one of each."""

    session_id: str
    alone: tuple[RunPoint, ...]
    beside: tuple[RunPoint, ...]

    @property
    def name(self) -> str:
        """Prefix of the names of its figures."""
        return f"neighbours.{self.session_id}"

    def change(self, column: str) -> Gain:
        """Return by what share a column's geometric mean changes from alone to beside others.

        The noise is pooled over the two kinds; without a second reading of either there is no interval.
        """
        alone, beside = values(self.alone, column), values(self.beside, column)
        change, noise = mean_log(beside) - mean_log(alone), pooled_noise((alone, beside))
        if noise is None:
            return Gain(math.expm1(change))
        margin = noise.margin(1 / len(alone) + 1 / len(beside), (1 - CONFIDENCE) / 2)
        return Gain(math.expm1(change), math.expm1(change - margin), math.expm1(change + margin))

    @property
    def alone_last(self) -> bool:
        """Whether every reading alone is later than every one beside others."""
        return min(p.started_at for p in self.alone) > max(p.started_at for p in self.beside)


def values(points: Sequence[RunPoint], column: str) -> list[float]:
    """Return a column's values."""
    return [value for point in points if (value := getattr(point, column))]


def neighbours(points: Sequence[RunPoint]) -> list[Neighbours]:
    """Return the sessions that were measured both ways, by id."""
    own: dict[str, list[RunPoint]] = {}
    for point in sorted(points, key=lambda point: (point.purpose, point.repeat or 0)):
        if point.purpose in PURPOSES and point.status == MEASURED and point.tok_s and point.p95_e2e_s:
            own.setdefault(point.session_id, []).append(point)
    made = []
    for session, some in sorted(own.items()):
        alone = tuple(point for point in some if not point.co_running_sessions)
        beside = tuple(point for point in some if point.co_running_sessions)
        if alone and beside:
            made.append(Neighbours(session, alone, beside))
    return made


def neighbour_sentences(tables: Tables, points: Sequence[RunPoint] | None = None) -> list[Phrase]:
    """Return what was beside the levels of `points` (None: of all): what other sessions of the run cost, and which
    processes of others were on the cards."""
    points = tables.points if points is None else points
    return [*_of_the_run(points), *stranger_sentences(tables, points)]


def _of_the_run(points: Sequence[RunPoint]) -> list[Phrase]:
    """The neighbour figure of every session that has one; else whether there is anything to know, and what would tell.
    Nothing for a run without load."""
    found = neighbours(points)
    if found:
        return [sentence for each in found for sentence in _sentences(each)]
    load = [point for point in points if point.kind == "load" and point.status == MEASURED]
    if not load:
        return []
    if not any(point.co_running_sessions for point in load):
        return [phrase("Neighbours: every level was measured with no other session of the run on its host.")]
    return [
        phrase(
            "What neighbours cost is not known from this run: levels were measured beside other sessions, and no "
            "control both so and alone; `-m +sweep=concurrency` over several servers at once, with `controls=on` and "
            "levels long enough for anchors, tells."
        )
    ]


def _sentences(found: Neighbours) -> Iterator[Phrase]:
    sample, change = found.alone[0], found.change("tok_s")
    who: dict[str, Part] = {
        "who": quote(f"{found.name}.title", title(sample, sample.model)),
        "level": plain(f"{found.name}.concurrency", sample.concurrency or 0),
        "tok_s": _figure(found, "tok_s"),
        "p95": _figure(found, "p95_e2e_s"),
    }
    head = (
        "Neighbours: {who}, concurrency {level}: beside other sessions of the run on its host tok_s changed by {tok_s}"
    )
    if change.low is None or change.high is None:
        yield phrase(
            head
            + " and p95 by {p95} against alone; with one reading of each nothing is known of the noise, so whether "
            "neighbours cost anything is not known from this run.",
            **who,
        )
        return
    within = change.low <= 0 <= change.high
    yield phrase(
        head
        + " ({low} to {high}) and p95 by {p95} ({p95_low} to {p95_high}) against alone, at {confidence} confidence"
        + (": in tok_s no more than noise." if within else "."),
        **who,
        low=_figure(found, "tok_s", "low"),
        high=_figure(found, "tok_s", "high"),
        p95_low=_figure(found, "p95_e2e_s", "low"),
        p95_high=_figure(found, "p95_e2e_s", "high"),
        confidence=confidence(),
    )
    if found.alone_last:
        yield phrase(
            "All readings alone came after those beside others, so a drift of that server is in these figures."
        )


def _figure(found: Neighbours, column: str, which: str = "share") -> Figure:
    return signed_percent(f"{found.name}.{column}_{which}_pct", getattr(found.change(column), which))


def add_neighbours(doc: Document, tables: Tables) -> None:
    """Write the readings of every session that was measured both ways, and what is to be said of neighbours; nothing
    where that is nothing."""
    said = neighbour_sentences(tables)
    if not said:
        return
    doc.heading(2, "What neighbours cost")
    found = neighbours(tables.points)
    if found:
        doc.say(
            "One level of a session, its anchor, was measured beside other sessions of the run on the same host and, "
            "once those were gone, alone. Means are geometric."
        )
    for each in found:
        doc.table(
            ["what", "readings", "mean tok_s", "mean p95_e2e_s"],
            [_row(each, "alone", each.alone), _row(each, "beside", each.beside)],
            each.alone[0].simulated,
        )
    doc.bullets(said)


def _row(found: Neighbours, word: str, points: Sequence[RunPoint]) -> list[str | Part]:
    means = [
        significant(f"{found.name}.{word}.{column}", math.exp(mean_log(values(points, column))), 4)
        for column in COLUMNS
    ]
    words = "alone on the host" if word == "alone" else "beside other sessions"
    return [words, count(f"{found.name}.{word}.readings", len(points)), *means]
