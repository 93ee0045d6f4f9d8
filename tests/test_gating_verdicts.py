"""The truth that the load client's verdicts are held against (`benchmarks/client/gating.py`)."""

from __future__ import annotations

import os
import signal
import socket
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.client.truth import truth_server
from benchmarks.client.verdicts import Told, Verdict, blame, table, wilson

INTERVAL_S, TOKENS = 0.01, 32


def told(arrived_s: float, delay_s: float = 0.0, due_s: float | None = None) -> Told:
    """A request that the server reads after `delay_s`, and its client stamps as it happens."""
    writes = [arrived_s + delay_s + INTERVAL_S * n for n in range(1, TOKENS + 1)]
    return Told(arrived_s, writes[0], writes[-1], list(np.diff(writes)), arrived_s, writes, due_s)


def closed_loop(rounds: int, streams: int) -> list[Told]:
    return [told(stream * 0.003 + n * TOKENS * INTERVAL_S) for stream in range(streams) for n in range(rounds)]


def test_a_client_that_stamps_what_happened_is_to_blame_for_nothing() -> None:
    assert blame(closed_loop(10, 8), 8) == []


def test_last_chunks_that_were_stamped_late_are_the_clients_doing() -> None:
    """Of one in ten, by 40 ms of 320: neither gaps nor first chunks show it."""
    late = [
        replace(each, last_s=each.last_s + 0.04) if n % 10 == 0 else each for n, each in enumerate(closed_loop(10, 8))
    ]
    assert blame(late, 8) == ["p95 E2EL off by 40.0 ms", "p95 TPOT, times 31 off by 40.0 ms"]
    less = [
        replace(each, last_s=each.last_s + 0.03) if n % 10 == 0 else each for n, each in enumerate(closed_loop(10, 8))
    ]
    assert blame(less, 8) == []


def test_first_chunks_and_gaps_are_held_to_the_log_too() -> None:
    rows = closed_loop(10, 8)
    late = [replace(each, first_s=each.first_s + 0.012) if n % 10 == 0 else each for n, each in enumerate(rows)]
    assert blame(late, 8) == ["p95 TTFT off by 12.0 ms"]
    late = [replace(each, gaps_s=[0.021, *each.gaps_s[1:]]) for each in rows]
    assert blame(late, 8) == ["p99 gap off by 11.0 ms"]


def test_streams_that_the_server_had_not_to_serve_are_the_clients_doing() -> None:
    rows = [told(n * (TOKENS * INTERVAL_S + 0.02)) for n in range(10)]
    assert blame(rows, 1) == ["94.1% in flight"]


def test_requests_of_an_open_loop_that_come_late_are_the_clients_doing_and_those_that_are_read_late_are_not() -> None:
    rows = [told(n * 0.1, due_s=n * 0.1) for n in range(50)]
    assert blame(rows, 1) == []
    late = [told(n * 0.1 + 0.015, due_s=n * 0.1) for n in range(50)]
    assert blame(late, 1) == ["requests came 15.0 ms late (p99)"]
    read_late = [told(n * 0.1, delay_s=0.08, due_s=n * 0.1) for n in range(50)]
    assert blame(read_late, 1) == []


def test_when_a_request_came_is_the_kernels_word_and_not_the_servers(tmp_path: Path) -> None:
    body = b'{"max_tokens": 1}'
    core = min(os.sched_getaffinity(0))
    with truth_server(tmp_path, core, 1.0) as server, socket.create_connection(("127.0.0.1", server.port)) as line:
        server.process.send_signal(signal.SIGSTOP)
        while psutil.Process(server.process.pid).status() != psutil.STATUS_STOPPED:
            time.sleep(0.001)
        line.sendall(b"POST /v1/completions HTTP/1.1\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
        sent_s = time.monotonic()
        time.sleep(0.2)
        server.process.send_signal(signal.SIGCONT)
        assert b"200 OK" in line.recv(1000)
    ((arrived_s, writes),) = server.by_body().values()
    assert arrived_s < sent_s + 0.1 < sent_s + 0.2 < writes[0]


@given(st.integers(1, 500), st.floats(0, 1))
def test_the_interval_of_a_share_holds_it_and_stays_between_0_and_1(of: int, share: float) -> None:
    right = round(of * share)
    low, high = wilson(right, of)
    assert -1e-12 <= low <= right / of + 1e-12
    assert right / of - 1e-12 <= high <= 1 + 1e-12


def test_the_interval_is_wilsons() -> None:
    assert wilson(196, 200) == (pytest.approx(0.9497, abs=1e-4), pytest.approx(0.9922, abs=1e-4))


def test_the_table_tells_hits_misses_and_false_calls_apart() -> None:
    hit, missed, false, no = Verdict(True, True), Verdict(True, False), Verdict(False, True), Verdict(False, False)
    words = table([hit] * 2 + [missed] + [false] * 3 + [no] * 4).split()
    assert words[:4] == ["2", "1", "3", "4"]
    assert " ".join(words[4:9]) == "right: 6 of 10, 60.0%"
