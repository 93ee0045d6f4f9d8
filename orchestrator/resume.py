"""Going on with a run: its experiments from the manifest, and what of a plan has no finished shard yet."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from contract.specs import SessionSpec
from orchestrator.plan import Plan, memory_first
from orchestrator.problems import ConfigError
from orchestrator.schema import Experiment, validate
from orchestrator.search import next_step
from orchestrator.store import Store


def experiments_of(run: Path, overrides: list[str]) -> list[Experiment]:
    """Return the experiments that a run was made of. Raises `ConfigError` where it is no run, or more is asked."""
    if overrides:
        raise ConfigError([f"resume={run} goes on with the run's own configuration; drop {' '.join(overrides)}"])
    return [validate(content, []) for content in Store(run).manifest()["experiments"]]


def left_to_do(plan: Plan, store: Store) -> list[SessionSpec]:
    """Return the sessions that still have points to measure or to prune, with what is to be measured now."""
    left = []
    for session in plan.sessions:
        rows = store.rows(session.id)
        step = next_step(plan.searches.get(session.id, ()), rows)
        every = (*step.ahead, *session.points, *step.measure)
        points = {point.id: point for point in memory_first(every) if point.id not in rows}
        if points or step.pruned:
            left.append(replace(session, points=tuple(points.values())))
    return left
