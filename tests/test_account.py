"""The account of a server's memory: parts by card and moment, and what is left when all is given back."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from contract.rows import TelemetryRow
from workers import account, probe
from workers.account import ServerAccount
from workers.devices import context_probe
from workers.devices.base import Card, CardProcess
from workers.load.endpoint import Endpoint

GIB, MIB = 2**30, 2**20
FIRST, SECOND = Card("GPU-aa", "H100", 80 * GIB), Card("GPU-bb", "H100", 80 * GIB)


class PretendedCards:
    """Cards whose memory is what a pretended worker leaves on them."""

    period_s = 0.1
    driver_version = None

    def __init__(self, *cards: Card) -> None:
        self.cards = list(cards)
        self.outside = [3 * GIB] * len(cards)
        self.torch = [20 * GIB] * len(cards)

    def memory_by_card(self, pid: int | None) -> list[int]:
        return [sum(parts) for parts in zip(self.outside, self.torch, strict=True)]

    def sample(self, pid: int | None) -> list[TelemetryRow]:
        return []

    def processes(self, pid: int | None) -> list[CardProcess]:
        return []

    def close(self) -> None: ...


class Workers:
    """Answers as vLLM's `/collective_rpc`: one dictionary a rank, in the order of ranks."""

    def __init__(self, device: PretendedCards, uuids: list[str | None]) -> None:
        self.device, self.uuids = device, uuids
        self.keeps = 0
        self.outside: dict[str, int | None] = {"outside": 3 * GIB, "outside_at_init": 2 * GIB}

    def __call__(self, endpoint: Endpoint, path: str, body: dict[str, Any], timeout_s: float) -> tuple[int, str]:
        assert path == "/collective_rpc"
        if body["method"] == "give_back_memory":
            self.device.torch = [self.keeps] * len(self.device.cards)
            answers: list[dict[str, Any]] = [{"reserved": self.keeps} for _ in self.device.cards]
        else:
            same: dict[str, Any] = {
                "weights": 8 * GIB,
                "graphs": GIB,
                "buffers": GIB,
                "cached": GIB,
                "reserved": 20 * GIB,
            }
            same |= self.outside
            answers = [same | {"kv": (rank + 9) * GIB} for rank in range(len(self.uuids))]
        for answer, uuid in zip(answers, self.uuids, strict=True):
            answer |= {"uuid": uuid} if uuid else {}
        return 200, json.dumps({"results": answers})


