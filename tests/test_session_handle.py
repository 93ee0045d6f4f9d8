"""The driver's hold on a session's actor that is given up as it is made, by an interrupt: on one that only pretends."""

import asyncio
import contextlib
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.cluster import handle
from orchestrator.cluster.handle import SessionHandle


class BeingMade:
    """An actor that does not answer yet. Its `stop` ends, or does not, and is told."""

    def __init__(self, stops: bool) -> None:
        self.asked: list[str] = []
        self.was_asked = asyncio.Event()
        self._stops = stops
        self.ping = SimpleNamespace(remote=self._pinged)
        self.stop = SimpleNamespace(remote=self._stopped)

    def _pinged(self) -> "asyncio.Future[None]":
        return asyncio.get_running_loop().create_future()

    def _stopped(self) -> "asyncio.Future[None]":
        self.asked.append("stop")
        self.was_asked.set()
        ended = asyncio.get_running_loop().create_future()
        if self._stops:
            ended.set_result(None)
        return ended


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    import ray

    killed: list[Any] = []
    monkeypatch.setattr(ray, "kill", killed.append)
    return killed


def cancelled(actor: BeingMade, again: bool = False) -> None:
    async def cancel() -> None:
        making = asyncio.ensure_future(SessionHandle(actor, lambda: None, lambda row: None).alive())
        await asyncio.sleep(0)
        making.cancel()
        if again:
            await actor.was_asked.wait()
            making.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await making
        assert making.cancelled()

    asyncio.run(cancel())


def test_an_actor_that_is_given_up_as_it_is_made_ends_itself_before_it_is_killed(killed: list[Any]) -> None:
    """Killed at once it would leave its directory on its node, and nobody looks after an interrupted run."""
    actor = BeingMade(stops=True)
    cancelled(actor)
    assert (actor.asked, killed) == (["stop"], [actor])


@pytest.mark.parametrize("limit_s", [0.01, 60.0])
def test_one_that_does_not_come_is_killed_in_the_end_and_at_a_second_interrupt_at_once(
    limit_s: float, killed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handle, "UNMADE_LIMIT_S", limit_s)
    actor = BeingMade(stops=False)
    cancelled(actor, again=limit_s > 1)
    assert actor.asked == ["stop"]
    assert killed[0] is actor
