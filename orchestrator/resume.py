"""Going on with a run: its experiments from the manifest, whether it is still the same machine and software, and what
of a plan has no finished shard yet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from contract.specs import WORKLOAD_VERSION, SessionSpec
from orchestrator.fleet import Fleet
from orchestrator.plan import Plan, memory_first
from orchestrator.problems import ConfigError
from orchestrator.schema import Experiment, validate
from orchestrator.search import next_step
from orchestrator.store import Store

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

UNSET = "not set"
"""Of a variable that a node does not have."""
UNHASHED = (
    "engine.ready_timeout_s", "engine.stop_grace_s", "engine.memory_back_s", "server.start",
    "load.processes", "load.request_timeout_s", "load.prefix_hit_limit",
    "cluster.address", "cluster.num_gpus", "cluster.gpu", "cluster.shared_gpus", "budget.minutes", "budget.gpu_hours",
)  # fmt: skip
"""Keys that may be said anew for a run that is gone on with: no id of a session or a point hangs on them."""


def changes_of(overrides: Iterable[Override]) -> tuple[dict[str, Any], list[str]]:
    """Return what overrides say of keys that no hash holds, and the other overrides as they were typed.

    Raises `ConfigError` where such a key has several values.
    """
    changes: dict[str, Any] = {}
    others = []
    for each in sorted(overrides, key=lambda each: each.key_or_group != "cluster"):  # the group before its keys
        key = "cluster.address" if each.key_or_group == "cluster" else each.key_or_group
        typed = (each.input_line or "").lstrip("+")
        if key not in UNHASHED or each.is_delete():
            others.append(typed)
        elif each.is_sweep_override():
            raise ConfigError([f"{typed}: a run that is gone on with has one value of it"])
        else:
            changes[key] = each.value()
    return changes, others


def experiments_of(store: Store, further: list[Experiment], changes: Mapping[str, Any]) -> list[Experiment]:
    """Return the experiments that a run was made of, then those of `further` that are not among them.

    `changes` are of keys in `UNHASHED` and hold for all of them; where nothing is said anew, `further` has what the
    run has. Raises `ConfigError` where it is no run, its experiments are not understood any more, or the manifest
    alone says which host to trust: what a cluster's head sends back is executed, and the run may come from elsewhere.
    """
    own = [validate(_changed(content, changes), []) for content in store.manifest()["experiments"]]
    made_on = own[0].cluster.address
    if "cluster.address" not in changes and made_on not in ("local", "auto"):
        raise ConfigError([f"the run was made on the cluster at {made_on}: name it, cluster.address={made_on}"])
    first = own[0].model_dump(mode="json")
    kept = {key: first[section][name] for key in UNHASHED for section, name in [key.split(".")]}
    here = [
        validate({**_changed(each.model_dump(mode="json"), kept), "output_root": own[0].output_root}, [])
        for each in further
    ]
    return own + [experiment for experiment in here if experiment not in own]


def _changed(content: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return an experiment as plain dicts, with `changes` in it; what is no section is left for `validate` to name."""
    for key, value in changes.items():
        section, name = key.split(".")
        if isinstance(before := content.get(section), dict):
            content = {**content, section: {**before, name: value}}
    return content


def differences(manifest: Mapping[str, Any], fleet: Fleet) -> list[str]:
    """Return what of the things that move a number is not what it was when the run was made, one line each.

    What either side does not know (an older manifest, a host without NVML) is no difference.
    """
    before, after = manifest.get("fleet", {}), asdict(fleet)
    then, now = _provenance(before), _provenance(after)
    then["workload version"], now["workload version"] = str(manifest.get("workload_version", "")), str(WORKLOAD_VERSION)
    known = [what for what in now if then[what] and now[what]]
    lines = [f"{what}: {then[what]} then, {now[what]} now" for what in known if then[what] != now[what]]
    return lines + _changed_environment(_environment(before), _environment(after))


def _changed_environment(then: Mapping[str, str] | None, now: Mapping[str, str] | None) -> list[str]:
    """Return a line for each variable that servers inherit, and numbers may hang on, that is not as it was."""
    if then is None or now is None:
        return []
    told = {name: (then.get(name, UNSET), now.get(name, UNSET)) for name in sorted(then.keys() | now.keys())}
    return [f"environment: {name}: {was} then, {now_is} now" for name, (was, now_is) in told.items() if was != now_is]


def _environment(fleet: Mapping[str, Any]) -> dict[str, str] | None:
    """Return the variables of all nodes; None where they are not known of each."""
    nodes = [node.get("environment") for node in fleet.get("nodes", [])]
    if not all(isinstance(lines, list | tuple) for lines in nodes):
        return None
    by_node = [{name: value for line in lines for name, _, value in [str(line).partition("=")]} for lines in nodes]
    names = {name for node in by_node for name in node}
    return {name: " or ".join(sorted({node.get(name, UNSET) for node in by_node})) for name in names}


def _provenance(fleet: Mapping[str, Any]) -> dict[str, str]:
    nodes = fleet.get("nodes", [])
    return {
        "device": fleet.get("device") or "",
        "vLLM": fleet.get("vllm_version") or "",
        "GPU": ", ".join(sorted({node.get("gpu_name") or "" for node in nodes})),
        "driver": ", ".join(sorted({node.get("driver_version") or "" for node in nodes})),
    }


def left_to_do(plan: Plan, store: Store | None) -> list[SessionSpec]:
    """Return the sessions that still have points to measure or to prune, with what is to be measured now.

    `store` is None for a run that has no directory yet.
    """
    left = []
    for session in plan.sessions:
        rows = store.rows(session.id) if store else {}
        step = next_step(plan.searches.get(session.id, ()), rows)
        every = (*step.ahead, *session.points, *step.measure)
        points = {point.id: point for point in memory_first(every) if point.id not in rows}
        if points or step.pruned:
            left.append(replace(session, points=tuple(points.values())))
    return left
