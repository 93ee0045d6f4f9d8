"""A session told to start warm: on the stand-in server, forked by a real warm parent."""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from contract.rows import MEASURED, SessionRow
from contract.specs import SessionSpec, Start
from tests.test_session import MEMORY, spec, together
from workers import processes
from workers.engines.base import Address
from workers.engines.sim import SimEngine
from workers.launch.warm import WarmParent, parent_for
from workers.session import Session

ROOT = str(Path(__file__).resolve().parent.parent)
MODULE = "tests.standin_stuck"


class ForkableSim(SimEngine):
    """The stand-in as a module, which is what can be forked."""

    warm_modules = (MODULE,)

    def command(self, spec: SessionSpec, model: str, address: Address) -> list[str]:
        return [sys.executable, "-m", MODULE, *super().command(spec, model, address)[2:]]

    def environment(self, spec: SessionSpec, address: Address) -> dict[str, str]:
        return super().environment(spec, address) | {"PYTHONPATH": ROOT}

    def silence_limit_s(self, lines: Sequence[tuple[float, str]]) -> float:
        return 1.0


@pytest.fixture
def parent(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], WarmParent]]:
    monkeypatch.setattr("workers.session.make_engine", lambda name: ForkableSim())
    made: list[WarmParent] = []

    def start() -> WarmParent:
        monkeypatch.delenv("PYTEST_CURRENT_TEST", raising=False)  # it changes while a test runs
        made.append(parent_for(ForkableSim(), spec(), None))
        return made[-1]

    yield start
    for one in made:
        one.close()


def started(parent: WarmParent | None, monkeypatch: pytest.MonkeyPatch, **extra_args: object) -> tuple[SessionRow, str]:
    monkeypatch.delenv("PYTEST_CURRENT_TEST", raising=False)
    asked = replace(spec(**extra_args), start=Start.WARM)
    session = Session(asked, "run", 1, ["3"], together, warm_parent=parent.socket if parent else None)
    row = session.start()
    if row.status == MEASURED:
        assert session.measure(MEMORY).status == MEASURED
    end = session.stop()
    assert not processes.is_running(row.server_pid or 0)
    return row, end.log


def test_a_warm_start_is_measured_like_any_other(
    parent: Callable[[], WarmParent], monkeypatch: pytest.MonkeyPatch
) -> None:
    row, log = started(parent(), monkeypatch)
    assert (row.status, row.start, row.start_reason) == (MEASURED, "warm", None)
    assert row.warm_wait_s is not None
    assert row.argv[:3] == ["python", "-m", MODULE]
    assert log.startswith("warm start: forked from a process that had imported")


@pytest.mark.parametrize(
    ("stuck", "words"), [("hang", "no word from it for 1 s"), ("end", "a lock that another thread held")]
)
def test_a_fork_that_comes_to_nothing_is_started_cold_once_and_says_why(
    stuck: str, words: str, parent: Callable[[], WarmParent], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUCK", stuck)
    row, log = started(parent(), monkeypatch)
    assert (row.status, row.start) == (MEASURED, "cold")
    assert words in (row.start_reason or "") + log
    assert "forked, it did not start" in (row.start_reason or "")
    assert log.count("warm start: forked") == 1


def test_a_failure_of_the_configuration_is_not_tried_again(
    parent: Callable[[], WarmParent], monkeypatch: pytest.MonkeyPatch
) -> None:
    row, _ = started(parent(), monkeypatch, fail="No available memory for the cache blocks.")
    assert (row.failure_class, row.start) == ("kv_too_small", "warm")


def test_another_environment_than_the_parents_starts_cold(
    parent: Callable[[], WarmParent], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = parent()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    row, _ = started(made, monkeypatch)
    assert (row.status, row.start) == (MEASURED, "cold")
    assert row.start_reason == "its environment is not the one that was imported in: HF_HUB_OFFLINE"


def test_without_a_warm_parent_a_server_starts_cold(
    parent: Callable[[], WarmParent], monkeypatch: pytest.MonkeyPatch
) -> None:
    row, _ = started(None, monkeypatch)
    assert (row.status, row.start, row.start_reason) == (MEASURED, "cold", "this node has no warm parent")
    dead = parent()
    dead._process.kill()
    dead._process.wait()
    row, _ = started(dead, monkeypatch)
    assert (row.status, row.start) == (MEASURED, "cold")
    assert (row.start_reason or "").startswith("no warm parent answers")
