"""What a cell of the envelope showed, and what KV arithmetic says of it. Pure.

A cell is a number of requests at once that each grow from a prompt to a length. Used by the page and by the search
(`orchestrator.search.envelope`).
"""

from __future__ import annotations

from enum import StrEnum

from analysis.verdicts import Signs
from contract.rows import MEASURED, PointRow


class Outcome(StrEnum):
    """What the KV pool makes of a cell."""

    FITS = "fits"  # all requests at their full length at once
    PREEMPTS = "preempts"  # all prompts fit, but not what they grow to
    WAITS = "does not fit"  # not even all prompts fit: some requests wait until others are done
    UNKNOWN = "not known"


def expected(
    concurrency: int, request_blocks: int | None, prompt_blocks: int | None, pool_blocks: int | None
) -> Outcome:
    """Return what the arithmetic says: `pool_blocks` are those that sequences may have (one, the null block, less)."""
    if not request_blocks or not prompt_blocks or pool_blocks is None:
        return Outcome.UNKNOWN
    if concurrency * request_blocks <= pool_blocks:
        return Outcome.FITS
    return Outcome.PREEMPTS if concurrency * prompt_blocks <= pool_blocks else Outcome.WAITS


def outcome(row: PointRow) -> Outcome:
    """Return what a measured cell showed.

    Preemptions are the server's counter over the window; requests were held back by the pool where clearly fewer ever
    ran than were sent while others waited and the pool was full (`analysis.verdicts`).
    """
    if row.status != MEASURED or row.preemptions is None:
        return Outcome.UNKNOWN
    if row.preemptions:
        return Outcome.PREEMPTS
    signs = Signs(
        concurrency=row.concurrency or 0,
        waiting=row.waiting_max,
        running=row.running_max,
        kv_usage=row.kv_usage_max,
        request_share=row.request_blocks / row.engine_num_blocks
        if row.request_blocks and row.engine_num_blocks
        else None,
    )
    return Outcome.WAITS if signs.held_back and signs.pool_is_full else Outcome.FITS
