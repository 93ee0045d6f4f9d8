"""A limit to what a run may take: the order that makes the most of it, what fits, what has been spent. Pure.

Seconds are the plan's rough estimates, put right by what the run's points have taken so far.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from contract.specs import Point, PointKind, SessionSpec, Start
from orchestrator import estimate
from orchestrator.scheduler import Job, start_times
from workers.engines import make_engine

Item = TypeVar("Item")
MINUTE_S, HOUR_S = 60.0, 3600.0


@dataclass(frozen=True, slots=True)
class Budget:
    """What one start of the run may take. None: no limit."""

    minutes: float | None = None
    """From the first server's start on."""
    gpu_hours: float | None = None
    """Of cards that servers hold, from the making of a session to the end of its server."""

    @property
    def limits(self) -> bool:
        """Whether there is one at all."""
        return self.minutes is not None or self.gpu_hours is not None

    def problems(self, sessions: Sequence[SessionSpec]) -> list[str]:
        """Return why no point at all can be measured within it, one line each; nothing where one can."""
        if not sessions:
            return []
        found = []
        if self.gpu_hours is not None and not any(session.gpus for session in sessions):
            found.append("budget.gpu_hours: these servers hold no GPU; set budget.minutes")
        for name, given, unit_s, cost in (
            ("minutes", self.minutes, MINUTE_S, lambda session: 1),
            ("gpu_hours", self.gpu_hours, HOUR_S, lambda session: session.gpus),
        ):
            least = min(cost(session) * _first_s(session) for session in sessions) / unit_s
            if given is not None and given < least:
                found.append(
                    f"budget.{name}={given:g} does not hold one point: with its server's start the cheapest is "
                    f"estimated at {least:.2g}"
                )
        return found


def coarse_first(items: Sequence[Item]) -> list[Item]:
    """Return both ends, then the middle, then the middles of what is between: every beginning spans the whole."""
    if len(items) < 3:
        return list(items)
    order, spans = [0, len(items) - 1], [(0, len(items) - 1)]
    while spans:
        low, high = spans.pop(0)
        middle = (low + high) // 2
        if low < middle < high:
            order.append(middle)
            spans += [(low, middle), (middle, high)]
    return [items[index] for index in order]


def by_use(session: SessionSpec) -> SessionSpec:
    """Return the session with its points in the order of their use: memory, then one repeat of every level, the ends of
    each curve before its middle, then the next repeat."""
    levels: dict[str, set[float]] = defaultdict(set)
    for point in session.points:
        levels[point.purpose].add(_level(point))
    place = {
        (purpose, level): position
        for purpose, found in levels.items()
        for position, level in enumerate(coarse_first(sorted(found)))
    }

    def use(point: Point) -> tuple[bool, int, int]:
        return point.kind is not PointKind.MEMORY, point.repeat, place[point.purpose, _level(point)]

    return replace(session, points=tuple(sorted(session.points, key=use)))


def ranks(sessions: Iterable[SessionSpec]) -> dict[str, int]:
    """Return when each session's turn is: of every curve of memory the ends first, load with the first of them."""
    curves: dict[tuple[str, str], list[SessionSpec]] = defaultdict(list)
    found: dict[str, int] = {}
    for session in sessions:
        if session.points and all(point.kind is PointKind.MEMORY for point in session.points):
            curves[session.model.name, session.mode].append(session)
        else:
            found[session.id] = 0
    for curve in curves.values():
        ascending = sorted(curve, key=lambda session: session.server.max_model_len)
        found |= {session.id: rank for rank, session in enumerate(coarse_first(ascending))}
    return found


def jobs(sessions: Sequence[SessionSpec], budget: Budget) -> list[Job]:
    """Return what the queue gets: with a budget, ranked by use."""
    rank = ranks(sessions) if budget.limits else {}
    return [
        Job(s.id, max(1, s.gpus), s.estimate_s, rank.get(s.id, 0), compiles=make_engine(s.engine).compile_key(s))
        for s in sessions
    ]


