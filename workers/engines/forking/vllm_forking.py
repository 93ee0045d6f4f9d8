"""A platform plugin of vLLM, found by its entry point: lets a forked server on the CPU build fork its engine in turn.

vLLM's CPU platform has all processes spawned, whatever VLLM_WORKER_MULTIPROC_METHOD says, because its worker must be a
new program: LD_PRELOAD and the OpenMP variables are read when libraries are loaded. The engine's process, which only
schedules, has no such need. So it is forked where the variable says so, and spawns its worker as ever,
but for the order of that one's imports (`vllm_worker_imports`).
"""

from __future__ import annotations

import os
from functools import partial
from multiprocessing import spawn
from pathlib import Path
from typing import Any

METHOD = "VLLM_WORKER_MULTIPROC_METHOD"
PRELOADED = "LD_PRELOAD"
ALLOCATOR = "libtcmalloc"
"""Bundled by some builds, which have every new program use it: a fork cannot, so their engine is spawned, as ever."""
IMPORTS = Path(__file__).with_name("vllm_worker_imports.py")
PLAIN = "vllm.platforms.cpu.CpuPlatform"


def platform() -> str | None:
    """Return the platform's class where vLLM would choose its plain CPU platform."""
    from vllm.platforms import cpu_platform_plugin

    return "vllm_forking.ForkingCpuPlatform" if cpu_platform_plugin() == PLAIN else None


def __getattr__(name: str) -> Any:
    if name != "ForkingCpuPlatform":
        raise AttributeError(name)
    from vllm.platforms.cpu import CpuPlatform

    class ForkingCpuPlatform(CpuPlatform):
        """vLLM's, but for how the process that resolves the configuration makes the next one."""

        @classmethod
        def check_and_update_config(cls, vllm_config: Any) -> None:
            method, before = os.environ.get(METHOD), os.environ.get(PRELOADED, "")
            super().check_and_update_config(vllm_config)
            another_allocator = ALLOCATOR in os.environ.get(PRELOADED, "") and ALLOCATOR not in before
            if method == "fork" and not another_allocator:
                os.environ[METHOD] = method
                os.register_at_fork(after_in_child=_spawn)

    globals()[name] = ForkingCpuPlatform
    return ForkingCpuPlatform


def _spawn() -> None:
    os.environ[METHOD] = "spawn"
    if getattr(spawn.get_command_line, "func", None) is not _importing_first:  # registered with every configuration
        spawn.get_command_line = partial(_importing_first, spawn.get_command_line)


def _importing_first(command_line: Any, **given: Any) -> list[str]:
    command: list[str] = command_line(**given)
    if "-c" in command:
        program = command.index("-c") + 1
        command[program] = f"import runpy; runpy.run_path({str(IMPORTS)!r}); {command[program]}"
    return command
