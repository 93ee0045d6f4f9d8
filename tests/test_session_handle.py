"""The driver's hold on a session's actor that is given up as it is made, by an interrupt: on one that only pretends."""

import asyncio
import contextlib
from types import SimpleNamespace

import pytest

from orchestrator.cluster import handle
from orchestrator.cluster.handle import SessionHandle


class BeingMade:
    """An actor that does not answer yet. Its `stop` ends, or does not, and is told."""

    def __init__(self, stops: bool) -> None:
        self.had: list[str] = []
        """What was done to it, in order."""
        self.answer: asyncio.Future[None] | None = None
        self.was_asked = asyncio.Event()
        self._stops = stops
        self.ping = SimpleNamespace(remote=self._pinged)
        self.stop = SimpleNamespace(remote=self._stopped)

    def _pinged(self) -> "asyncio.Future[None]":
        self.answer = asyncio.get_running_loop().create_future()
        return self.answer

    def _stopped(self) -> "asyncio.Future[None]":
        self.had.append("stop")
        self.was_asked.set()
        ended = asyncio.get_running_loop().create_future()
        if self._stops:
            ended.set_result(None)
        return ended


@pytest.fixture(autouse=True)
def kills(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray, "kill", lambda actor: actor.had.append("kill"))


async def given_up(actor: BeingMade, again: bool = False, answers: bool = False) -> None:
    making = asyncio.ensure_future(SessionHandle(actor, lambda: None, lambda row: None).alive())
    await asyncio.sleep(0)
    if answers:
        assert actor.answer is not None
        actor.answer.set_result(None)
    making.cancel()
    if again:
        await actor.was_asked.wait()
        making.cancel()
    async with asyncio.timeout(5):
        with contextlib.suppress(asyncio.CancelledError):
            await making
    assert making.cancelled()


def test_an_actor_that_is_given_up_as_it_is_made_ends_itself_before_it_is_killed() -> None:
    """Killed at once it would leave its directory on its node, and nobody looks after an interrupted run."""
    actor = BeingMade(stops=True)
    asyncio.run(given_up(actor))
    assert actor.had == ["stop", "kill"]


def test_an_interrupt_that_comes_with_its_answer_is_not_lost() -> None:
    actor = BeingMade(stops=True)
    asyncio.run(given_up(actor, answers=True))
    assert actor.had == ["stop", "kill"]


@pytest.mark.parametrize("again", [False, True])
def test_one_that_does_not_come_is_killed_in_the_end_and_at_a_second_interrupt_at_once(
    again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handle, "UNMADE_LIMIT_S", 60.0 if again else 0.01)
    actor = BeingMade(stops=False)
    asyncio.run(given_up(actor, again))
    assert actor.had[:2] == ["stop", "kill"]
