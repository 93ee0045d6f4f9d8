"""What the user wants to serve, when the run's manifest says so. Nothing else of the manifest is read here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Targets:
    """The service to size for: so many requests at once, each holding so many tokens of context."""

    concurrency: int | None = None
    context_tokens: int | None = None


def read_targets(run_dir: Path) -> Targets:
    """Return the targets under the key `target` of `manifest.json`; empty where the file or the key is missing."""
    try:
        manifest: Any = json.loads((run_dir / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return Targets()
    target = manifest.get("target") if isinstance(manifest, dict) else None
    if not isinstance(target, dict):
        return Targets()
    return Targets(_positive(target.get("concurrency")), _positive(target.get("context_tokens")))


def _positive(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
