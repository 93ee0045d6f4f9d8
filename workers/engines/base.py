"""The interface of an engine: how its server is started and what its log says. Knows no processes and no HTTP."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from contract.rows import StartPhase
from contract.specs import SessionSpec
from workers.provenance import Places, shown_environment
from workers.secrecy import is_named_secret


@dataclass(frozen=True, slots=True)
class Address:
    """Where the server listens: a socket path, or a loopback port with the key that only we know."""

    uds: Path | None = None
    port: int | None = None
    api_key: str | None = None


@dataclass(frozen=True, slots=True)
class Versions:
    """Of what is installed on the session's node; None where it is not."""

    vllm: str | None = None
    torch: str | None = None


class Engine(Protocol):
    """One way to serve a model behind vLLM's HTTP face."""

    simulated: bool
    warm_modules: tuple[str, ...]
    """What a warm parent imports: first the module that `command` runs; none where servers cannot be forked.

    `MODULE:FUNCTION` is a function that it calls too, for what that imports."""

    def command(self, spec: SessionSpec, model: str, address: Address) -> list[str]:
        """Return the argv of a server for `spec`; `model` is a directory or a hub name."""

    def environment(self, spec: SessionSpec, address: Address) -> dict[str, str]:
        """Return what is set for the server beyond the inherited environment."""

    def compile_key(self, spec: SessionSpec) -> str | None:
        """Return what two servers share that find what the other has compiled; None for one that compiles nothing."""

    def phases(self, lines: Sequence[tuple[float, str]], ready_s: float) -> list[StartPhase]:
        """Return where a start went, from its log: (seconds since the launch, line)."""

    def silence_limit_s(self, spec: SessionSpec, lines: Sequence[tuple[float, str]], forked: bool) -> float:
        """Return how long a start may be silent where its log is now: a few times what is usual there."""

    def reads_weights(self, spec: SessionSpec, lines: Sequence[tuple[float, str]]) -> bool:
        """Return whether it is where work that nothing is said of can last for as long as a disk or network takes."""

    def is_waiting(self, line: str) -> bool:
        """Return whether a line of its log says only that it waits: a start that repeats it does not go on."""

    def parent_environment(self) -> dict[str, str]:
        """Return what a warm parent alone has beside `environment`."""

    def forked_environment(self) -> dict[str, str]:
        """Return what a forked server has beside `environment`, unless the user has set it."""

    def versions(self) -> Versions:
        """Return the versions installed here, without importing anything heavy."""


STRIPPED = ("RAY_", "_RAY_", "VLLM_CAPACITY_", "VLLM_API_KEY")
"""Beginnings of variables that a server must not inherit: Ray's would change what vLLM does, and hold its token; a key
of the user's would shut us out of our own server."""


def inherited_environment(omp_num_threads: str | None) -> dict[str, str]:
    """Return this process's environment as a server may inherit it.

    Ray sets OMP_NUM_THREADS in its workers, which would take vLLM's CPU threads away: it is put back to
    `omp_num_threads`, what the user had (None: unset).
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith(STRIPPED) and k != "OMP_NUM_THREADS"}
    if omp_num_threads is not None:
        kept["OMP_NUM_THREADS"] = omp_num_threads
    return kept


_WITHOUT_EFFECT = re.compile(
    r"^(HF_|DO_NOT_TRACK|TMPDIR|CUDA_VISIBLE_DEVICES)|_(DIR|ROOT|HOME)$|"
    r"^(CUDA_PATH|CUDA_CACHE_PATH|VLLM_(ASSETS|MEDIA)_CACHE|VLLM_(XLA_CACHE|DEBUG_DUMP|LOGGING_CONFIG|RPC_BASE)_PATH)$"
)
"""Where things lie, and which cards of a kind: no number hangs on these. Other paths name what runs (a library)."""


def environment_of_numbers(omp_num_threads: str | None) -> tuple[str, ...]:
    """Return `NAME=value` of what a server inherits here and numbers may hang on, without what is named like a secret.

    With it a run that is gone on with is held against what was there when it was made.
    """
    inherited = inherited_environment(omp_num_threads)
    left_out = {name for name in inherited if _WITHOUT_EFFECT.search(name) or is_named_secret(name)}
    moving = {name: value for name, value in inherited.items() if name not in left_out}
    return tuple(shown_environment(moving, Places(Path("<session>"))))