Open = Callable[..., tuple[ServerAccount, PretendedCards, Workers]]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Open:
    def make(*cards: Card, uuids: list[str | None] | None = None) -> tuple[ServerAccount, PretendedCards, Workers]:
        device = PretendedCards(*cards)
        workers = Workers(device, uuids or [None] * len(cards))
        monkeypatch.setattr(probe, "post", workers)
        baseline, contexts = [GIB] * len(cards), [GIB // 4] * len(cards)
        return ServerAccount(device, Endpoint("http://l", "m", uds="/s"), baseline, contexts), device, workers  # type: ignore[arg-type]

    return make


def test_ready_and_peak_hold_the_parts_and_what_each_card_held(opened: Open) -> None:
    one, device, _ = opened(FIRST)
    one.at("ready", device.memory_by_card(1))
    one.saw({"GPU-aa": 30 * GIB})
    one.saw({"GPU-aa": 25 * GIB})
    one.settle(1)
    assert [(row.moment, row.device_id) for row in one.rows] == [("ready", "GPU-aa"), ("peak", "GPU-aa")]
    ready, peak = one.rows
    assert (ready.used_bytes, peak.used_bytes) == (22 * GIB, 29 * GIB)
    for row in one.rows:
        assert (row.weights_bytes, row.kv_bytes, row.graph_pool_bytes) == (8 * GIB, 9 * GIB, GIB)
        assert (row.buffer_bytes, row.cached_bytes) == (GIB, GIB)
        assert (row.outside_now_bytes, row.outside_at_init_bytes) == (3 * GIB, 2 * GIB)


def test_the_peak_is_the_moment_at_which_all_cards_together_held_most(opened: Open) -> None:
    one, device, _ = opened(FIRST, SECOND)
    one.at("ready", device.memory_by_card(1))
    one.saw({"GPU-aa": 30 * GIB, "GPU-bb": 25 * GIB})
    one.saw({"GPU-aa": 22 * GIB, "GPU-bb": 35 * GIB})
    one.saw({})
    one.settle(1)
    assert [row.used_bytes for row in one.rows if row.moment == "peak"] == [21 * GIB, 34 * GIB]


@pytest.mark.parametrize("outside", [{}, {"outside": 3 * GIB, "outside_at_init": None}])
def test_an_engine_that_keeps_no_first_look_has_none(opened: Open, outside: dict[str, int | None]) -> None:
    one, device, workers = opened(FIRST)
    workers.outside = outside
    one.at("ready", device.memory_by_card(1))
    (ready,) = one.rows
    assert (ready.outside_now_bytes, ready.outside_at_init_bytes) == (outside.get("outside"), None)
    assert ready.weights_bytes == 8 * GIB


def test_what_is_outside_the_allocator_is_read_when_all_is_given_back(opened: Open) -> None:
    one, device, workers = opened(FIRST)
    workers.keeps = 3 * 2**20
    one.at("ready", device.memory_by_card(1))
    one.settle(1)
    for row in one.rows:
        assert (row.outside_bytes, row.context_bytes) == (2 * GIB, GIB // 4)


def test_a_server_that_never_comes_to_its_end_has_its_context_all_the_same(opened: Open) -> None:
    one, device, _ = opened(FIRST)
    one.at("ready", device.memory_by_card(1))
    (ready,) = one.rows
    assert (ready.context_bytes, ready.outside_bytes) == (GIB // 4, None)


def test_a_memory_point_that_is_measured_again_has_its_moment_once(opened: Open) -> None:
    one, device, _ = opened(FIRST, SECOND)
    one.at("ready", device.memory_by_card(1))
    one.at("loaded", device.memory_by_card(1))
    device.torch = [21 * GIB, 21 * GIB]
    one.at("loaded", device.memory_by_card(1))
    assert [(row.moment, row.used_bytes) for row in one.rows] == [("ready", 22 * GIB)] * 2 + [("loaded", 23 * GIB)] * 2


def test_a_worker_that_keeps_too_much_leaves_what_is_outside_unknown(opened: Open) -> None:
    one, device, workers = opened(FIRST)
    workers.keeps = account.EMPTIED_BYTES + 1
    one.at("ready", device.memory_by_card(1))
    one.settle(1)
    assert [row.outside_bytes for row in one.rows] == [None, None]


def test_ranks_are_placed_by_the_card_they_name(opened: Open) -> None:
    one, device, _ = opened(FIRST, SECOND, uuids=["bb", "aa"])
    one.at("ready", device.memory_by_card(1))
    assert [(row.device_id, row.kv_bytes) for row in one.rows] == [("GPU-bb", 9 * GIB), ("GPU-aa", 10 * GIB)]
    other, device, _ = opened(FIRST, SECOND)
    other.at("ready", device.memory_by_card(1))
    assert [(row.device_id, row.kv_bytes) for row in other.rows] == [("GPU-aa", 9 * GIB), ("GPU-bb", 10 * GIB)]


def test_workers_that_hold_no_card_are_not_asked_for_its_memory_again(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, device, _ = opened(FIRST)
    assert not one.of_cards
    monkeypatch.setattr(probe, "post", lambda *_: (200, json.dumps({"results": [{"weights": GIB, "kv": GIB}]})))
    one.at("ready", device.memory_by_card(1))
    assert [row.weights_bytes for row in one.rows] == [GIB]
    assert not one.of_cards, "the CPU backend's"
    monkeypatch.undo()
    other, device, _ = opened(FIRST)
    other.at("ready", device.memory_by_card(1))
    assert other.of_cards


@pytest.mark.parametrize("answer", [(404, ""), (200, "no JSON"), (200, "{}"), None])
def test_a_server_that_does_not_know_the_question_has_no_account(
    opened: Open, monkeypatch: pytest.MonkeyPatch, answer: tuple[int, str] | None
) -> None:
    one, device, _ = opened(FIRST)

    def answered(*_: object) -> tuple[int, str]:
        if answer is None:
            raise probe.NoAnswer("gone")
        return answer

    monkeypatch.setattr(probe, "post", answered)
    one.at("ready", device.memory_by_card(1))
    one.settle(1)
    assert one.rows == []


def never() -> bool:
    return False


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


PRETENDED_CUDA = """
import ctypes, runpy, sys
class Driver:
    def __getattr__(self, name):
        return lambda *_: {result}
real = ctypes.CDLL
ctypes.CDLL = lambda name: Driver() if name else real(name)
runpy.run_path({path!r}, run_name="__main__")
"""


@pytest.mark.parametrize(("result", "expected"), [(0, 500), (100, None)])
def test_a_bare_context_is_what_the_card_grows_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, result: int, expected: int | None
) -> None:
    script = tmp_path / "probe.py"
    script.write_text(PRETENDED_CUDA.format(result=result, path=context_probe.__file__))
    monkeypatch.setattr(context_probe, "__file__", str(script))
    readings = iter([100, 600, 600, 100])
    assert context_probe.context_bytes("0", lambda: next(readings), never) == expected


@pytest.mark.parametrize(
    ("readings", "expected"),
    [
        ([0, 500, 500, 500, 0], 500),
        ([7, 507, 8], 500),  # as near as two readings are
        ([0, 800, 300], None),  # somebody came, and stayed
        ([300, 500, 0], None),  # somebody went
    ],
)
def test_a_context_is_not_known_where_others_came_or_went(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, readings: list[int], expected: int | None
) -> None:
    script = tmp_path / "probe.py"
    script.write_text(PRETENDED_CUDA.format(result=0, path=context_probe.__file__))
    monkeypatch.setattr(context_probe, "__file__", str(script))
    monkeypatch.setattr(context_probe, "BACK_LIMIT_S", 0.1)
    left = [mib * MIB for mib in readings]
    found = context_probe.context_bytes("0", lambda: left.pop(0) if len(left) > 1 else left[0], never)
    assert found == (None if expected is None else expected * MIB)


PRETENDED_TORCH = """
import sys, types
class Tensor:
    def __getitem__(self, rows):
        return self
def linear(rows, weights):
    assert rows is weights
functional = types.SimpleNamespace(linear=linear)
cuda = types.SimpleNamespace(synchronize=int, empty_cache=int, memory_reserved=lambda: 32)
sys.modules["torch"] = types.SimpleNamespace(
    ones=lambda *_, **__: Tensor(), bfloat16=None, nn=types.SimpleNamespace(functional=functional), cuda=cuda
)
"""


@pytest.mark.parametrize(
    ("torch", "readings", "expected"),
    [
        (PRETENDED_TORCH, [100, 600, 790, 100], 190 - 32),
        ("import sys; sys.modules['torch'] = None", [100, 600, 100], None),  # there is none to be had
        (PRETENDED_TORCH, [100, 600, 790, 90 * MIB], None),  # somebody came meanwhile
    ],
)
def test_libraries_are_what_the_card_grows_by_beyond_a_context_and_torchs_allocator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torch: str, readings: list[int], expected: int | None
) -> None:
    script = tmp_path / "probe.py"
    script.write_text(torch + PRETENDED_CUDA.format(result=0, path=context_probe.__file__))
    monkeypatch.setattr(context_probe, "__file__", str(script))
    monkeypatch.setattr(context_probe, "BACK_LIMIT_S", 0.1)
    found = context_probe.library_bytes("0", lambda: readings.pop(0) if len(readings) > 1 else readings[0], never)
    assert found == expected


SPEAKS = "import os; os.system('echo some warning')\n"


@pytest.mark.parametrize("torch", [SPEAKS + PRETENDED_TORCH, PRETENDED_TORCH.replace("lambda: 32", "lambda: 'much'")])
def test_what_is_no_answer_of_the_probe_is_no_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torch: str
) -> None:
    script = tmp_path / "probe.py"
    script.write_text(torch + PRETENDED_CUDA.format(result=0, path=context_probe.__file__))
    monkeypatch.setattr(context_probe, "__file__", str(script))
    assert context_probe.library_bytes("0", lambda: 100, never) is None
    script.write_text(SPEAKS + PRETENDED_CUDA.format(result=0, path=context_probe.__file__))
    assert context_probe.context_bytes("0", lambda: 100, never) is None


def test_what_libraries_print_is_not_taken_for_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = PRETENDED_TORCH.replace(
        "    assert rows is weights", "    print('a banner'); import os; os.system('echo another')"
    )
    script = tmp_path / "probe.py"
    script.write_text(torch + PRETENDED_CUDA.format(result=0, path=context_probe.__file__))
    monkeypatch.setattr(context_probe, "__file__", str(script))
    readings = iter([100, 600, 790, 100])
    assert context_probe.library_bytes("0", lambda: next(readings), never) == 190 - 32


HANGS = "    import os, pathlib, time; pathlib.Path({pid!r}).write_text(str(os.getpid()) + '.'); time.sleep(600)"
ASKS = """
from workers.devices import context_probe
context_probe.__file__ = {script!r}
context_probe.library_bytes("0", lambda: 0, lambda: False)
"""


def hanging_probe(tmp_path: Path) -> tuple[Path, Path]:
    """Return a probe that hangs while it computes, and the file that it then writes its number and a full stop into."""
    script, pid = tmp_path / "probe.py", tmp_path / "pid"
    torch = PRETENDED_TORCH.replace("    assert rows is weights", HANGS.format(pid=str(pid)))
    script.write_text(torch + PRETENDED_CUDA.format(result=0, path=context_probe.__file__))
    return script, pid


def written(pid: Path) -> bool:
    return pid.exists() and pid.read_text().endswith(".")


def test_a_stop_ends_the_probe_at_once_and_the_card_is_not_read_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, pid = hanging_probe(tmp_path)
    monkeypatch.setattr(context_probe, "__file__", str(script))
    told: list[bool] = []

    def stopped() -> bool:
        told.append(written(pid))
        return told[-1]

    assert context_probe.library_bytes("0", lambda: 0, stopped) is None
    assert 1 <= told.count(True) <= 3  # not waited for any longer
    assert not psutil.pid_exists(int(pid.read_text()[:-1]))

    def closed() -> int:
        raise AssertionError("read after a stop")

    assert context_probe.context_bytes("0", closed, lambda: True) is None


def test_a_probe_that_computes_is_ended_with_the_process_that_asked(tmp_path: Path) -> None:
    script, pid = hanging_probe(tmp_path)
    asking = subprocess.Popen([sys.executable, "-c", ASKS.format(script=str(script))])
    try:
        wait_until(lambda: written(pid))
        probe = psutil.Process(int(pid.read_text()[:-1]))
    finally:
        asking.kill()
        asking.wait()
    try:
        wait_until(lambda: not probe.is_running() or probe.status() == psutil.STATUS_ZOMBIE)
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            probe.kill()


def test_a_probe_ends_with_the_process_that_asked(tmp_path: Path) -> None:
    script = tmp_path / "probe.py"
    script.write_text(PRETENDED_CUDA.format(result=0, path=context_probe.__file__))
    child = subprocess.Popen([sys.executable, "-I", str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdin is not None
    assert child.stdout is not None
    assert child.stdout.readline() == b"made\n"
    child.stdin.close()
    assert child.wait(10) == 0
