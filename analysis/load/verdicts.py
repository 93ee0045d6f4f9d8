"""What limits a level of load: the KV pool, the queue, the client, a neighbour or the computing. Pure.

A verdict is given only where its signs were seen; what the row does not hold makes it `not known`, never a guess.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

NEAR_FULL = 0.95
"""The KV pool is full from this share of its blocks on, or where what is free is less than one more request needs."""
STUCK_BELOW = 0.9
"""Requests were held back where fewer than this share of the asked concurrency ever ran at once and others waited."""


class Limit(StrEnum):
    """What keeps a level from more throughput."""

    CLIENT = "client-bound"
    KV = "KV-bound"
    QUEUE = "queue-bound"
    NEIGHBOUR = "neighbour-bound"
    COMPUTE = "compute-bound"
    NOTHING = "not saturated"
    UNKNOWN = "not known"
    NOT_MEASURED = "not measured"


@dataclass(frozen=True, slots=True)
class Signs:
    """What was seen at one level, over its repeats; None where the rows cannot say."""

    concurrency: int
    measured: bool = True
    client_limited: bool = False
    """A try was given up because its load client was the limit."""
    preemptions: float | None = None
    waiting: float | None = None
    """The most that were seen waiting for a place in the batch or for KV blocks."""
    running: float | None = None
    kv_usage: float | None = None
    """Highest share of KV blocks in use, 0 to 1."""
    request_share: float | None = None
    """Of the pool that one request needs at its full length."""
    max_num_seqs: int | None = None
    """None: left to vLLM, and so not known."""
    slowed_by_neighbour: bool | None = None
    """Whether repeats beside another session on the host were slower than repeats alone, beyond noise."""
    flat: bool | None = None
    """Whether more load gives no more throughput: at or past the knee; None within noise of it."""

    @property
    def at_once(self) -> int:
        """Requests that may run at once: those in flight, or `max_num_seqs` where that is lower."""
        return min(self.concurrency, self.max_num_seqs or self.concurrency)

    @property
    def pool_is_full(self) -> bool:
        """Whether one more request would not fit."""
        if self.kv_usage is None:
            return False
        return self.kv_usage >= NEAR_FULL or self.kv_usage + (self.request_share or 0.0) > 1

    @property
    def waited_for_kv(self) -> bool | None:
        """Whether requests waited beside a full pool and never all that may ran at once; None where nothing tells.

        The signs are of different moments: requests may wait for a step that has room for their prompts while the pool
        is all but empty, and then all run in a full one. None of those lacked KV.
        """
        if not self.waiting:
            return None if self.waiting is None else False
        if self.running is None or self.kv_usage is None:
            return None
        return self.pool_is_full and self.running < self.at_once

    @property
    def held_back(self) -> bool:
        """Whether clearly fewer requests ever ran at once than were in flight, and others waited."""
        return bool(self.waiting) and self.running is not None and self.running < STUCK_BELOW * self.concurrency

    @property
    def queue_is_full(self) -> bool:
        """Whether more were in flight than `max_num_seqs` lets run, as many ran, and others waited."""
        return bool(self.waiting) and self.at_once < self.concurrency and (self.running or 0) >= self.at_once


def limit(signs: Signs) -> Limit:
    """Return the verdict on a level.

    In this order: the client (then nothing was measured); the KV pool (preemptions, or requests that wait for capacity
    while it is full, so that never all run at once); the queue (of more than `max_num_seqs` in flight as many run, and
    others wait); a neighbour; the computing (none of these, and throughput is flat). Requests that were held back while
    `max_num_seqs` is not known leave queue and computing open.

    KV-bound is said of the levels that the envelope calls preempted or waited for KV, and of no others.
    """
    if not signs.measured:
        return Limit.CLIENT if signs.client_limited else Limit.NOT_MEASURED
    if signs.preemptions or signs.waited_for_kv:
        return Limit.KV
    if signs.queue_is_full:
        return Limit.QUEUE
    if signs.slowed_by_neighbour:
        return Limit.NEIGHBOUR
    if signs.flat is None:
        return Limit.UNKNOWN
    if not signs.flat:
        return Limit.NOTHING
    if signs.preemptions is None or signs.waited_for_kv is None:
        return Limit.UNKNOWN
    return Limit.UNKNOWN if signs.held_back and signs.max_num_seqs is None else Limit.COMPUTE