def fitting(sessions: Sequence[SessionSpec], free: dict[str, int], budget: Budget) -> int:
    """Return how many of the planned points fit by the estimates. With several cards it is a rough count.

    Sessions take of `gpu_hours` in the queue's order, as the run has them do: one that just holds a dear server's start
    may so hold fewer points than a smaller one that leaves it out.
    """
    starts = start_times(jobs(sessions, budget), free)
    left_gpu_s = float("inf") if budget.gpu_hours is None else budget.gpu_hours * HOUR_S
    limit_s = float("inf") if budget.minutes is None else budget.minutes * MINUTE_S
    import_s = max((_import_left_s(session, 0.0) for session in sessions), default=0.0)
    fit = 0
    for session in sorted(sessions, key=lambda session: starts[session.id]):
        now_s, cost_s = import_s + starts[session.id], session.start_estimate_s
        for point in session.points:
            cost_s += point.estimate_s
            if now_s + cost_s > limit_s or session.gpus * cost_s > left_gpu_s:
                break
            left_gpu_s -= session.gpus * cost_s
            now_s, cost_s, fit = now_s + cost_s, 0.0, fit + 1
    return fit


@dataclass(slots=True)
class _Live:
    gpus: int
    since_s: float
    until_s: float


@dataclass(slots=True)
class Spending:
    """What a run has spent, and whether a budget has room for more. Made when the run begins."""

    budget: Budget
    clock: Callable[[], float] = time.monotonic
    _live: dict[str, _Live] = field(default_factory=dict)
    _ended_gpu_s: float = 0.0
    _took_s: float = 0.0
    _estimated_s: float = 0.0
    _began_s: float = field(init=False)

    def __post_init__(self) -> None:
        self._began_s = self.clock()

    def over(self, session: SessionSpec, point: Point) -> str | None:
        """Return which budget would not hold this point, with the start of its server where that is not there yet."""
        now = self.clock()
        seconds = point.estimate_s * (self._took_s / self._estimated_s if self._estimated_s else 1.0)
        if session.id not in self._live:
            seconds += session.start_estimate_s + _import_left_s(session, now - self._began_s)
        minutes, gpu_hours = self.budget.minutes, self.budget.gpu_hours
        if minutes is not None and now - self._began_s + seconds > minutes * MINUTE_S:
            return f"budget.minutes={minutes:g} has no room for it"
        taken = self._ended_gpu_s + sum(
            live.gpus * ((now if name == session.id else max(now, live.until_s)) - live.since_s)
            for name, live in self._live.items()
        )
        if gpu_hours is not None and taken + session.gpus * seconds > gpu_hours * HOUR_S:
            return f"budget.gpu_hours={gpu_hours:g} has no room for it"
        return None

    def begins(self, session: SessionSpec) -> None:
        """A session takes its cards."""
        now = self.clock()
        self._live[session.id] = _Live(session.gpus, now, now + _first_s(session, now - self._began_s))

    def measures(self, session: SessionSpec, point: Point) -> None:
        """A point is begun."""
        self._live[session.id].until_s = self.clock() + point.estimate_s

    def measured(self, point: Point, seconds: float) -> None:
        """A point has taken so long."""
        self._took_s, self._estimated_s = self._took_s + seconds, self._estimated_s + point.estimate_s

    def ends(self, session: SessionSpec, had_cards: bool = True) -> None:
        """A session has given its cards back, or waited for some in vain."""
        live = self._live.pop(session.id)
        if had_cards:
            self._ended_gpu_s += live.gpus * (self.clock() - live.since_s)


def _first_s(session: SessionSpec, since_s: float = 0.0) -> float:
    """Seconds until a session's quickest point is measured, of one that begins so long after the run."""
    quickest_s = min((point.estimate_s for point in session.points), default=0.0)
    return _import_left_s(session, since_s) + session.start_estimate_s + quickest_s


def _import_left_s(session: SessionSpec, since_s: float) -> float:
    """Seconds for which a server that is to be forked still waits for its node's import, which begins with the run."""
    if session.start is not Start.WARM:
        return 0.0
    return max(0.0, estimate.import_s(session.engine, session.device == "cpu") - since_s)


def _level(point: Point) -> float:
    return point.arrivals.rate if point.arrivals else float(point.concurrency)
