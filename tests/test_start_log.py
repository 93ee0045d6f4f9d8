"""The lines of a log, each with when it was seen whole."""

import time

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
