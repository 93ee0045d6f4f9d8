"""What the run can use: nodes with GPUs, or with cores for the CPU backend. Plain values; reads NVML of this host only.

Made here for `cluster.address=local` (before any Ray, so that a plan needs none), by `orchestrator.cluster` for others.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from orchestrator.schema import ClusterConfig, EngineConfig

DeviceKind = Literal["cuda", "cpu", "sim"]
SIM_GPUS = 1
SIM_GPU_BYTES = 80 * 2**30
AND = " and "


class NoRoom(Exception):
    """No node can run what was asked for."""


@dataclass(frozen=True, slots=True)
class Node:
    """One host. `slots` is what the queue counts down: its GPUs, or its places for CPU servers."""

    id: str
    slots: int
    gpu_memory_bytes: int | None = None
    gpu_name: str | None = None
    ram_bytes: int = 0
    cores: int = 1
    driver_version: str | None = None
    host: str = ""
    slices: bool = False
    """Whether any of its GPUs is a slice of a card (MIG)."""
    environment: tuple[str, ...] | None = None
    """`NAME=value` of what its servers inherit and numbers may hang on; None where nobody looked."""
    all_kinds: tuple[str, ...] = ()
    """Names of all cards of the host, those too that this run may not use, each once."""

    @property
    def mixes_kinds(self) -> bool:
        """Whether its host has cards of more than one kind."""
        return len(self.all_kinds) > 1


@dataclass(frozen=True, slots=True)
class Fleet:
    """All nodes, and what their servers run on."""

    device: DeviceKind
    nodes: tuple[Node, ...]
    vllm_version: str | None = None
    """Installed there: how a pool is laid out depends on it."""

    @property
    def largest_node(self) -> int:
        """GPUs (or places) of the node that has most."""
        return max((node.slots for node in self.nodes), default=0)

    @property
    def slots(self) -> int:
        """GPUs (or places) of all nodes."""
        return sum(node.slots for node in self.nodes)

    @property
    def gpu_memory_bytes(self) -> int | None:
        """Of the smallest card: what fits there fits anywhere."""
        return min((node.gpu_memory_bytes for node in self.nodes if node.gpu_memory_bytes), default=None)

    @property
    def ram_bytes(self) -> int:
        """Of the smallest node."""
        return min((node.ram_bytes for node in self.nodes), default=0)

    def describe(self) -> str:
        """Return the fleet in words."""
        if self.device == "cpu":
            return f"CPU backend, {self.slots} server(s) at a time"
        names = sorted({node.gpu_name or "GPU" for node in self.nodes})
        word = "simulated GPU" if self.device == "sim" else "GPU"
        return f"{self.slots} {word}(s) on {len(self.nodes)} node(s): {', '.join(names)}"


def of_one_kind(nodes: Iterable[Node], wanted: str | None) -> tuple[Node, ...]:
    """Return the nodes whose cards are `wanted` (a part of the name; None: any), if these are all of one kind.

    Raises `NoRoom` otherwise: a curve over two kinds of cards would be none.
    """
    every = tuple(nodes)
    chosen = tuple(node for node in every if wanted is None or wanted.lower() in (node.gpu_name or "").lower())
    if every and not chosen:
        raise NoRoom(f"cluster.gpu={wanted}: no node has it; there are {_kinds(every)}")
    if len({node.gpu_name for node in chosen}) > 1 or any(AND in (node.gpu_name or "") for node in chosen):
        way_out = "name one with cluster.gpu=NAME; where one node mixes them, choose by CUDA_VISIBLE_DEVICES"
        raise NoRoom(f"GPUs of different kinds never share a run: {_kinds(chosen)}; {way_out}")
    return chosen


def kind_of(names: Iterable[str]) -> str | None:
    """Return the name of a node's cards; several where they differ."""
    return AND.join(sorted(set(names))) or None


def _kinds(nodes: tuple[Node, ...]) -> str:
    return "; ".join(f"{node.slots} x {node.gpu_name} on {node.host or 'this host'}" for node in nodes)


def users_omp_num_threads() -> str | None:
    """Return what the user has set of it, in the environment of this process."""
    in_a_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ  # there Ray, not the user, has set it
    return None if in_a_job else os.environ.get("OMP_NUM_THREADS")


def _cgroup_limit() -> float:
    """Memory that a container may use; infinite where it has no limit (cgroup v2)."""
    try:
        return float(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):
        return float("inf")


def local_fleet(cluster: ClusterConfig, engine: EngineConfig) -> Fleet:
    """Return this host as a fleet. Raises `NoRoom` where it has fewer GPUs than `cluster.num_gpus` asks for."""
    import psutil

    from workers.cores import usable_cores

    cores, ram = usable_cores(), int(min(psutil.virtual_memory().total, _cgroup_limit()))
    if engine.name == "sim":
        gpus = SIM_GPUS if cluster.num_gpus is None else cluster.num_gpus
        return Fleet("sim", (Node("local", gpus, SIM_GPU_BYTES, "simulated GPU", ram, cores),))
    from workers.devices.nvml import NoSuchCard, driver_version, kinds_of_cards, visible_cards
    from workers.engines import vllm
    from workers.engines.base import environment_of_numbers

    try:
        cards = [] if engine.device == "cpu" else visible_cards()
    except NoSuchCard as error:
        named = "CUDA_VISIBLE_DEVICES" in os.environ
        way_out = ": name cards that are here, each once, or unset it for all of them" if named else ""
        raise NoRoom(f"{error}{way_out}; engine.device=cpu needs none") from None
    version, inherited = vllm.installed_version(), environment_of_numbers(users_omp_num_threads())
    wanted = len(cards) if cluster.num_gpus is None else cluster.num_gpus
    if wanted > len(cards):
        raise NoRoom(
            f"cluster.num_gpus={wanted}, but this node has {len(cards)} GPU(s); pretended ones need engine=sim"
        )
    if engine.device == "cuda" and not cards:
        raise NoRoom("engine.device=cuda, but NVML shows no GPU on this node")
    if not wanted:
        places = max(1, cores // cluster.cores_per_session)
        return Fleet("cpu", (Node("local", places, None, None, ram, cores, environment=inherited),), version)
    memory = min(card.memory_bytes for card in cards[:wanted])
    name = kind_of(card.name for card in cards[:wanted])
    slices = any(card.is_slice for card in cards[:wanted])
    host = socket.gethostname()
    kinds = kinds_of_cards()
    node = Node("local", wanted, memory, name, ram, cores, driver_version(), host, slices, inherited, kinds)
    return Fleet("cuda", of_one_kind([node], cluster.gpu), version)
