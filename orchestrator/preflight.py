"""What must hold before anything is started, beyond one experiment's own validity."""

from __future__ import annotations

from orchestrator.problems import ConfigError
from orchestrator.schema import Experiment


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
