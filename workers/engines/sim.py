"""The simulator as an engine: a stand-in server that is chosen by name and whose rows say `simulated`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from contract.kv import LINEAR_ATTENTION, KVLayout
from contract.rows import StartPhase
from contract.specs import SessionSpec
from workers import kv_figures
from workers.engines import sim_server
from workers.engines.base import Address, Versions
from workers.engines.vllm import flag

DEFAULT_UTILIZATION = 0.9
RUNTIME_BYTES = 2**30
"""What a pretended server holds beside weights and KV pool."""


class SimEngine:
    """Starts `sim_server` with the KV layout that the formula predicts, so that memory follows the same arithmetic."""

    simulated = True
    warm_modules: tuple[str, ...] = ()

    def command(self, spec: SessionSpec, model: str, address: Address) -> list[str]:
        """Return the stand-in's argv. `server.extra_args` are its own flags: `start_s`, `step_s`, `fail`, `fail_on`."""
        layout = kv_figures.layout_of(spec)
        length = spec.server.max_model_len
        arguments: dict[str, Any] = {
            "model": spec.model.name,
            "max_model_len": length,
            "state": "sim.json",
            "uds": address.uds,
            "port": address.port,
            "bytes_per_block": layout.bytes_per_block if layout else 2**20,
            "block_size": layout.block_size if layout else 16,
            "blocks_per_sequence": layout.blocks_per_sequence(length) if layout else -(-length // 16),
            "tables": json.dumps(_tables(layout, length) if layout else [(1, 0, -(-length // 16), -(-length // 16))]),
            "runtime_bytes": RUNTIME_BYTES,
            "weight_bytes": _weights(spec),
            "ranks": spec.gpus,
            "kv_cache_memory_bytes": spec.server.kv_cache_memory_bytes,
            "gpu_memory_utilization": spec.server.gpu_memory_utilization or DEFAULT_UTILIZATION,
            "max_num_seqs": spec.server.max_num_seqs or 256,
            **spec.server.extra_args,
        }
        argv = [sys.executable, str(Path(sim_server.__file__).resolve())]
        for name, value in arguments.items():
            argv += flag(name, value if not isinstance(value, dict) else json.dumps(value))
        return argv

    def environment(self, spec: SessionSpec, address: Address) -> dict[str, str]:
        """Return the key, where there is one."""
        return {"VLLM_API_KEY": address.api_key} if address.api_key else {}

    def compile_key(self, spec: SessionSpec) -> None:
        """Compiles nothing."""

    def phases(self, lines: Sequence[tuple[float, str]], ready_s: float) -> list[StartPhase]:
        """Return nothing: a stand-in's start says nothing."""
        return []

    def silence_limit_s(self, spec: SessionSpec, lines: Sequence[tuple[float, str]], forked: bool) -> float:
        """Return a limit that a stand-in does not come near."""
        return 60.0

    def reads_weights(self, spec: SessionSpec, lines: Sequence[tuple[float, str]]) -> bool:
        """Return False: it has none."""
        return False

    def is_waiting(self, line: str) -> bool:
        """Return False: it waits without a word."""
        return False

    def parent_environment(self) -> dict[str, str]:
        """Return nothing."""
        return {}

    def forked_environment(self) -> dict[str, str]:
        """Return nothing."""
        return {}

    def versions(self) -> Versions:
        """Return nothing: no vLLM takes part."""
        return Versions()


def _tables(layout: KVLayout, length: int) -> list[tuple[int, int, int, int]]:
    """Of each group of layers: block tables, and the blocks of a request in one of them (`sim_server.Tables`)."""
    found = []
    for group in layout.groups:
        n = layout.tables(group)
        fewest = layout.state_blocks if group.kind == LINEAR_ATTENTION else 0
        found.append((n, fewest, layout.blocks_held(group, length) // n, layout.blocks_of(group, length) // n))
    return found


def _weights(spec: SessionSpec) -> int:
    from contract.weights import weight_bytes

    return weight_bytes(spec.model.config, spec.server.tensor_parallel_size, spec.server.dtype)
