"""What analysis reads of manifest.json. All of it may be missing: rows alone can be analysed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

UNFINISHED = {
    "running": "it goes on, or was killed",
    "interrupted": "it was stopped",
    "ended early": "it could not go on writing",
}
"""What a manifest says of a run that may not have rows of all that it was asked for, and why not."""


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A run that was not measured to its end, as far as its manifest knows."""

    status: str
    """One of `UNFINISHED`."""
    planned: frozenset[tuple[str, str]]
    """Session and point of all that was planned from the start; what a search adds is not among them."""
    searches: bool
    """Whether a session has a search that adds points."""


def read_manifest(run_dir: Path) -> dict[str, Any]:
    """Return the manifest; empty where there is none that can be read."""
    try:
        manifest: Any = json.loads((run_dir / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def read_configs(run_dir: Path) -> dict[str, Mapping[str, Any]]:
    """Return the content of config.json of each planned session's model, by session id."""
    sessions = read_manifest(run_dir).get("sessions")
    found: dict[str, Mapping[str, Any]] = {}
    for session in sessions if isinstance(sessions, list) else []:
        model = session.get("model") if isinstance(session, dict) else None
        config = model.get("config") if isinstance(model, dict) else None
        if isinstance(config, dict) and isinstance(session.get("id"), str):
            found[session["id"]] = config
    return found


def read_unfinished(run_dir: Path) -> Unfinished | None:
    """Return what was planned of a run that is not at its end; None where it is, or no manifest says."""
    manifest = read_manifest(run_dir)
    status = manifest.get("status")
    if not isinstance(status, str) or status not in UNFINISHED:
        return None
    listed = manifest.get("sessions")
    sessions = [each for each in listed if isinstance(each, dict)] if isinstance(listed, list) else []
    searches = any(session.get("searched_estimate_s") for session in sessions)
    return Unfinished(status, frozenset(_planned(sessions)), searches)


def _planned(sessions: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    for session in sessions:
        points = session.get("points")
        for point in points if isinstance(points, list) else []:
            session_id, point_id = session.get("id"), point.get("id") if isinstance(point, dict) else None
            if isinstance(session_id, str) and isinstance(point_id, str):
                yield session_id, point_id
