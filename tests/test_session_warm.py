"""A session told to start warm: on the stand-in server, forked by a real warm parent."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import psutil
import pytest

from contract.failures import FailureClass
from contract.rows import FAILED, MEASURED, Failure, SessionRow
from contract.specs import SessionSpec, Start, Timeouts
from tests.chaos.hurt import Disk, Hurting
from tests.chaos.schedule import Role
from tests.test_session import MEMORY, MIB, spec, together
from workers import processes
from workers.devices.sim import SimDevice
from workers.engines.base import Address
from workers.engines.sim import SimEngine
from workers.engines.vllm import VllmEngine
from workers.launch import readiness
from workers.launch.process import ServerProcess
from workers.launch.warm import WarmParent, parent_for
from workers.load.plan import LoadPlan
from workers.session import FIRST_COMPLETION_LIMIT_S, Session

ROOT = str(Path(__file__).resolve().parent.parent)
MODULE = "tests.standin_stuck"


class ForkableSim(SimEngine):
    """The stand-in as a module, which is what can be forked."""

    warm_modules = (MODULE,)

    def command(self, spec: SessionSpec, model: str, address: Address) -> list[str]:
        return [sys.executable, "-m", MODULE, *super().command(spec, model, address)[2:]]

    def environment(self, spec: SessionSpec, address: Address) -> dict[str, str]:
        return super().environment(spec, address) | {"PYTHONPATH": ROOT}

    def silence_limit_s(self, spec: SessionSpec, lines: Sequence[tuple[float, str]], forked: bool) -> float:
        return 1.0 if forked else 60.0

    def is_waiting(self, line: str) -> bool:
        return VllmEngine().is_waiting(line)


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


def started(
    parent: WarmParent | None,
    monkeypatch: pytest.MonkeyPatch,
    again: bool = False,
    cards: tuple[str, ...] = ("3",),
    timeouts: Timeouts | None = None,
    **extra_args: object,
) -> tuple[SessionRow, str]:
    monkeypatch.delenv("PYTEST_CURRENT_TEST", raising=False)
    plain = spec(**extra_args)
    asked = replace(plain, start=Start.WARM, gpus=len(cards), timeouts=timeouts or plain.timeouts)
    socket = parent.socket if parent else None
    session = Session(asked, "run", 2, list(cards), together, warm_parent=socket, again=again)
    row = session.start()
    if row.status == MEASURED:
        point = session.measure(MEMORY)
        assert (point.status, point.start) == (MEASURED, row.start)
    end = session.stop()
    assert not processes.is_running(row.server_pid or 0)
    return row, end.log


def test_a_warm_start_is_measured_like_any_other(
    parent: Callable[[], WarmParent], monkeypatch: pytest.MonkeyPatch
) -> None:
    row, log = started(parent(), monkeypatch)
    assert (row.status, row.start, row.start_reason) == (MEASURED, "warm", None)
    assert row.warm_wait_s is not None
    assert row.fork_lost_s is None
    assert row.argv[:3] == ["python", "-m", MODULE]
    assert log.startswith("warm start: forked from a process that had imported")


def test_the_harness_that_kills_tells_a_warm_parent_from_its_forks(
    parent: Callable[[], WarmParent], tmp_path: Path
) -> None:
    """A forked server and its guard have its command line, and it is nobody's child."""
    made = parent()
    session = Session(replace(spec(), start=Start.WARM), "run", 1, ["3"], together, warm_parent=made.socket)
    try:
        assert session.start().start == "warm"
        here = [psutil.Process(pid) for pid in (made.pid, session.process.guard_pid, session.process.pid)]
        assert all("warm_parent.py" in " ".join(process.cmdline()) for process in here)
        hurting = Hurting(tmp_path, Disk(tmp_path), cast("Any", None), lambda: here)
        assert hurting._of(Role.WARM_PARENT) == here[:1]
    finally:
        session.stop()


def cold(monkeypatch: pytest.MonkeyPatch, starts_as: str, silence_s: float, **timeouts: float) -> Session:
    monkeypatch.setattr("workers.session.make_engine", lambda name: ForkableSim())
    monkeypatch.setattr(ForkableSim, "silence_limit_s", lambda *_: silence_s)
    monkeypatch.setenv("STARTS_AS", starts_as)
    asked = spec()
    return Session(replace(asked, timeouts=replace(asked.timeouts, **timeouts)), "run", 1, ["3"], together)


def test_a_cold_start_that_says_nothing_is_stalled(monkeypatch: pytest.MonkeyPatch) -> None:
    session = cold(monkeypatch, "silent", 0.5, ready_s=600)
    row = session.start()
    assert (row.status, row.failure_class) == (FAILED, FailureClass.NO_PROGRESS)
    assert "no word from it" in (row.failure_message or "")
    session.stop()
    assert not processes.is_running(row.server_pid or 0)


