"""What a node says of itself before a run: its cards and who else is on them, versions, room, models. Starts nothing.

Asked by `orchestrator.cluster` on every node that is to hold servers; judged by `orchestrator.preflight`.
"""

from __future__ import annotations

import shutil
import socket
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from contract.rows import SCHEMA_VERSION
from contract.specs import WORKLOAD_VERSION, ModelSpec

CLEAN_LIMIT_S = 15.0
"""For servers of a run that was killed a moment ago to be gone from the cards."""
CLEAN_POLL_S = 0.5


@dataclass(frozen=True, slots=True)
class NodeReport:
    """One node, as a process there sees it."""

    host: str
    gpu_names: tuple[str, ...] = ()
    """Of every card that a server there could use."""
    gpu_memory_bytes: int | None = None
    """Of the smallest."""
    driver_version: str | None = None
    vllm_version: str | None = None
    code: str = ""
    """Versions of our own package that must agree: rows and the way they are measured."""
    foreign_processes: tuple[str, ...] = ()
    """That hold memory of the cards."""
    free_bytes: int = 0
    """Where servers keep their sockets, logs and temporary files."""
    temporary: str = ""
    """That directory."""
    cache: str | None = None
    """Where servers keep what they compile and the shapes they load; None where nothing is kept."""
    cache_free_bytes: int = 0
    """There."""
    missing_models: tuple[str, ...] = ()
    """Models that cannot be loaded there, and why."""
    slices: bool = False
    """Whether any of the cards is a slice of one (MIG)."""
    environment: tuple[str, ...] = ()
    """See `environment_of_numbers`."""
    all_kinds: tuple[str, ...] = ()
    """See `kinds_of_cards`."""


def look(
    models: tuple[ModelSpec, ...] = (), most_cards: int | None = None, omp_num_threads: str | None = None
) -> NodeReport:
    """Return this node's report. `most_cards`: only the first so many are to hold servers (None: all).

    `omp_num_threads`: what the user has set, for Ray may have set another.

    Raises `NoSuchCard` where CUDA_VISIBLE_DEVICES names a card that is not there.
    """
    from workers.caches import cache_root
    from workers.devices.nvml import driver_version, kinds_of_cards, visible_cards
    from workers.engines.base import environment_of_numbers
    from workers.engines.vllm import installed_version

    cards = visible_cards()[:most_cards] if most_cards != 0 else []
    temporary, cache = tempfile.gettempdir(), cache_root()
    return NodeReport(
        host=socket.gethostname(),
        gpu_names=tuple(card.name for card in cards),
        gpu_memory_bytes=min((card.memory_bytes for card in cards), default=None),
        slices=any(card.is_slice for card in cards),
        driver_version=driver_version(),
        vllm_version=installed_version(),
        code=f"schema {SCHEMA_VERSION}, workload {WORKLOAD_VERSION}",
        foreign_processes=_others_on([card.id for card in cards]),
        free_bytes=shutil.disk_usage(temporary).free,
        temporary=temporary,
        cache=str(cache) if cache is not None else None,
        cache_free_bytes=shutil.disk_usage(cache).free if cache is not None else 0,
        environment=environment_of_numbers(omp_num_threads),
        all_kinds=kinds_of_cards(),
        missing_models=tuple(missing for model in models if (missing := _missing(model))),
    )


def _others_on(cards: list[str]) -> tuple[str, ...]:
    """Processes on the cards; those that are just ending get the time for it."""
    from workers.devices.nvml import NvmlDevice

    if not cards:
        return ()
    device = NvmlDevice(cards)
    deadline = time.monotonic() + CLEAN_LIMIT_S
    try:
        while (found := device.processes(None)) and time.monotonic() < deadline:
            time.sleep(CLEAN_POLL_S)
    finally:
        device.close()
    return tuple(map(str, found))


def _missing(model: ModelSpec) -> str | None:
    from workers.models import ModelNotFound, missing_weights, read_config

    if model.path is None:
        return None
    if Path(model.path).is_absolute() and not Path(model.path).is_dir():
        return f"{model.path} is no directory there: models belong on a shared file system, or on every node alike"
    try:
        read_config(model.path, model.revision)
    except ModelNotFound as error:
        return str(error)
    return None if model.dummy_weights else missing_weights(model.path, model.revision)
