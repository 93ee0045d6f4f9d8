"""What came between a reading and its card: processes of others, a clock held down. Notes of levels and of memory."""

from __future__ import annotations

from analysis.rows.series import Reading
from analysis.writing.document import Part, phrase
from analysis.writing.figures import count, quote


def foreign_process_notes(reading: Reading) -> list[Part]:
    """Return which processes of others were on the cards, the first one quoted; nothing where none was seen."""
    seen: dict[str, str] = {}
    for point in (*reading.measured, *reading.unmeasured):
        for words in point.foreign_processes or ():
            seen.setdefault(words.partition(": ")[0], words)  # one whose memory grew is listed once for each size
    if not seen:
        return []
    first = quote(f"{reading.name}.foreign_process", next(iter(seen.values())))
    if len(seen) == 1:
        return [phrase("another process on the card: {first}", first=first)]
    more = count(f"{reading.name}.foreign_processes_more", len(seen) - 1)
    return [phrase("other processes on the card: {first} and {more} more", first=first, more=more)]


def clock_notes(reading: Reading) -> list[Part]:
    """Return why a card's clock was held down at any sample; nothing where it never was."""
    reasons = {why for point in (*reading.measured, *reading.unmeasured) for why in point.throttle_reasons or ()}
    if not reasons:
        return []
    why = quote(f"{reading.name}.throttle_reasons", " and ".join(sorted(reasons)))
    return [phrase("clock held down at times: {why}", why=why)]