def test_a_start_that_takes_long_and_goes_on_is_not_stalled(monkeypatch: pytest.MonkeyPatch) -> None:
    session = cold(monkeypatch, "slow", 2.5)
    row = session.start()
    session.stop()
    assert row.status == MEASURED, row.failure_message
    assert (row.ready_s or 0) > 2.5


def test_a_start_that_goes_on_for_ever_ends_at_the_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    session = cold(monkeypatch, "stubborn", 600.0, ready_s=0.5)
    assert session.start().failure_class == FailureClass.READY_TIMEOUT
    session.stop()


@pytest.mark.parametrize("hurried", [False, True])
def test_a_server_that_is_still_starting_is_not_given_its_grace(hurried: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    session = cold(monkeypatch, "stubborn", 600.0, ready_s=600, stop_grace_s=600.0)
    thread = threading.Thread(target=session.start)
    thread.start()
    while session._process is None or "starting" not in session._process.log_text():
        time.sleep(0.01)
    if hurried:
        session.hurry()
    end = session.stop()  # it would wait for ten minutes
    thread.join(30)
    assert end.row.exit_code == -signal.SIGKILL
    assert end.row.failure_class in (FailureClass.STOPPED, FailureClass.START_FAILED)
    assert not session._workspace.root.exists()


@pytest.mark.parametrize(
    ("stuck", "words"),
    [
        ("hang", "no word from it for 1 s"),
        ("waits", "no word from it for 1 s"),
        ("end", "a lock that another thread held"),
        ("thread", "forked beside Python threads: of a plugin"),
        ("late", "forked beside Python threads: of a plugin"),
        ("gate", "the first completion failed"),
    ],
)
def test_a_fork_that_comes_to_nothing_is_started_cold_once_and_says_why(
    stuck: str, words: str, parent: Callable[[], WarmParent], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUCK", stuck)
    row, log = started(parent(), monkeypatch)
    assert (row.status, row.start) == (MEASURED, "cold")
    assert words in (row.start_reason or "") + log
    assert row.fork_came_to_nothing
    assert (row.fork_lost_s or 0.0) > (1.0 if "1 s" in words else 0.0)  # its silence, which `ready_s` does not hold
    assert log.count("warm start: forked from") == 1
    assert [account.moment for account in row.account] == ["ready", "loaded"]  # the cold server's alone


def test_a_fork_that_goes_on_for_ever_is_started_cold_at_the_cap(
    parent: Callable[[], WarmParent], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUCK", "talks")
    row, _ = started(parent(), monkeypatch, timeouts=Timeouts(5.0, 2.0, 2.0, 10.0))
    assert (row.status, row.start) == (MEASURED, "cold")
    assert row.start_reason == "forked, it came to nothing: not ready after 5 s"


def reading_weights(monkeypatch: pytest.MonkeyPatch, stuck: str) -> None:
    monkeypatch.setenv("STUCK", stuck)
    monkeypatch.setattr(ForkableSim, "reads_weights", lambda *_: True)
    monkeypatch.setattr("workers.launch.watch.LOOK_EVERY_S", 0.2)


def test_a_fork_that_reads_weights_until_the_cap_is_not_tried_again_cold(
    parent: Callable[[], WarmParent], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is silent for longer than it may be otherwise, and the disk is no faster for a cold one."""
    reading_weights(monkeypatch, "reads")
    row, log = started(parent(), monkeypatch, timeouts=Timeouts(5.0, 2.0, 2.0, 10.0))
    assert (row.failure_class, row.start, row.start_reason) == (FailureClass.READY_TIMEOUT, "warm", None)
    assert log.count("\n") == 1


@pytest.mark.parametrize(("stuck", "words"), [("hang", "no word from it for 1 s"), ("works", "not ready after 5 s")])
def test_a_fork_that_reads_nothing_where_it_should_read_weights_is_started_cold(
    stuck: str, words: str, parent: Callable[[], WarmParent], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once where it does nothing; one that computes may be making something of them, or hang in a loop."""
    reading_weights(monkeypatch, stuck)
    row, _ = started(parent(), monkeypatch, timeouts=Timeouts(5.0, 2.0, 2.0, 10.0))
    assert (row.status, row.start) == (MEASURED, "cold")
    assert row.start_reason == f"forked, it came to nothing: {words}"


def test_the_first_completion_has_a_limit_of_its_own_and_a_fork_one_that_is_shorter(
    parent: Callable[[], WarmParent], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUCK", "mute")
    assert FIRST_COMPLETION_LIMIT_S[Start.WARM] < FIRST_COMPLETION_LIMIT_S[Start.COLD]
    monkeypatch.setitem(FIRST_COMPLETION_LIMIT_S, Start.WARM, 0.5)
    row, _ = started(parent(), monkeypatch)
    assert (row.status, row.start) == (MEASURED, "cold")
    assert "the first completion failed: no end within 0.5 s" in (row.start_reason or "")


def test_the_first_completion_of_a_cold_server_waits_longer_than_requests_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels may be compiled for it, once; the limit of a request is the user's, for what is measured."""
    plans: list[LoadPlan] = []
    monkeypatch.setattr(Session, "_send", lambda _self, plan, _processes: plans.append(plan) or together([plan])[0])
    session = Session(spec(), "run", 1, ["3"], together)
    assert session.start().status == MEASURED
    session.stop()
    assert [plan.timeout_s for plan in plans] == [FIRST_COMPLETION_LIMIT_S[Start.COLD]]


def test_another_start_of_a_session_that_came_to_nothing_is_cold(
    parent: Callable[[], WarmParent], monkeypatch: pytest.MonkeyPatch
) -> None:
    row, _ = started(parent(), monkeypatch, again=True)
    assert (row.status, row.start) == (MEASURED, "cold")
    assert row.start_reason == "an earlier start of this session came to nothing"


def test_a_failure_of_the_configuration_is_not_tried_again(
    parent: Callable[[], WarmParent], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "ValueError: User-specified max_model_len (8192) is greater than the derived max_model_len (4096)"
    row, _ = started(parent(), monkeypatch, fail=words)
    assert (row.failure_class, row.start) == ("length_above_model", "warm")


@pytest.mark.parametrize(
    ("words", "failure_class"),
    [
        ("No available memory for the cache blocks.", "kv_too_small"),
        ("The KV cache needed is larger than the available KV cache memory (1.0 GiB).", "kv_too_small"),
        ("Free memory on device cuda:0 (1/80 GiB) is less than desired GPU memory utilization", "free_memory_low"),
        ("Error in memory profiling. Initial free memory 1, current free memory 2.", "memory_profile"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried", "out_of_memory"),
        ("File gpu_model_runner.py, in capture_model\nCUDA out of memory. Tried", "graph_memory"),
    ],
)
def test_a_card_that_seems_to_be_anothers_is_looked_at_once_more_by_a_cold_server(
    words: str, failure_class: str, parent: Callable[[], WarmParent], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fork may have been on another card than its own."""
    row, _ = started(parent(), monkeypatch, fail=words)
    assert (row.failure_class, row.start) == (failure_class, "cold")
    assert words.splitlines()[-1].removeprefix("torch.") in (row.start_reason or "")


class OtherCards(SimDevice):
    """Cards of a driver that keeps its first reading of CUDA_VISIBLE_DEVICES: what was forked is on the first."""

    def memory_by_card(self, pid: int | None) -> list[int]:
        used = super().memory_by_card(pid)
        if pid is None or "warm_parent.py" not in command_line(pid):
            return used
        return [of if card.id == "SIM-0" else MIB for of, card in zip(used, self.cards, strict=True)]


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


@pytest.mark.parametrize(("cards", "start"), [(("0",), "warm"), (("3",), "cold"), (("0", "3"), "cold")])
def test_a_fork_that_is_not_on_all_of_its_cards_is_started_cold(
    cards: tuple[str, ...], start: str, parent: Callable[[], WarmParent], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "workers.session.open_device", lambda _kind, visible, workspace: OtherCards(visible, workspace.sim_state)
    )
    row, log = started(parent(), monkeypatch, cards=cards)
    assert (row.status, row.start) == (MEASURED, start)
    assert "warm start: forked from" in log
    reason = "ready, but SIM-3 has grown by 1 MiB and holds no KV pool of 64 MiB: it is elsewhere"
    assert row.start_reason == (None if start == "warm" else f"forked, it came to nothing: {reason}")


def test_a_fork_that_came_to_nothing_leaves_no_figures_to_a_cold_start_that_fails(
    parent: Callable[[], WarmParent], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "workers.session.open_device", lambda _kind, visible, workspace: OtherCards(visible, workspace.sim_state)
    )
    monkeypatch.setattr(Session, "_ready", forked_only(Session._ready))
    socket = parent().socket
    session = Session(replace(spec(), start=Start.WARM), "run", 1, ["3"], together, warm_parent=socket)
    assert session.start().start == "cold"
    row = session.measure(MEMORY)
    session.stop()
    assert (row.failure_message, row.engine_kv_bytes, row.max_num_batched_tokens) == ("no cold one either", None, None)


def forked_only(ready: Callable[..., ServerProcess]) -> Callable[..., ServerProcess]:
    def forked(session: Session, offered: object) -> ServerProcess:
        if offered is None:
            raise readiness.StartFailed(Failure(FailureClass.START_FAILED, "no cold one either"))
        return ready(session, offered)

    return forked


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
    asked = replace(spec(), start=Start.WARM)
    session = Session(asked, "run", 1, ["3"], together, no_warm_parent="its owner has ended")
    assert session.start().start_reason == "its owner has ended"
    session.stop()
    dead = parent()
    os.kill(dead.pid, signal.SIGKILL)
    while processes.is_running(dead.pid):
        time.sleep(0.01)
    row, _ = started(dead, monkeypatch)
    assert (row.status, row.start) == (MEASURED, "cold")
    assert (row.start_reason or "").startswith("no warm parent answers")
    assert row.warm_wait_s is not None, "what was waited for in vain is waited, too"
