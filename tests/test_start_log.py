"""The lines of a log, each with when it was seen whole; and whether a server that says nothing works."""

import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from workers import processes
from workers.launch.watch import LOOK_EVERY_S, StartLog, TreeWork
from workers.processes import Work


def test_a_line_is_seen_once_it_is_whole() -> None:
    log = StartLog(time.monotonic())
    text = ""
    for more in ("one\ntw", "o", "\n\nthree", "\n"):
        text += more
        log.look(text)
    assert [line for _, line in log.lines] == ["one", "two", "", "three"]
    times = [seconds for seconds, _ in log.lines]
    assert times == sorted(times)


def test_half_a_line_is_a_word_too() -> None:
    log = StartLog(time.monotonic() - 100)
    assert log.silent_s >= 100
    log.look("downloading")
    assert log.silent_s < 100
    assert log.lines == []


def test_a_word_that_it_waits_is_a_line_and_no_sign_of_life() -> None:
    log = StartLog(time.monotonic() - 100, lambda line: "No available" in line)
    log.look("No available block\n")
    assert log.silent_s >= 100
    log.look("No available block\nNo available block\n")
    assert log.silent_s >= 100
    assert [line for _, line in log.lines] == ["No available block"] * 2
    log.look("No available block\nNo available block\nNo available block\nloaded\n")
    assert log.silent_s < 100


def test_half_a_line_that_stays_so_is_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bar of progress ends without a newline; what hangs behind it says nothing more."""
    now = 100.0
    monkeypatch.setattr("workers.launch.watch.time", SimpleNamespace(monotonic=lambda: now))
    log = StartLog(now)
    log.look("shards:  0%")
    now = 150.0
    log.look("shards:  0%")
    assert log.silent_s == 50.0


SEEN = {1: Work(50.0, 2**30), 2: Work(9.0, 0)}
WAKES_UP, COMPUTES, READS = Work(50.1, 2**30 + 2**10), Work(51.0, 2**30), Work(50.0, 2**30 + 2**20)


@pytest.mark.parametrize(
    ("done", "works", "moves"),
    [
        (SEEN, False, False),
        (SEEN | {1: WAKES_UP}, False, False),
        ({1: WAKES_UP}, False, False),  # the other one has ended
        (SEEN | {1: COMPUTES}, True, False),
        ({1: COMPUTES}, True, False),
        (SEEN | {1: READS}, True, True),
        (SEEN | {3: Work(1.0, 0)}, True, False),
        (SEEN | {3: Work(0.0, 2**20)}, True, True),
    ],
)
def test_a_server_works_whose_processes_compute_or_read_and_not_one_that_wakes_up_now_and_then(
    done: dict[int, Work], works: bool, moves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, looks = 100.0, iter([SEEN, done])
    monkeypatch.setattr("workers.launch.watch.time", SimpleNamespace(monotonic=lambda: now))
    work = TreeWork(lambda: next(looks))
    assert work.still_s() == 0.0
    now += LOOK_EVERY_S / 2
    assert work.still_s() == LOOK_EVERY_S / 2
    now += LOOK_EVERY_S / 2
    assert work.still_s() == (0.0 if works else LOOK_EVERY_S)
    assert work.moves == moves


def test_what_a_tree_has_done_is_of_all_its_processes() -> None:
    reads = "open('/dev/zero', 'rb').read(2**22); print('read', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", reads], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"read\n"
        done = processes.work(os.getpid())
        child.kill()
    assert done[child.pid].moved_bytes > 2**22
    assert done[os.getpid()].cpu_s > 0
    assert processes.work(child.pid) == {}
