"""Configurations for tests, made from the files in conf/ as Hydra would make them (no Hydra: milliseconds)."""

import copy
from pathlib import Path
from typing import Any

import yaml

from contract.specs import ModelSpec
from orchestrator.fleet import Fleet, Node
from orchestrator.schema import Experiment, validate

CONF = Path(__file__).parent.parent / "conf"
GIB = 2**30


def load(path: str) -> dict[str, Any]:
    """Return one file of conf/, its own defaults list carried out."""
    content: dict[str, Any] = yaml.safe_load((CONF / path).read_text())
    for entry in content.pop("defaults", []):
        if entry == "_self_":
            continue
        name, _, package = entry.partition("@")
        below = load(f"{Path(path).parent}/{name}.yaml")
        content = {**({package: below} if package else below), **content}
    return content


def raw(sweep: str | None = "kv", model: str = "tiny", engine: str = "vllm", **changes: Any) -> dict[str, Any]:
    """Return a composed configuration as plain dicts; `changes` are dotted keys with `__` for the dots."""
    content = {
        "model": load(f"model/{model}.yaml"),
        "server": load("server/default.yaml"),
        "engine": load(f"engine/{engine}.yaml"),
        "load": load("load/default.yaml"),
        "cluster": load("cluster/local.yaml"),
        "sweep": None if sweep is None else load(f"sweep/{sweep}.yaml"),
        "target": {"concurrency": 16, "context_tokens": 4096},
        "slo": {"p95_e2e_s": None, "p95_ttft_s": None, "p95_tpot_s": None},
        "cost": {"gpu_hour": None},
        "budget": {"minutes": None, "gpu_hours": None},
        "output_root": "outputs",
        "seed": 0,
        "controls": "on",
        "dry_run": False,
    }
    for key, value in changes.items():
        *path, last = key.split("__")
        section: Any = content
        for part in path:
            section = section[part]
        section[last] = value
    return copy.deepcopy(content)


def experiment(sweep: str = "kv", model: str = "tiny", engine: str = "vllm", **changes: Any) -> Experiment:
    """Return a validated experiment."""
    return validate(raw(sweep, model, engine, **changes), ["kv"])


def resolved(*experiments: Experiment) -> list[tuple[Experiment, ModelSpec]]:
    """Return experiments with their shapes as models."""
    return [(e, ModelSpec(e.model.name, e.model.config, dummy_weights=True, cut=e.model.cut)) for e in experiments]


def cpu_fleet() -> Fleet:
    """Return two cores and 24 GiB."""
    return Fleet("cpu", (Node("a", 1, None, None, 24 * GIB, 2),))


def gpu_fleet(*gpus: int) -> Fleet:
    """Return nodes with so many H100s each."""
    return Fleet("cuda", tuple(Node(f"n{i}", k, 80 * GIB, "NVIDIA H100", 512 * GIB, 64) for i, k in enumerate(gpus)))


def sim_fleet(gpus: int = 4) -> Fleet:
    """Return one node with pretended GPUs."""
    return Fleet("sim", (Node("a", gpus, 80 * GIB, "simulated GPU", 24 * GIB, 2),))
