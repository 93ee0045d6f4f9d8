"""Going on with a run: its experiments from the manifest, whether it is still the same machine and software, and what
of a plan has no finished shard yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from contract.specs import WORKLOAD_VERSION, SessionSpec
from orchestrator.fleet import Fleet
from orchestrator.plan import Plan, memory_first
from orchestrator.problems import ConfigError
from orchestrator.schema import Experiment, validate
from orchestrator.search import next_step
from orchestrator.store import Store


def experiments_of(store: Store, further: list[Experiment], address: str | None = None) -> list[Experiment]:
    """Return the experiments that a run was made of, then those of `further` that are not among them.

    `address` is the cluster to go on with, as the user names it. Raises `ConfigError` where it is no run, its
    experiments are not understood any more, or the manifest alone says which host to trust: what a cluster's head
    sends back is executed, and the run may come from elsewhere.
    """
    own = [validate(content, []) for content in store.manifest()["experiments"]]
    made_on = own[0].cluster.address
    if address is None and made_on not in ("local", "auto"):
        raise ConfigError([f"the run was made on the cluster at {made_on}: name it, cluster.address={made_on}"])
    if address is not None:
        own = [
            each.model_copy(update={"cluster": each.cluster.model_copy(update={"address": address})}) for each in own
        ]
    here = [experiment.model_copy(update={"output_root": own[0].output_root}) for experiment in further]
    if here:  # the budget is of one start of the run: what is typed now counts
        own = [experiment.model_copy(update={"budget": here[0].budget}) for experiment in own]
    return own + [experiment for experiment in here if experiment not in own]


def differences(manifest: Mapping[str, Any], fleet: Fleet) -> list[str]:
    """Return what of the things that move a number is not what it was when the run was made, one line each.

    What either side does not know (an older manifest, a host without NVML) is no difference.
    """
    then, now = _provenance(manifest.get("fleet", {})), _provenance(asdict(fleet))
    then["workload version"], now["workload version"] = str(manifest.get("workload_version", "")), str(WORKLOAD_VERSION)
    return [f"{what}: {then[what]} then, {now[what]} now" for what in now if then[what] and now[what] != then[what]]


def _provenance(fleet: Mapping[str, Any]) -> dict[str, str]:
    nodes = fleet.get("nodes", [])
    return {
        "device": fleet.get("device") or "",
        "vLLM": fleet.get("vllm_version") or "",
        "GPU": ", ".join(sorted({node.get("gpu_name") or "" for node in nodes})),
        "driver": ", ".join(sorted({node.get("driver_version") or "" for node in nodes})),
    }


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
