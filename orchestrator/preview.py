"""The plan in words: sessions, points, GPUs and estimated minutes. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from contract.specs import Point, PointKind, SessionSpec
from orchestrator import estimate, forks
from orchestrator.budget import Budget, by_use, fitting
from orchestrator.fleet import Fleet
from orchestrator.plan import Plan, searched_points
from orchestrator.progress import title
from orchestrator.scheduler import Job, makespan_s
from orchestrator.search.anchors import Anchors


def estimate_s(sessions: Iterable[SessionSpec], fleet: Fleet) -> float:
    """Return the seconds that the queue is expected to take, behind the import that servers are forked from."""
    sessions = list(sessions)
    jobs = [Job(session.id, max(1, session.gpus), session.estimate_s) for session in sessions]
    forked = {each.engine for each in sessions if forks.planned(each.start, each.engine, fleet)}
    import_s = max((estimate.import_s(engine, fleet.device == "cpu") for engine in forked), default=0.0)
    return import_s + makespan_s(jobs, {node.id: node.slots for node in fleet.nodes}) if jobs else 0.0


def budget_words(sessions: Iterable[SessionSpec], fleet: Fleet, budget: Budget) -> list[str]:
    """Return what a budget holds of the plan, a line each; nothing where there is none."""
    if not budget.limits:
        return []
    ordered = [by_use(session) for session in sessions]
    needed = {"minutes": estimate_s(ordered, fleet) / 60, "gpu_hours": gpu_hours(ordered)}
    given = {"minutes": budget.minutes, "gpu_hours": budget.gpu_hours}
    lines = [f"budget.{name}={limit:g}, of about {needed[name]:.2g} needed" for name, limit in given.items() if limit]
    fit = fitting(ordered, {node.id: node.slots for node in fleet.nodes}, budget)
    planned = sum(len(session.points) for session in ordered)
    return [*lines, f"about {fit} of {planned} planned points fit (rough), the most useful first; others are left out"]


def gpu_hours(sessions: Iterable[SessionSpec]) -> float:
    """Return the hours of GPUs that the sessions are expected to hold."""
    return sum(session.gpus * session.estimate_s for session in sessions) / 3600


def describe(plan: Plan, fleet: Fleet, budget: Budget | None = None) -> str:
    """Return one line a session, and what it adds up to."""
    lines = [f"{len(plan.sessions)} sessions, {points_words(plan.points, plan.searched)} on {fleet.describe()}"]
    lines += [_line(session, plan, fleet) for session in plan.sessions]
    minutes = estimate_s(plan.sessions, fleet) / 60
    lines += budget_words(plan.sessions, fleet, budget or Budget())
    hours = gpu_hours(plan.sessions)
    lines.append(f"estimated: {minutes:.0f} min, {hours:.2f} GPU-hours (rough; dry run: nothing was started)")
    return "\n".join(lines)


def points_words(points: int, searched: int) -> str:
    """Return how many points there are, and may be."""
    return f"up to {points + searched} points, searched" if searched else f"{points} points"


def _line(session: SessionSpec, plan: Plan, fleet: Fleet) -> str:
    loads = [point for point in session.points if point.kind is PointKind.LOAD]
    memory = len(session.points) - len(loads)
    parts = [f"{memory} memory"] if memory else []
    for purpose in dict.fromkeys(point.purpose for point in loads):
        levels = dict.fromkeys(_level(point) for point in loads if point.purpose is purpose)
        count = sum(point.purpose is purpose for point in loads)
        parts.append(f"{count} {purpose} at {','.join(levels)}")
    searched = searched_points(plan, session)
    if searched:
        parts.append(f"up to {searched} more, searched")
    anchors = [search for search in plan.searches.get(session.id, ()) if isinstance(search, Anchors)]
    parts += [f"an anchor at {_level(search.point_at(0))} again and again" for search in anchors]
    parts += ["at the end alone on its host, too"] if session.id in plan.controls else []
    gpus = f"{session.gpus} GPU" if session.gpus else "CPU"
    warm = ", warm" if forks.planned(session.start, session.engine, fleet) else ""
    return f"  {session.id}  {title(session)}  {gpus}{warm}  {'; '.join(parts)}  ~{session.estimate_s / 60:.1f} min"


def _level(point: Point) -> str:
    return f"{point.arrivals.rate:g}/s" if point.arrivals else str(point.concurrency)
