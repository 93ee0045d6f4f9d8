"""What must hold before anything is started, beyond one experiment's own validity. Pure but for one look for vLLM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from orchestrator.fleet import Fleet
from orchestrator.problems import ConfigError
from orchestrator.schema import EngineConfig, Experiment
from workers import caches
from workers.node_report import NodeReport

LEAST_FREE_BYTES = 2**30
"""For logs, sockets and temporary files of servers, and for shards."""


class NotReady(Exception):
    """The nodes are there, but servers on them would fail or measure something else: one line a problem."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def check(experiments: list[Experiment]) -> None:
    """Raise `ConfigError` where experiments cannot share a run, or their engine is not installed here."""
    from workers.engines import vllm

    first = experiments[0]
    problems = [
        f"{section}: experiments of one run must agree on it"
        for section in ("engine", "cluster", "output_root", "dry_run", "target", "slo", "cost", "budget")
        if any(getattr(other, section) != getattr(first, section) for other in experiments)
    ]
    if first.cluster.address != "local" and first.cluster.num_gpus is not None:
        problems.append("cluster.num_gpus: only with cluster.address=local; of a cluster all GPUs are used")
    here = first.cluster.address == "local"
    if here and first.engine.name == "vllm" and not first.dry_run and not vllm.is_installed():
        problems.append(
            "engine=vllm: vLLM is not installed here; `pip install vllm-capacity[gpu]` for CUDA, "
            "`pip install vllm-capacity[cpu]` for the CPU backend, or engine=sim to try the grid"
        )
    if problems:
        raise ConfigError(problems)


def check_nodes(
    fleet: Fleet,
    reports: Mapping[str, NodeReport],
    engine: EngineConfig,
    shared_gpus: bool,
    free_for_results: int,
    held: Mapping[str, int],
) -> list[str]:
    """Return what a user should know of the nodes before the first server, one line each.

    Args:
        reports: by node id, of all nodes of the fleet.
        shared_gpus: others may be on the cards: they are named and no problem.
        free_for_results: bytes free where the run directory will be.
        held: GPUs that other jobs of the cluster hold, by node id. Processes there are taken for theirs, and Ray gives
            this run none of those cards; rows name who is on a server's own.

    Raises:
        NotReady: with all that would make servers fail, or measure different things on different nodes.
    """
    problems, warnings = [], []
    hosts = [reports[node.id] for node in fleet.nodes]
    if engine.name == "vllm":
        problems += _unlike("vLLM", {r: r.vllm_version or "none" for r in hosts})
        problems += [f"{r.host}: vLLM is not installed there" for r in hosts if r.vllm_version is None]
        warnings += _unlike(
            "driver", {r: r.driver_version or "unknown" for r in hosts} if fleet.device == "cuda" else {}
        )
    problems += _unlike("this package", {r: r.code for r in hosts})
    if fleet.device == "cuda":
        problems += [
            f"{r.host}: Ray was told of {node.slots} GPUs, NVML shows {len(r.gpu_names)}"
            for node, r in zip(fleet.nodes, hosts, strict=True)
            if node.slots > len(r.gpu_names)
        ]
        foreign = {
            node.id: f"{r.host}: somebody else is on its GPUs: {'; '.join(r.foreign_processes)}"
            for node, r in zip(fleet.nodes, hosts, strict=True)
            if r.foreign_processes
        }
        in_the_way = [said for node, said in foreign.items() if not (shared_gpus or held.get(node))]
        warnings += [said for said in foreign.values() if said not in in_the_way]
        if in_the_way:
            problems += in_the_way
            problems.append("end them, leave their cards out (CUDA_VISIBLE_DEVICES), or cluster.shared_gpus=true")
    problems += [f"{r.host}: {missing}" for r in hosts for missing in r.missing_models]
    problems += [_full(f"{r.host}: {r.temporary}", r.free_bytes) for r in hosts if r.free_bytes < LEAST_FREE_BYTES]
    problems += [
        _full(f"{r.host}: {r.cache} (or name another in {caches.VARIABLE})", r.cache_free_bytes)
        for r in hosts
        if r.cache is not None and r.cache_free_bytes < LEAST_FREE_BYTES
    ]
    if free_for_results < LEAST_FREE_BYTES:
        problems.append(_full("where results are written", free_for_results))
    if problems:
        raise NotReady(list(dict.fromkeys(problems)))
    return list(dict.fromkeys(warnings))


def _unlike(what: str, seen: Mapping[NodeReport, str]) -> list[str]:
    """One line where nodes differ, naming who has what."""
    by_value: dict[str, list[str]] = {}
    for report, value in seen.items():
        by_value.setdefault(value, []).append(report.host)
    if len(by_value) < 2:
        return []
    return [f"{what} differs: {'; '.join(f'{value} on {_names(hosts)}' for value, hosts in sorted(by_value.items()))}"]


def _names(hosts: Sequence[str]) -> str:
    return ", ".join(sorted(set(hosts)))


def _full(where: str, free_bytes: int) -> str:
    return f"{where} has {free_bytes / 2**20:.0f} MiB free, a run needs {LEAST_FREE_BYTES / 2**20:.0f}"
