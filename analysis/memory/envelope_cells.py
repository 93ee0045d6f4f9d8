"""A cell of the envelope: so many requests at once that each grow from a prompt to a length. Pure.

Used by the page's cells (`envelope_grid`) and by the search that measures cells (`orchestrator.search.envelope`).
"""

from __future__ import annotations

from enum import StrEnum

from analysis.load.verdicts import Signs
from analysis.memory.kv_envelope import Outcome, outcome_of
from contract.kv import KVLayout
from contract.rows import MEASURED, PointRow


class Expected(StrEnum):
    """What KV arithmetic says of a cell. Its words are not those of `kv_envelope.Fit`, which keeps headroom."""

    FITS = "all fit"  # all requests at their full length at once
    OPEN = "may not all fit"  # not all, where prompts are computed beside full ones: their tokens outside of windows
    PREEMPTS = "preempts"  # all prompts fit, but not what they grow to
    WAITS = "prompts do not fit"  # not all of them at once: some requests wait until others are done
    UNKNOWN = "not known"


def expected(layout: KVLayout | None, requests: int, prompt: int, length: int, pool_blocks: int | None) -> Expected:
    """Return what the arithmetic says of `requests` that grow from `prompt` to `length` tokens.

    `pool_blocks` are those that requests may have: the engine's count less one, the null block.
    """
    if layout is None or pool_blocks is None:
        return Expected.UNKNOWN
    if layout.blocks_at_once(requests, length, prompt) <= pool_blocks:
        return Expected.FITS
    if requests * layout.blocks_grown(length) <= pool_blocks:
        return Expected.OPEN
    return Expected.PREEMPTS if requests * layout.blocks_grown(prompt) <= pool_blocks else Expected.WAITS


def outcome(row: PointRow, request_share: float | None) -> Outcome:
    """Return what the server's metrics showed of the KV pool in a cell, by the rule of `analysis.memory.kv_envelope`.

    `request_share` is the share of the pool that one request needs.
    """
    if row.status != MEASURED:
        return Outcome.UNKNOWN
    waiting = row.waiting_max if row.waiting_capacity_max is None else row.waiting_capacity_max
    return outcome_of(
        Signs(
            concurrency=row.concurrency or 0,
            preemptions=row.preemptions,
            waiting=waiting,
            running=row.running_max,
            kv_usage=row.kv_usage_max,
            request_share=request_share,
        )
    )
