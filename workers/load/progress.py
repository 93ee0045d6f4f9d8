"""A load that somebody waits for at a terminal: how far it is, and an end to it where nothing answers.

Used by the command line alone: a session's levels end by their own rules.
"""

from __future__ import annotations

import asyncio
import math
import sys
import time

from workers.load.client import run_load
from workers.load.plan import LoadPlan, LoadResult
from workers.load.sent import Sent, row_of

LOOK_S = 1.0
HOPELESS = 3
"""So many requests in a row that ran into their time limit, and the rest is not waited for."""


class Hopeless(Exception):
    """The server takes a part's requests and answers none, or none any more."""

    def __init__(self, message: str, completed: int, failed: int) -> None:
        super().__init__(message)
        self.completed = completed
        self.failed = failed
        """Of the requests that had ended; those that were broken off are no failures of the server."""


class _Count:
    def __init__(self) -> None:
        self.ended: list[Sent] = []
        self.answered = 0
        self.unanswered = 0
        """Requests in a row that were sent after the last answer and ran into their time limit. Those already in flight
        then do not count: a busy server may be too late for several at once, and go on with the others."""
        self._answered_s = -math.inf

    def take(self, sent: Sent) -> None:
        self.ended.append(sent)
        if sent.error is None:
            self.answered += 1
            self.unanswered, self._answered_s = 0, sent.ended_s
        elif isinstance(sent.error, TimeoutError) and sent.answer.sent_s >= self._answered_s:
            self.unanswered += 1


async def run_watched(name: str, plan: LoadPlan, parts: dict[str, LoadResult]) -> None:
    """Run the part `name` and put its result into `parts`; say once a second how far it is where stderr is a terminal.

    Cancelled while a part that has ended is judged, it still keeps that one.

    Raises:
        Hopeless: `HOPELESS` requests in a row, sent after the last answer, ran into their time limit. Those in flight
            are broken off.
    """
    count, started_s = _Count(), time.monotonic()
    load = asyncio.ensure_future(run_load(plan, count.take))
    try:
        while not (await asyncio.wait({load}, timeout=LOOK_S))[0]:
            _show(f"{name}: {len(count.ended)} of {plan.num_requests} ended, {time.monotonic() - started_s:.0f} s")
            if count.unanswered >= HOPELESS:
                raise _hopeless(name, plan.timeout_s, count)
        load.result()  # raises what it has failed by
    finally:
        load.cancel()
        await asyncio.wait({load})
        _show("")
        if not load.cancelled() and load.exception() is None:
            parts[name] = load.result()


def _hopeless(name: str, timeout_s: float, count: _Count) -> Hopeless:
    to = f"the first {len(count.ended)} requests"
    if count.answered:
        to = f"{count.unanswered} requests in a row, after {count.answered} answers"
    completed = sum(row_of(sent, timeout_s, 0.0).ok for sent in count.ended)
    message = f"{name}: no whole answer within {timeout_s:g} s to {to}: given up"
    return Hopeless(message, completed, len(count.ended) - completed)


def _show(line: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{line:<60}", end="\r", file=sys.stderr, flush=True)
