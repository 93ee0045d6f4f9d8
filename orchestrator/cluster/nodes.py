"""A cluster's nodes: as Ray tells of them, and as they tell of themselves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from contract.specs import ModelSpec
from orchestrator.cluster.errors import in_a_line
from orchestrator.fleet import (
    SIM_GPU_BYTES,
    DeviceKind,
    Fleet,
    Node,
    NoRoom,
    kind_of,
    of_one_kind,
    users_omp_num_threads,
)
from orchestrator.preflight import NotReady
from orchestrator.schema import ClusterConfig, EngineConfig
from workers import node_report
from workers.node_report import NodeReport

PROBE_LIMIT_S = 120.0


def on(node_id: str) -> Any:
    """Return what has Ray run something on a node and nowhere else."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node_id, soft=False)


def fleet(config: ClusterConfig, engine: EngineConfig) -> Fleet:
    """Return the nodes of a cluster that others have started.

    Raises `NoRoom` where there are no GPUs to run on, or GPUs of several kinds; `NotReady` where a node that may be of
    the run cannot be looked at.
    """
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    on_gpu = [node for node in alive if node["Resources"].get("GPU")]
    if engine.name == "sim":
        return _some("sim", [_node(node, _gpus(node), "simulated GPU", SIM_GPU_BYTES) for node in on_gpu])
    if engine.device == "cpu" or (engine.device == "auto" and not on_gpu):
        cores = config.cores_per_session
        nodes = [_node(node, max(1, int(node["Resources"].get("CPU", 1)) // cores)) for node in alive]
        seen = reports([node.id for node in nodes], (), most_cards=0)
        nodes = [replace(node, environment=seen[node.id].environment) for node in nodes]
        return _some("cpu", nodes, next(iter(seen.values())).vllm_version)
    seen, problems = _looks([node["NodeID"] for node in on_gpu], (), most_cards=None)
    nodes = [_node_of_cards(node, seen[node["NodeID"]]) for node in on_gpu if node["NodeID"] in seen]
    try:
        chosen = of_one_kind(nodes, config.gpu)
    except NoRoom as error:
        if problems:
            raise NotReady([*problems.values(), str(error)]) from None
        raise
    _leave_out(config.gpu, problems, on_gpu, {node.id for node in chosen})
    return _some("cuda", chosen, seen[chosen[0].id].vllm_version if chosen else None)


def reports(nodes: list[str], models: tuple[ModelSpec, ...], most_cards: int | None) -> dict[str, NodeReport]:
    """Return what nodes say of themselves, by id. Raises `NotReady` where one says nothing."""
    seen, problems = _looks(nodes, models, most_cards)
    if problems:
        raise NotReady(list(problems.values()))
    return seen


def _looks(
    nodes: list[str], models: tuple[ModelSpec, ...], most_cards: int | None
) -> tuple[dict[str, NodeReport], dict[str, str]]:
    """Return the reports of the nodes, and of those that have none why, each by id."""
    import ray

    look: Any = ray.remote(num_cpus=0, max_retries=1)(node_report.look)
    looks = {
        look.options(scheduling_strategy=on(node)).remote(models, most_cards, users_omp_num_threads()): node
        for node in nodes
    }
    done, silent = ray.wait(list(looks), num_returns=len(looks), timeout=PROBE_LIMIT_S)
    seen: dict[str, NodeReport] = {}
    why = {looks[each]: f"it says nothing within {PROBE_LIMIT_S:.0f} s" for each in silent}
    for each in done:
        try:
            seen[looks[each]] = ray.get(each)
        except Exception as error:  # whatever a node's task raises: the package missing there, a card that is not
            why[looks[each]] = in_a_line(error) + _way_out(error)
    hosts = {node["NodeID"]: node.get("NodeManagerHostname") for node in ray.nodes()}  # type: ignore[no-untyped-call]
    return seen, {
        node: f"{hosts.get(node) or node} could not be looked at: {why[node]}" for node in nodes if node in why
    }


def _leave_out(gpu: str | None, problems: dict[str, str], on_gpu: list[dict[str, Any]], chosen: set[str]) -> None:
    """Say which nodes that could not be looked at are left out: where `cluster.gpu` has chosen others, those whose
    first card is, by Ray's word, of another type. Raises `NotReady` where one may be of the run.
    """
    types = {node["NodeID"]: _accelerator(node) for node in on_gpu}
    wanted = {types[node] for node in chosen}
    tells = gpu is not None and None not in wanted
    of_another = {node for node in problems if tells and types[node] not in {*wanted, None}}
    if in_the_way := [problem for node, problem in problems.items() if node not in of_another]:
        raise NotReady(in_the_way)
    for node, problem in problems.items():
        print(f"WARNING  {problem}. It is left out: to Ray its cards are {types[node]}, not cluster.gpu's")


def held_by_others(fleet: Fleet) -> dict[str, int]:
    """Return how many GPUs of each node of the fleet other jobs hold now, by id; not of those where none are."""
    import ray
    from ray._private.state import available_resources_per_node

    free = available_resources_per_node()  # type: ignore[no-untyped-call]
    ours = {node.id for node in fleet.nodes}
    told = [node for node in ray.nodes() if node["NodeID"] in ours]  # type: ignore[no-untyped-call]
    held = {
        node["NodeID"]: math.ceil(node["Resources"].get("GPU", 0) - free.get(node["NodeID"], {}).get("GPU", 0))
        for node in told
    }
    return {node: gpus for node, gpus in held.items() if gpus > 0}


def _node(node: dict[str, Any], slots: int, name: str | None = None, memory: int | None = None) -> Node:
    resources = node["Resources"]
    ram, cores = int(resources.get("memory", 0)), int(resources.get("CPU", 1))
    return Node(node["NodeID"], slots, memory, name, ram, cores, host=node.get("NodeManagerHostname", ""))


def _node_of_cards(node: dict[str, Any], seen: NodeReport) -> Node:
    made = _node(node, _gpus(node), kind_of(seen.gpu_names), seen.gpu_memory_bytes)
    return replace(
        made,
        driver_version=seen.driver_version,
        slices=seen.slices,
        environment=seen.environment,
        all_kinds=seen.all_kinds,
    )


def _accelerator(node: dict[str, Any]) -> str | None:
    """The type that Ray has read from the name of a node's first card; None where it has none."""
    prefix = "accelerator_type:"
    return next((name.removeprefix(prefix) for name in node["Resources"] if name.startswith(prefix)), None)


def _gpus(node: dict[str, Any]) -> int:
    return int(node["Resources"]["GPU"])


def _some(device: DeviceKind, nodes: Sequence[Node], vllm_version: str | None = None) -> Fleet:
    if not nodes:
        raise NoRoom("the cluster has no GPUs")
    return Fleet(device, tuple(nodes), vllm_version)


def renamed(fleet: Fleet, node_id: str) -> Fleet:
    """Return a fleet of one node by Ray's name for it."""
    return replace(fleet, nodes=(replace(fleet.nodes[0], id=node_id),))


def _way_out(error: Exception) -> str:
    """What to do about a node that could not be looked at, where its error tells."""
    if "No module named" in str(error):
        return " (is this package installed there?)"
    return " (CUDA_VISIBLE_DEVICES is set before `ray start`)" if "NoSuchCard" in str(error) else ""
