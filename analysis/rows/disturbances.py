"""What came between a reading and its card: processes of others, a clock held down. Notes of levels and of memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from analysis.rows.series import Reading
from analysis.rows.tables import RunPoint
from analysis.writing.document import Part, Phrase, phrase
from analysis.writing.figures import count, quote


def with_others(points: Iterable[RunPoint]) -> list[RunPoint]:
    """Return the points at which a process of others was seen on the cards."""
    return [point for point in points if point.foreign_processes]


def one_for_each(seen: Iterable[str]) -> dict[str, str]:
    """Return processes by id and card: one whose memory grew was listed once for each size."""
    found: dict[str, str] = {}
    for words in seen:
        found.setdefault(words.partition(": ")[0], words)
    return found


def process_words(name: str, seen: Sequence[str]) -> Phrase:
    """Return the first of some processes of others, quoted, and how many more there were; needs one."""
    first = quote(f"{name}.foreign_process", seen[0])
    if len(seen) == 1:
        return phrase("another process on the card: {first}", first=first)
    more = count(f"{name}.foreign_processes_more", len(seen) - 1)
    return phrase("other processes on the card: {first} and {more} more", first=first, more=more)


def foreign_process_notes(reading: Reading) -> list[Part]:
    """Return which processes of others were on the cards, the first one quoted; nothing where none was seen."""
    points = with_others((*reading.measured, *reading.unmeasured))
    seen = one_for_each(words for point in points for words in point.foreign_processes or ())
    return [process_words(reading.name, list(seen.values()))] if seen else []


def clock_notes(reading: Reading) -> list[Part]:
    """Return why a card's clock was held down at any sample; nothing where it never was."""
    reasons = {why for point in (*reading.measured, *reading.unmeasured) for why in point.throttle_reasons or ()}
    if not reasons:
        return []
    why = quote(f"{reading.name}.throttle_reasons", " and ".join(sorted(reasons)))
    return [phrase("clock held down at times: {why}", why=why)]
