"""What requests of one length need of a KV pool that the run measured, by arithmetic: for the answers about memory, and
beside what was measured under load. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from analysis.advice.subject import Subject
from analysis.memory.kv_envelope import Envelope
from analysis.memory.kv_pages import Pages, pages_of
from analysis.memory.kv_room import kv_room


@dataclass(frozen=True, slots=True)
class PoolNeed:
    """Requests of one length against a pool."""

    need_bytes: float
    room_bytes: float
    """Without the null block, which no request gets."""
    holds: int
    """Of them at once."""
    sequences: int
    """Of that length, as the engine counts them: with sliding windows fewer than it holds at once."""
    which: str
    """Whose pool it is."""
    pages: Pages | None


def pool_need(subject: Subject, tokens: int, n: int) -> PoolNeed | None:
    """Return what `n` requests at once of `tokens` tokens need of the pool that the KV sweep measured, else of a loaded
    server's; None where no engine gave its pool's size, or the formula is not known."""
    if subject.envelope is not None:
        return _of_envelope(subject.envelope, tokens, n)
    return _under_load(subject, tokens, n, sized=True)


def configured_need(subject: Subject, tokens: int, n: int) -> PoolNeed | None:
    """Return the same of a pool that servers get by their configuration, not of one that a sweep sized."""
    envelope = subject.envelope
    if envelope is not None and envelope.whole_card:
        return _of_envelope(envelope, tokens, n)
    return _under_load(subject, tokens, n, sized=False)


def _of_envelope(envelope: Envelope, tokens: int, n: int) -> PoolNeed:
    return PoolNeed(
        envelope.need_bytes(tokens, n),
        envelope.room_bytes,
        holds=math.floor(envelope.most(tokens)),
        sequences=_sequences(envelope.room_bytes, envelope.need_bytes(tokens, 1), tokens, envelope.pages),
        which="the measured pool" if envelope.whole_card else "the largest pool committed, not all that a card holds",
        pages=envelope.pages,
    )


def _under_load(subject: Subject, tokens: int, n: int, sized: bool) -> PoolNeed | None:
    """Of the first server; `sized`: also of one whose pool a sweep sized."""
    readings = [r for choice in subject.choices for c in choice.curves for r in c.series.measured]
    reading = next((r for r in readings if sized or r.measured[0].sequences is None), None)
    if reading is None:
        return None
    pages = pages_of(reading.measured[0], subject.configs)
    room = kv_room(reading, tokens, n, pages)
    if room is None:
        return None
    sequences = _sequences(room.pool_bytes, room.held_bytes / n, tokens, pages)
    which = "the pool of the server under load"
    return PoolNeed(room.held_bytes, room.pool_bytes, room.holds, sequences, which, pages)


def _sequences(room_bytes: float, one_bytes: float, tokens: int, pages: Pages | None) -> int:
    return int(room_bytes // (one_bytes if pages is None else pages.sequence_bytes(tokens)))
