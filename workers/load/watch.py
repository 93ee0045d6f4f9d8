"""What a load process itself did in a window: its share of a core, how late its event loop woke up, what it had in
flight.

Used by `workers.load.client`. By these figures `workers.load.limits` tells whether the client was the limit.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from contract.rows import ClientRow, InFlight
from workers.load.stalls import SHORTEST_S, TICK_S, Stall
from workers.load.summary import percentile

TICKS_KEPT = 10
"""Of so many counts of what is in flight, one is kept."""


class Watch:
    """What the client itself did in a window, from its making to `stop`.

    `in_flight` counts the requests that are under way at the moment. The window opened at `started_s` on
    `time.monotonic()`, which this process may have come late to; where it is not given, it opens now.
    """

    def __init__(self, in_flight: Callable[[], int], started_s: float | None = None) -> None:
        self.stalls: list[Stall] = []
        self._count = in_flight
        self._lags: list[float] = []
        self._in_flight: list[InFlight] = []
        self._held_s = 0.0
        self._ticking = asyncio.ensure_future(self._tick())
        self._waited_s = _cpu_wait_s()
        self._cpu_s = time.thread_time()
        wall_s, self._from_s = time.time(), time.monotonic()
        self.started_s = self._from_s if started_s is None else started_s
        self.started_wall_s = wall_s - (self._from_s - self.started_s)

    async def _tick(self) -> None:
        before_s = self._from_s
        while True:
            due_s = time.monotonic() + TICK_S
            await asyncio.sleep(TICK_S)
            now_s, count = time.monotonic(), self._count()
            lag_s = max(now_s - due_s, 0.0)
            if lag_s > SHORTEST_S:
                self.stalls.append(Stall(now_s - self.started_s, lag_s))
            if len(self._lags) % TICKS_KEPT == 0:
                self._in_flight.append(InFlight(now_s - self.started_s, count))
            self._lags.append(lag_s)
            self._held_s += count * (now_s - before_s)
            before_s = now_s

    def stop(self, streams: int, duration_s: float) -> ClientRow:
        """Return the row of this process, but for what is known of its requests alone."""
        self._ticking.cancel()
        cpu_s, waited_s = time.thread_time() - self._cpu_s, _cpu_wait_s()
        waited = None if waited_s is None or self._waited_s is None else waited_s - self._waited_s
        return ClientRow(
            streams,
            cpu_share=cpu_s / duration_s,
            wait_share=None if waited is None else waited / duration_s,
            lag_p99_s=percentile(self._lags, 99),
            lag_max_s=max(self._lags, default=None),
            late_share=sum(self._lags) / duration_s,
            held_s=self._held_s,
            in_flight=self._in_flight,
        )


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Keep the garbage collector out of a measured window: a full collection stops every stream for its time."""
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def _cpu_wait_s() -> float | None:
    """Time that this thread has waited on a run queue (second field of schedstat, in ns; Linux, sched-stats)."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return None
