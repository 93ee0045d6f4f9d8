"""What the user sees while a run goes on: a live line with the time left on a terminal, plain lines on a pipe."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from functools import partial
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

from contract.rows import MEASURED, PointRow, SessionRow
from contract.specs import Point, PointKind, SessionSpec, Start
from orchestrator.printer import Printer, to_file

MIB = 2**20
WORTH_SAYING_S = 0.5


@dataclass(slots=True)
class Progress:
    """Call it with what happens; it prints. `remaining_s` is the plan's own estimate, shrinking as points are done."""

    total_points: int
    estimate_s: float
    stream: TextIO = sys.stdout
    done: int = 0
    failed: int = 0
    _started: float = field(default_factory=time.monotonic)
    _estimated_done_s: float = 0.0
    _doing: dict[str, str] = field(default_factory=dict)
    _said: set[str] = field(default_factory=set)
    _live: Live | None = None
    _printer: Printer = field(init=False)

    def __post_init__(self) -> None:
        if self.stream.isatty():
            console = Console(file=self.stream, highlight=False)
            self._live = Live(
                console=console, refresh_per_second=4, get_renderable=self._render, transient=True,
                redirect_stdout=False, redirect_stderr=False,  # or who prints waits for the terminal, the loop too
            )  # fmt: skip
            self._live.start()
            self._printer = Printer(partial(console.print, markup=False, soft_wrap=True), end=self._live.stop)
        else:
            self._printer = Printer(to_file(self.stream))

    def close(self) -> None:
        """Print what is left to be said, and end the live line; neither is waited for for ever."""
        self._printer.close()

    def say(self, line: str) -> None:
        """Have one line printed; a terminal or pipe that stands still or has closed must not cost the run."""
        self._printer.put(line if self._live else f"[{_clock(time.monotonic() - self._started)}] {line}")

    def doing(self, session: SessionSpec, what: str) -> None:
        """Note what a session is at; only a terminal shows it."""
        self._doing[session.id] = f"{title(session)}: {what}"

    def ready(self, session: SessionSpec, row: SessionRow) -> None:
        """A server is ready, or is not."""
        if row.status == MEASURED:
            where = f" on {','.join(row.visible_devices)}" if row.visible_devices else ""
            self.say(f"ready    {title(session)}{where} in {row.ready_s:.1f} s{_how(row)}")
            if row.start_reason and row.start_reason not in self._said:
                self._said.add(row.start_reason)
                self.say(f"started cold, not forked: {row.start_reason}")
        else:
            self.say(f"FAILED   {title(session)}: {row.failure_class}: {row.failure_message}")

    def measured(self, session: SessionSpec, row: PointRow, estimate_s: float) -> None:
        """A point has its row."""
        self.done += 1
        self._estimated_done_s += estimate_s
        if row.status == MEASURED:
            self.say(f"[{self.done}/{self.total_points}] {title(session)}: {finding(row)}")
        else:
            self.failed += 1
            words = row.status if row.status == row.failure_class else f"{row.status}: {row.failure_class}"
            self.say(f"[{self.done}/{self.total_points}] {title(session)}: {words}")

    def pruned(self, session: SessionSpec, points: int) -> None:
        """So many points have their rows without having been measured."""
        self.done += points
        self.total_points += points
        self.say(f"pruned   {title(session)}: {points} points that KV arithmetic or measured points decide")

    def left_out(self, session: SessionSpec, point: Point, why: str) -> None:
        """A point has its row without having been measured, for want of budget."""
        self.done += 1
        self.say(f"[{self.done}/{self.total_points}] {title(session)}: {point.purpose} left out: {why}")

    def ended(self, session: SessionSpec) -> None:
        """A session is over."""
        self._doing.pop(session.id, None)

    def _render(self) -> Text:
        elapsed = time.monotonic() - self._started
        left = max(0.0, self.estimate_s - elapsed)
        if self.done:  # what is done tells how wrong the estimate is
            left = max(0.0, elapsed * (self.total_points - self.done) / self.done)
        head = f"{self.done}/{self.total_points} points · {_clock(elapsed)} gone · about {_clock(left)} left"
        return Text("\n".join([head, *(f"  {line}" for line in self._doing.values())]), style="dim")


def title(session: SessionSpec) -> str:
    """Return a session in a few words."""
    pool = f"pool of {session.sequences} sequences" if session.sequences else session.mode
    eager = ", eager" if session.server.enforce_eager else ""
    return f"{session.model.name} max_model_len={session.server.max_model_len} ({pool}{eager})"


def finding(row: PointRow) -> str:
    """Return the main figures of a measured point."""
    simulated = "simulated, " if row.simulated else ""
    if row.kind == PointKind.MEMORY:
        ready = (row.mem_ready_bytes or 0) / MIB
        return f"{simulated}{ready:.0f} MiB when ready, KV for {row.engine_kv_tokens} tokens"
    return (
        f"{simulated}{row.purpose}, {_level(row)}: {row.tok_s or 0:.1f} tok/s, "
        f"p95 {row.p95_e2e_s or 0:.3f} s, {row.failed} of {(row.completed or 0) + (row.failed or 0)} failed"
    )


def _how(row: SessionRow) -> str:
    """Return that a server was forked, and what its session had waited and lost before the launch."""
    words = ["warm"] if row.start == Start.WARM else []
    if (row.warm_wait_s or 0.0) >= WORTH_SAYING_S:
        words.append(f"after {row.warm_wait_s:.1f} s of waiting for the import")
    if (row.fork_lost_s or 0.0) >= WORTH_SAYING_S:
        words.append(f"after a fork that cost {row.fork_lost_s:.1f} s")
    return f" ({', '.join(words)})" if words else ""


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02d}"


def _level(row: PointRow) -> str:
    return f"concurrency {row.concurrency}" if row.arrivals is None else f"{row.request_rate:g} requests/s"
