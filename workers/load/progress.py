"""A load that somebody waits for at a terminal: how far it is, and an end to it where nothing answers.

Used by the command line alone: a session's levels end by their own rules.
"""

from __future__ import annotations

import asyncio
import sys
import time

from workers.load.client import run_load
from workers.load.plan import LoadPlan, LoadResult
from workers.load.sent import Sent

LOOK_S = 1.0
HOPELESS = 3
"""So many requests that ran into their time limit, before any was answered, and the rest is not waited for."""


class Hopeless(Exception):
    """The server takes a part's requests and answers none."""

    def __init__(self, message: str, failed: int) -> None:
        super().__init__(message)
        self.failed = failed
        """Requests that had ended; those that were broken off are no failures of the server."""


class _Count:
    def __init__(self) -> None:
        self.ended = self.answered = self.timed_out = 0

    def take(self, sent: Sent) -> None:
        self.ended += 1
        self.answered += sent.error is None
        self.timed_out += isinstance(sent.error, TimeoutError)


async def run_watched(name: str, plan: LoadPlan) -> LoadResult:
    """Run the part `name`, and say once a second how far it is where stderr is a terminal.

    Raises:
        Hopeless: its first requests all ran into their time limit. Those in flight are broken off.
    """
    count, started_s = _Count(), time.monotonic()
    load = asyncio.ensure_future(run_load(plan, count.take))
    try:
        while not (await asyncio.wait({load}, timeout=LOOK_S))[0]:
            _show(f"{name}: {count.ended} of {plan.num_requests} ended, {time.monotonic() - started_s:.0f} s")
            if not count.answered and count.timed_out >= HOPELESS:
                what = f"no whole answer within {plan.timeout_s:g} s to the first {count.ended} requests"
                raise Hopeless(f"{name}: {what}: given up", count.ended)
        return load.result()
    finally:
        load.cancel()
        await asyncio.wait({load})
        _show("")


def _show(line: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{line:<60}", end="\r", file=sys.stderr, flush=True)
