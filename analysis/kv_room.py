"""What a level of load leaves of its server's KV pool, in bytes and in further requests of the same load. Pure.

From the row's own columns: the engine's pool, and the formula at the server's max_model_len.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from analysis.kv_fit import block_bytes, pool_bytes
from analysis.series import Reading


@dataclass(frozen=True, slots=True)
class KvRoom:
    """A server's pool and what requests of one length take of it at their full length, all cards together."""

    pool_bytes: float
    """Without the null block, which no request gets."""
    request_bytes: float
    """At most: exact where a token costs the same at every length."""
    requests: int
    """At once."""

    @property
    def held_bytes(self) -> float:
        """At most, all of them at their full length."""
        return self.requests * self.request_bytes

    @property
    def free_bytes(self) -> float:
        """At least; below zero where they need more than there is."""
        return self.pool_bytes - self.held_bytes

    @property
    def holds(self) -> int:
        """Requests that the pool holds at once, at least."""
        return int(self.pool_bytes // self.request_bytes)

    @property
    def further_requests(self) -> int:
        """How many more it holds, at least; below zero where it does not hold these."""
        return self.holds - self.requests


def kv_room(reading: Reading, tokens: float, requests: float) -> KvRoom | None:
    """Return the room beside so many requests of so many tokens; None where engine or formula said too little."""
    pool, block, one = pool_bytes(reading), block_bytes(reading), request_bytes(reading, tokens)
    if pool is None or not one or requests < 1:
        return None
    return KvRoom(pool - (block or 0.0), one, math.ceil(requests))


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
