"""What the user wants to serve, when the run's manifest says so."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from analysis.rows.manifest import read_manifest


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

    def percentiles(self) -> dict[str, float]:
        """Return the objectives that are given, by the column of a level that each is held against."""
        return {field.name: limit for field in fields(self) if (limit := getattr(self, field.name)) is not None}


NO_OBJECTIVES = Slo()


def read_slo(run_dir: Path) -> Slo:
    """Return the objectives under the key `slo` of `manifest.json`; none where the file or the key is missing."""
    slo = _section(run_dir, "slo")
    return Slo(*(_above_zero(slo.get(field.name)) for field in fields(Slo)))


def read_gpu_hour(run_dir: Path) -> float | None:
    """Return the price of one GPU for one hour, the key `cost.gpu_hour` of `manifest.json`; None where it is not given.

    In a currency that nobody names.
    """
    return _above_zero(_section(run_dir, "cost").get("gpu_hour"))


def read_targets(run_dir: Path) -> Targets:
    """Return the targets under the key `target` of `manifest.json`; empty where the file or the key is missing."""
    target = _section(run_dir, "target")
    return Targets(_positive(target.get("concurrency")), _positive(target.get("context_tokens")))


def _positive(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _above_zero(value: Any) -> float | None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return float(value) if 0 < value < float("inf") else None


def _section(run_dir: Path, key: str) -> dict[str, Any]:
    section = read_manifest(run_dir).get(key)
    return section if isinstance(section, dict) else {}
