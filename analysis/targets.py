"""What the user wants to serve, when the run's manifest says so. Nothing else of the manifest is read here."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Targets:
    """The service to size for: so many requests at once, each holding so many tokens of context."""

    concurrency: int | None = None
    context_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Slo:
    """Service level objectives, in seconds; None where nothing is asked."""

    p95_e2e_s: float | None = None
    p95_ttft_s: float | None = None
    p95_tpot_s: float | None = None

    def limits(self) -> dict[str, float | None]:
        """Return what each latency of a request is held against, by its column."""
        return {"e2e_s": self.p95_e2e_s, "ttft_s": self.p95_ttft_s, "tpot_s": self.p95_tpot_s}


NO_OBJECTIVES = Slo()


def read_slo(run_dir: Path) -> Slo:
    """Return the objectives under the key `slo` of `manifest.json`; none where the file or the key is missing."""
    slo = _section(run_dir, "slo")
    return Slo(*(_seconds(slo.get(field.name)) for field in fields(Slo)))


def read_targets(run_dir: Path) -> Targets:
    """Return the targets under the key `target` of `manifest.json`; empty where the file or the key is missing."""
    target = _section(run_dir, "target")
    return Targets(_positive(target.get("concurrency")), _positive(target.get("context_tokens")))


def _positive(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _seconds(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and value > 0 else None


def _section(run_dir: Path, key: str) -> dict[str, Any]:
    try:
        manifest: Any = json.loads((run_dir / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    section = manifest.get(key) if isinstance(manifest, dict) else None
    return section if isinstance(section, dict) else {}
