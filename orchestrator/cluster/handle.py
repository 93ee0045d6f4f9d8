"""The driver's hold on a session's actor."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

from contract.rows import MEASURED, PointRow, SessionEnd, SessionRow
from contract.specs import Point
from orchestrator.cluster.errors import ActorLost, NoCards, result
from workers.lease import RENEWED_EVERY_S

ACTOR_LIMIT_S = 180.0
"""For a session's actor to come to life: its cards are ours by the queue, but another job may hold them."""

UNMADE_LIMIT_S = 1.5
"""For an actor that is given up as it is made; one that waits for cards takes all of it. `ray job stop` gives a driver
three seconds."""


class SessionHandle:
    """The driver's hold on one session actor. Every verb raises `ActorLost` when the actor is gone."""

    def __init__(self, actor: Any, came_to_nothing: Callable[[], None], started: Callable[[SessionRow], None]) -> None:
        """`came_to_nothing` is called where the session ends and has had no server that was ready, `started` with what
        its start has come to."""
        self._actor = actor
        self._came_to_nothing = came_to_nothing
        self._started = started
        self._served = False
        self._renewing: asyncio.Future[None] | None = None

    async def alive(self) -> None:
        """Wait until the actor answers. Raises `NoCards` where its cards do not become free."""
        late = NoCards(f"no actor after {ACTOR_LIMIT_S:.0f} s: does another job hold the node's GPUs?")
        try:
            async with asyncio.timeout(ACTOR_LIMIT_S):  # `wait_for` may swallow a cancellation (Python 3.11)
                await result(self._actor.ping.remote())
        except asyncio.CancelledError:
            await self._unmake()
            raise
        except TimeoutError:
            self.kill()
            raise late from None
        except BaseException:
            self.kill()
            raise
        self._renewing = asyncio.ensure_future(_renew(self._actor))

    async def _unmake(self) -> None:
        """Let an actor that is being made remove what it has begun with: killed, it leaves that for a later run."""
        try:
            await self.stop(UNMADE_LIMIT_S)
        except Exception:
            self.kill()

    async def start(self) -> SessionRow:
        """Start the server."""
        row: SessionRow = await result(self._actor.start.remote())
        self._served = row.status == MEASURED
        self._started(row)
        return row

    async def measure(self, point: Point) -> PointRow:
        """Measure one point."""
        row: PointRow = await result(self._actor.measure.remote(point))
        return row

    async def settle(self) -> None:
        """Close the account of the server's memory; only `stop` may follow."""
        await result(self._actor.settle.remote())

    def hurry(self) -> None:
        """Have the server down in two seconds: `stop` is under way, or comes."""
        with contextlib.suppress(Exception):
            self._actor.hurry.remote()

    async def stop(self, limit_s: float, keep_cards: bool = False) -> SessionEnd:
        """Stop the server and end the actor, whatever else it is doing; with `keep_cards` `kill` has to end it.

        Until then Ray gives its cards to nobody.
        """
        late = ActorLost(f"the session did not stop within {limit_s:.0f} s")
        end: SessionEnd = await self._or_kill(self._actor.stop.remote(), limit_s, late)
        if keep_cards:
            self._ended()
        else:
            self.kill()
        return end

    async def _or_kill(self, verb: Any, limit_s: float, late: ActorLost) -> Any:
        """Await a verb's result. Where there is none the actor is killed; raises `late` where none came in time."""
        try:
            async with asyncio.timeout(limit_s):
                return await result(verb)
        except TimeoutError:
            self.kill()
            raise late from None
        except BaseException:
            self.kill()
            raise

    def kill(self) -> None:
        """End the actor at once; the guard ends what it started."""
        import ray

        self._ended()
        if self._renewing is not None:
            self._renewing.cancel()
        with contextlib.suppress(Exception):
            ray.kill(self._actor)

    def _ended(self) -> None:
        if not self._served:
            self._served = True
            self._came_to_nothing()


async def _renew(actor: Any) -> None:
    """Renew an actor's lease until cancelled."""
    while True:
        with contextlib.suppress(ActorLost):  # for its caller to find out
            await result(actor.ping.remote())
        await asyncio.sleep(RENEWED_EVERY_S)
