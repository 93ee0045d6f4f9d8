"""Runs side by side: each a directory that was analysed, a short name, and what its servers and tools were."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.errors import AnalysisError
from analysis.rows.manifest import read_manifest
from analysis.rows.tables import RunPoint, Tables, read_tables
from analysis.writing.figures import clean
from contract.rows import SessionRow


@dataclass(frozen=True, slots=True)
class Run:
    """One run to be held against others."""

    name: str
    directory: Path
    tables: Tables
    manifest: dict[str, Any]

    @property
    def workload_version(self) -> object:
        """How its points were measured; None where it has no manifest that says so."""
        return self.manifest.get("workload_version")

    def versions(self, points: Sequence[RunPoint]) -> dict[str, str]:
        """Return what stood behind the points, by what it is: card, vLLM, torch, driver, way of starting, this tool."""
        sessions = self._servers(points)
        tools = self.manifest.get("versions")
        found: dict[str, set[Any]] = {
            "device": {point.device_name for point in points},
            "vLLM": {point.vllm_version for point in points},
            "torch": {session.torch_version for session in sessions},
            "driver": {session.driver_version for session in sessions},
            "start": {point.start for point in points},
            "vllm-capacity": {tools.get("vllm-capacity") if isinstance(tools, dict) else None},
        }
        return {name: " and ".join(sorted(clean(str(v)) for v in values - {None})) for name, values in found.items()}

    def _servers(self, points: Sequence[RunPoint]) -> list[SessionRow]:
        """The starts that the points were measured in; of a run that kept its sessions' last ones only, those."""
        starts: dict[str, dict[int, SessionRow]] = {}
        for session in self.tables.sessions:
            starts.setdefault(session.session_id, {})[session.attempt] = session
        asked = {(point.session_id, point.attempt) for point in points}
        own = [(starts.get(session_id, {}), attempt) for session_id, attempt in sorted(asked)]
        found = [
            known.get(attempt) or (next(iter(known.values())) if len(known) == 1 else None) for known, attempt in own
        ]
        return [session for session in found if session is not None]


def open_runs(directories: Sequence[Path]) -> list[Run]:
    """Read the tables of runs that were analysed before. Raises `AnalysisError` for one that cannot be read.

    Nothing is written. A run is named after its directory, in full where two directories have one name.
    """
    names = [directory.resolve().name for directory in directories]
    return [
        Run(
            clean(name if names.count(name) == 1 else str(directory)),
            directory,
            _tables(directory),
            read_manifest(directory),
        )
        for name, directory in zip(names, directories, strict=True)
    ]


def _tables(directory: Path) -> Tables:
    if not directory.is_dir():
        raise AnalysisError(f"{directory}: no such run directory")
    if not (directory / "points.parquet").is_file():
        raise AnalysisError(f"{directory}: has no points.parquet; `python -m analysis {directory}` makes it")
    return read_tables(directory)
