"""The process of one session that somebody may kill, as an actor's is. Started by `benchmarks.warm_kills_vllm`.

It lives as its actor would have it: start, then one request after another, until it is told to stop, or finds its
server dead and stops by itself. What it is told and tells goes over a pipe, whose other end is its starter's promise to
be alive.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from contract.rows import FAILED, MEASURED
from contract.specs import Point, PointKind, Purpose, SessionSpec, Start
from workers.load.client import generate
from workers.load.plan import LoadPlan, LoadResult
from workers.session import Session

POLL_S = 0.02
ONE_REQUEST = Point("kills", PointKind.LOAD, Purpose.CONCURRENCY, "bench", 1, 1, prompt_tokens=16, output_tokens=4)


@dataclass(frozen=True, slots=True)
class Answered:
    """The server, started in this way, was ready after this long, and has answered a request since."""

    start: Start
    ready_s: float


@dataclass(frozen=True, slots=True)
class Ended:
    """The session has stopped, and why: None where it was told to."""

    reason: str | None
    went_on_cold: bool
    """Its server was about to be started cold."""


def play(spec: SessionSpec, warm_parent: Path, line: Connection) -> None:
    """Live as the module says. Sends the session's directory, `Answered` once it has, `Ended` at last."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal's Ctrl-C the starter tells
    session = Session(spec, "bench", 1, [], _generate, os.environ.get("OMP_NUM_THREADS"), warm_parent)
    line.send(session._workspace.root)
    reasons: list[str] = []
    living = threading.Thread(target=_live, args=(session, line, reasons))
    living.start()
    told = False
    while living.is_alive() and not session.row.start_reason and not (told := line.poll(POLL_S)):
        pass  # one that goes on cold is done here, too: a cold start is not what is looked at
    session.stop()
    living.join()
    reason = session.row.start_reason or next(iter(reasons), None)
    ended = Ended(None if told else reason or "ended without a reason", session.row.start_reason is not None)
    with contextlib.suppress(OSError):  # its starter has gone
        line.send(ended)


def _live(session: Session, line: Connection, reasons: list[str]) -> None:
    row = session.start()
    if row.status != MEASURED:
        reasons.append(row.failure_message or "")
        return
    answered = False
    while True:
        point = session.measure(ONE_REQUEST)
        if point.status == FAILED:
            reasons.append(point.failure_message or "")
            return
        if not answered:
            line.send(Answered(Start(row.start or Start.COLD), row.ready_s or 0.0))
        answered = True


def _generate(plans: list[LoadPlan]) -> list[LoadResult]:
    """In threads of their own, which end with this process when that is killed: cores are bound a thread at a time."""
    with ThreadPoolExecutor(len(plans)) as pool:
        return list(pool.map(generate, plans))
