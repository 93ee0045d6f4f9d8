"""The bounds of vLLM's latency histograms: what an alert on one of their percentiles can tell apart. Pure.

From vllm/v1/metrics/buckets.py (before: loggers.py), the same from 0.25 to 0.32.
"""

from __future__ import annotations

from bisect import bisect_left

E2EL_S = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip
TTFT_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0,
    640.0, 2560.0,
)  # fmt: skip
TPOT_S = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip


def bucket_of(value_s: float, bounds_s: tuple[float, ...]) -> tuple[float, float] | None:
    """Return the bounds of the bucket that a value lies in, above the first and at most the second; 0 below them all.

    Prometheus' `histogram_quantile` gives anything between the two for it. None beyond the last bound.
    """
    at = bisect_left(bounds_s, value_s)
    return None if at == len(bounds_s) else (bounds_s[at - 1] if at else 0.0, bounds_s[at])
