"""The lines of a log, each with when it was seen whole."""

import time
from types import SimpleNamespace

import pytest

from workers.launch.watch import StartLog


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
