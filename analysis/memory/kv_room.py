"""What a level of load leaves of its server's KV pool, in bytes and in further requests of the same load. Pure.

From the engine's pool and the page function; without one, from the formula's columns of the row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from analysis.memory.kv_fit import block_bytes, pool_bytes
from analysis.memory.kv_pages import Pages
from analysis.rows.series import Reading


@dataclass(frozen=True, slots=True)
class KvRoom:
    """A server's pool and what so many requests of one length take of it at their full length, all cards together."""

    pool_bytes: float
    """Without the null block, which no request gets."""
    requests: int
    """At once."""
    held_bytes: float
    """At most."""
    holds: int
    """Requests of that length that the pool holds at once, at least."""

    @property
    def free_bytes(self) -> float:
        """At least; below zero where they need more than there is."""
        return self.pool_bytes - self.held_bytes

    @property
    def request_share(self) -> float:
        """Of the pool that each of the requests needs at its full length, what is in flight shared by all."""
        return self.held_bytes / self.requests / self.pool_bytes if self.pool_bytes > 0 else math.inf

    @property
    def further_requests(self) -> int:
        """How many more it holds, at least; below zero where it does not hold these."""
        return self.holds - self.requests


def kv_room(reading: Reading, tokens: int, requests: float, pages: Pages | None) -> KvRoom | None:
    """Return the room beside so many requests of so many tokens; None where engine or formula said too little."""
    pool, n = pool_bytes(reading), math.ceil(requests)
    if pool is None or n < 1 or tokens < 1:
        return None
    pool -= block_bytes(reading) or 0.0
    if pages is not None:
        return KvRoom(pool, n, pages.at_once_bytes(n, tokens), int(pages.requests(pool, tokens)))
    one = request_bytes(reading, tokens)
    return None if not one else KvRoom(pool, n, n * one, int(pool // one))


def request_bytes(reading: Reading, tokens: float) -> float | None:
    """Return what a request of `tokens` takes at most, from the formula at the server's max_model_len L.

    bytes(L) + (whole blocks from L to `tokens`) * block * (marginal bytes per token at L). The cost of a further token
    never rises with the length (a window stops growing, a state is constant), so this is not below the formula at
    `tokens` itself, and equal to it where there is one rate.
    """
    sample = reading.measured[0]
    whole, marginal = reading.median("formula_bytes_per_sequence"), reading.median("formula_bytes_per_token")
    block = reading.median("engine_block_size")
    if whole is None or marginal is None or not block or tokens < 1:
        return None
    blocks = math.ceil(tokens / block) - math.ceil(sample.max_model_len / block)
    return whole + blocks * block * marginal
