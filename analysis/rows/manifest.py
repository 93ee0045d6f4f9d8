"""What analysis reads of manifest.json. All of it may be missing: rows alone can be analysed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


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
