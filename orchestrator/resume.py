"""Going on with a run: its experiments from the manifest, and what of a plan has no finished shard yet."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from contract.specs import SessionSpec
from orchestrator.plan import Plan, further_points
from orchestrator.problems import ConfigError
from orchestrator.schema import Experiment, validate
from orchestrator.store import Store


def experiments_of(run: Path, overrides: list[str]) -> list[Experiment]:
    """Return the experiments that a run was made of. Raises `ConfigError` where it is no run, or more is asked."""
    if overrides:
        raise ConfigError([f"resume={run} goes on with the run's own configuration; drop {' '.join(overrides)}"])
    return [validate(content, []) for content in Store(run).manifest()["experiments"]]


def left_to_do(plan: Plan, store: Store) -> list[SessionSpec]:
    """Return the sessions that still have points to measure, with those points only."""
    left = []
    for session in plan.sessions:
        every = (*session.points, *further_points(session, store.max_concurrency(session.id)))
        points = tuple(point for point in every if not store.done(session.id, point.id))
        if points:
            left.append(replace(session, points=points))
    return left
